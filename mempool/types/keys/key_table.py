"""The table of the keys that a table trains: its rows are the keys, so that they are summed, updated, stepped, moved
and saved as values are. It is made, dropped, saved and restored with the table whose keys it has.
"""

import math
from dataclasses import replace

from mempool.types.keys.grouping import Grouping
from mempool.types.schema import KeySpec, OwnKeySpec, TableSchema, TrainedKeySpec
from mempool.types.sizes import default_page_slots

_SUFFIX = ":keys"
"""No name of a user's has a colon."""
_SEED = 0x9E3779B97F4A7C15
"""Keys come from the values' generator under another seed: a key is no copy of its value's first columns."""
_LEAST_PAGES = 8
"""Of a section of product keys: what fills its last page up is little beside it."""


def key_table_name(table: str) -> str:
    """The name of the table of a table's keys."""
    return table + _SUFFIX


def is_key_table(schema: TableSchema) -> bool:
    """Whether its values are the keys of another table, which it belongs to."""
    return isinstance(schema.keys, OwnKeySpec)


def key_seed(seed: int) -> int:
    """Of the initial keys of a table of this seed."""
    return (seed ^ _SEED) & (2**63 - 1)


def least_root(num_slots: int, ways: int) -> int:
    """The fewest half-keys n of a codebook with n ** ways >= num_slots."""
    if ways <= 2:
        return num_slots if ways == 1 else math.isqrt(num_slots - 1) + 1
    size: int = round(num_slots ** (1.0 / ways))
    while size**ways < num_slots:
        size += 1
    while (size - 1) ** ways >= num_slots:
        size -= 1
    return size


def grouping_of(keys: KeySpec | None, num_slots: int) -> Grouping | None:
    """How hierarchical keys group slots; None of other keys, and of none.

    Args:
        keys: Of a table, or of the table of its keys.
        num_slots: Of the table that says so.
    """
    if isinstance(keys, TrainedKeySpec) and keys.groups:
        return Grouping(num_slots, keys.groups)
    if isinstance(keys, OwnKeySpec) and keys.groups:
        return Grouping(num_slots - keys.groups, keys.groups)
    return None


def key_table(schema: TableSchema) -> TableSchema | None:
    """The schema of the table of a table's keys, ``table_id`` 0; None where it trains none.

    Flat keys: the row of slot i is its key. Hierarchical keys: rows as ``Grouping`` has them. Product keys: section
    ``ways * head + part`` has the n half-keys of that part, in order. Sections begin with a page, so that a shard
    scores each by its own part of the page table.
    """
    keys = schema.keys
    if not isinstance(keys, TrainedKeySpec):
        return None
    ways = keys.ways if keys.product else 1
    grouping = grouping_of(keys, schema.num_slots)
    sections = ways * keys.heads if keys.product else 1
    rows = least_root(schema.num_slots, ways) if grouping is None else grouping.num_rows
    width = keys.key_dim // ways
    made = replace(
        schema,
        table_id=0,
        name=key_table_name(schema.name),
        num_slots=sections * rows,
        value_dim=width,
        block_dim=width,
        page_slots=1,
        dtype="float32",
        seed=key_seed(schema.seed),
        init_std=1.0 / math.sqrt(keys.key_dim),
        layout="rows",
        optimizer=keys.optimizer,
        keys=OwnKeySpec(sections=sections, rows=rows, ways=keys.ways, groups=keys.groups),
        rounding="nearest",
        master=False,
        usage=False,
    )
    page_slots = default_page_slots(made)
    if sections > 1:
        page_slots = min(page_slots, 1 << (max(1, rows // _LEAST_PAGES).bit_length() - 1))
    num_slots = sections * -(-rows // page_slots) * page_slots if sections > 1 else rows
    root = math.isqrt(num_slots)
    return replace(made, num_slots=num_slots, page_slots=page_slots, stride=root if root * root == num_slots else 0)
