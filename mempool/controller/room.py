"""Whether pages fit where a rescale would put them: a pure comparison of what shards say with what they would own."""

from collections.abc import Iterable, Mapping, Sequence

from mempool.errors import InvalidRequest
from mempool.placement import Assignment
from mempool.types import ShardStatus, TableSchema
from mempool.types.sizes import bytes_by_owner

_MIB = 2**20


def growth(moves: Iterable[tuple[TableSchema, Assignment, Assignment]]) -> dict[int, int]:
    """By how many bytes the pages of each shard grow, or shrink, from the first assignment of a table to the second."""
    change: dict[int, int] = {}
    for schema, present, target in moves:
        before = bytes_by_owner(schema, present.owners, present.key_owners)
        after = bytes_by_owner(schema, target.owners, target.key_owners)
        for shard in before.keys() | after.keys():
            change[shard] = change.get(shard, 0) + after.get(shard, 0) - before.get(shard, 0)
    return change


def require_room(grown: Mapping[int, int], statuses: Sequence[ShardStatus]) -> None:
    """Raises InvalidRequest where a shard would hold more pages than it may, with the numbers and what to do."""
    lacking = []
    for status in statuses:
        more, limit = grown.get(status.info.shard, 0), status.page_limit_bytes
        free = max(0, limit - status.num_bytes)
        if status.state == "ready" and limit and more > free:
            lacking.append(
                f"shard {status.info.shard} would need {more / _MIB:,.1f} MiB more and has {free / _MIB:,.1f} MiB free "
                f"of {limit / _MIB:,.1f} MiB"
            )
    if lacking:
        raise InvalidRequest(
            f"the tables do not fit on so few shards: {'; '.join(lacking)}. Nothing was moved. Use more shards, give "
            "shards more memory (shard.memory in the config, then mempool down and up), or drop a table"
        )
