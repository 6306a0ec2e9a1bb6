"""Whether pages fit where a rescale would put them: a pure comparison of what shards say with what they would own."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mempool.errors import InvalidRequest
from mempool.placement import Assignment
from mempool.types import ShardStatus, TableSchema
from mempool.types.sizes import key_page_bytes, slot_bytes

_MIB = 2**20


def assigned_bytes(schema: TableSchema, assignment: Assignment) -> dict[int, int]:
    """At least how many bytes of a table each of its owners holds under an assignment."""
    widths = [stop - start for start, stop in map(schema.block_columns, range(schema.num_blocks))]
    page_C = np.array(
        [
            schema.page_slots * slot_bytes(schema, width=width, blocks=1, first=int(block == 0), padded=False)
            for block, width in enumerate(widths)
        ],
        dtype=np.float64,
    )
    owners, place = np.unique(assignment.owners, return_inverse=True)
    weights = np.broadcast_to(page_C, assignment.owners.shape)
    held = np.bincount(place.reshape(-1), weights=weights.reshape(-1), minlength=owners.size)
    found = {int(shard): int(num_bytes) for shard, num_bytes in zip(owners, held, strict=True)}
    for shard in assignment.key_owners.tolist():
        found[shard] = found.get(shard, 0) + key_page_bytes(schema)
    return found


def growth(moves: Iterable[tuple[TableSchema, Assignment, Assignment]]) -> dict[int, int]:
    """By how many bytes the pages of each shard grow, or shrink, from the first assignment of a table to the second."""
    change: dict[int, int] = {}
    for schema, present, target in moves:
        before, after = assigned_bytes(schema, present), assigned_bytes(schema, target)
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
