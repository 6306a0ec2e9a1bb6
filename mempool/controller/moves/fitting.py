"""Whether what a pool is asked to become fits, before any of it is begun: pure; slow where pages are many."""

from collections.abc import Sequence

from mempool.controller.rescaling import check_shards, shards_after
from mempool.controller.room import growth, require_room
from mempool.errors import InvalidRequest
from mempool.placement import assignment_of, plan_table
from mempool.types import PoolStatus, ShardInfo, ShardStatus, TableSchema
from mempool.types.pool import MAX_PLACED_PAGES, MAX_TABLES
from mempool.types.sizes import bytes_by_owner, num_pages


def require_fit(status: PoolStatus, shards: int, tables: Sequence[TableSchema]) -> None:
    """Whether a pool can have so many shards and these tables besides its own.

    A shard that is to be started may hold what the others may; what one may hold that does not answer is not known.
    Tables that are being filled have their room already.

    Raises:
        InvalidRequest: It cannot: with the numbers, and what to do.
    """
    check_shards(shards)
    filled = {creation.table for creation in status.creating if creation.shards}
    tables = [schema for schema in tables if schema.name not in filled]
    schemas = [view.schema for view in status.tables] + list(tables)
    pages = sum(num_pages(schema) for schema in schemas)
    if tables and (len(schemas) > MAX_TABLES or pages > MAX_PLACED_PAGES):
        raise InvalidRequest(
            f"the pool would have {len(schemas):,} tables with {pages:,} pages, and may have {MAX_TABLES:,} with "
            f"{MAX_PLACED_PAGES:,}. Nothing was changed. Give tables a larger page_slots or block_dim, or drop some"
        )
    after = shards_after([shard.info.shard for shard in status.shards], shards)
    grown = growth(
        (
            view.schema,
            present := assignment_of(view.placement),
            plan_table(view.schema, present, after),
        )
        for view in status.tables
    )
    for schema in tables:
        first = plan_table(schema, None, after)
        for shard, num_bytes in bytes_by_owner(schema, first.owners, first.key_owners).items():
            grown[shard] = grown.get(shard, 0) + num_bytes
    require_room(grown, [*status.shards, *_to_be_started(status, after)])


def _to_be_started(status: PoolStatus, after: Sequence[int]) -> list[ShardStatus]:
    limit = max((shard.page_limit_bytes for shard in status.shards if shard.state == "ready"), default=0)
    present = {shard.info.shard for shard in status.shards}
    return [
        ShardStatus(info=ShardInfo(shard=shard, address="", incarnation=0), state="ready", page_limit_bytes=limit)
        for shard in after
        if shard not in present
    ]
