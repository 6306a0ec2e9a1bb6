"""The plan of a table, by its schema and its placement."""

from collections.abc import Sequence

from mempool.placement.assignment import Assignment
from mempool.placement.heat import FloatArray
from mempool.placement.planner import plan
from mempool.types import Placement, TableSchema


def assignment_of(placement: Placement) -> Assignment:
    """Which shard owns which page there."""
    return Assignment(owners=placement.owners, key_owners=placement.key_owners)


def plan_table(
    schema: TableSchema, present: Assignment | None, shards: Sequence[int], heat: FloatArray | None = None
) -> Assignment:
    """As ``plan``, of this table; present: None for a new one."""
    return plan(
        present,
        shards,
        num_row_pages=schema.num_row_pages,
        num_blocks=schema.num_blocks,
        num_key_pages=schema.num_key_pages,
        layout=schema.layout,
        heat=heat,
    )
