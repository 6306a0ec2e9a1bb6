"""What a table's pages weigh: bytes of rows, pages and keys by schema alone. Which shard has them is for placement."""

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mempool.types.schema import (
    ELEMENT_BYTES,
    Algorithm,
    FlatKeySpec,
    OptimizerSpec,
    ProductKeySpec,
    TableSchema,
)

NumbersT = TypeVar("NumbersT", int, npt.NDArray[np.int64])

_STATE: dict[Algorithm, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("row_sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "rowwise_adam": ("exp_avg", "row_exp_avg_sq"),
}
"""What an optimizer keeps in float32: "row_..." per (slot, block), the others per element."""

MAX_PAGES = 2**20
"""(row page, block) pages: each costs four bytes in the controller, every shard and client, and in each new view."""
MAX_PAGE_SLOTS = 2**20

_PAGE_BYTES = 64 * 2**20
"""Pages are at most so large unless asked for: as much as one round of a move carries."""

PAGE_TABLE_BYTES = 12
"""Of every row page of a table, in each arena, whether the page is there or not: where it lies, and when it was last
written to."""


USAGE_BYTES = 16
"""Of a slot whose use is counted, beside block 0: how often, and when last."""


def state_names(optimizer: OptimizerSpec) -> tuple[str, ...]:
    """What an optimizer keeps beside an array, by torch's names; "row_..." has one number per (slot, block)."""
    return ("momentum_buffer",) if optimizer.momentum > 0.0 else _STATE[optimizer.algorithm]


def state_numbers(optimizer: OptimizerSpec) -> tuple[int, int]:
    """Numbers of four bytes that an optimizer keeps beside the values: per element, and per (slot, block)."""
    names = state_names(optimizer)
    per_block = sum(name.startswith("row_") for name in names)
    return len(names) - per_block, per_block + optimizer.dense


def slot_bytes(
    schema: TableSchema, *, width: NumbersT, blocks: NumbersT, first: NumbersT, padded: bool = True
) -> NumbersT:
    """Bytes of one slot's row in all arrays where a shard owns some of its blocks; of many rows where given arrays.

    Args:
        schema: The table.
        width: Columns of those blocks together.
        blocks: How many they are.
        first: 1 where block 0 is among them: flat keys and counts of use lie beside it.
        padded: With what fills up a row of one-byte elements; without it, what more blocks add to a row.
    """
    per_element, per_block = state_numbers(schema.optimizer)
    values = width * ELEMENT_BYTES[schema.dtype]
    if schema.packed and not padded:
        values = values + 4 * blocks
    elif schema.packed:  # elements, then scales, filled up to 16 bytes
        values = -(-(-(-width // 4) * 4 + 4 * blocks) // 16) * 16
    keys = 4 * schema.keys.key_dim * first if isinstance(schema.keys, FlatKeySpec) else 0 * first
    beside = keys + USAGE_BYTES * schema.usage * first
    return values + 4 * (per_element + schema.master) * width + 4 * per_block * blocks + beside


def row_page_bytes(schema: TableSchema) -> int:
    """Bytes of one row page with all its blocks: the most that must travel in one message when it moves."""
    return schema.page_slots * slot_bytes(schema, width=schema.value_dim, blocks=schema.num_blocks, first=1)


def default_page_slots(schema: TableSchema) -> int:
    """About 64 pages for small tables, so that they spread; large pages for large ones, so that they are few.

    Smaller where rows are wide, so that a page moves soon; larger where there would be too many. schema: Of pages of
    one slot.
    """
    next_power = 1 << (-(-schema.num_slots // 64) - 1).bit_length()
    page_slots = min(4096, max(16, next_power))
    while page_slots > 1 and page_slots * row_page_bytes(schema) > _PAGE_BYTES:
        page_slots //= 2
    while -(-schema.num_slots // page_slots) * schema.num_blocks > MAX_PAGES and page_slots < MAX_PAGE_SLOTS:
        page_slots *= 2
    return page_slots


def num_pages(schema: TableSchema) -> int:
    """Row pages by blocks, and key pages: what a placement names an owner of each."""
    return schema.num_row_pages * schema.num_blocks + schema.num_key_pages


def key_page_bytes(schema: TableSchema) -> int:
    """Bytes of one head's product keys; 0 without."""
    return 4 * math.isqrt(schema.num_slots) * schema.keys.key_dim if isinstance(schema.keys, ProductKeySpec) else 0


def owned_bytes(schema: TableSchema, row_pages: Mapping[tuple[int, ...], int], *, heads: int) -> int:
    """Bytes that pages take on a shard that had none of the table: as it says of itself, page tables and all.

    Args:
        schema: The table.
        row_pages: How many row pages it has of each set of blocks, ascending.
        heads: How many key pages.
    """
    num_bytes = heads * key_page_bytes(schema)
    for blocks, count in row_pages.items():
        row_bytes = slot_bytes(schema, width=schema.width(blocks), blocks=len(blocks), first=int(0 in blocks))
        num_bytes += count * schema.page_slots * row_bytes + PAGE_TABLE_BYTES * schema.num_row_pages
    return num_bytes


def bytes_by_owner(
    schema: TableSchema, owners: npt.NDArray[np.int32], key_owners: npt.NDArray[np.int32]
) -> dict[int, int]:
    """Bytes that each shard holds of a table under an assignment, page tables and what fills up packed rows left out.

    Args:
        schema: The table.
        owners: [num_row_pages, num_blocks], shard ids.
        key_owners: [num_key_pages], shard ids.
    """
    columns = [schema.block_columns(block) for block in range(schema.num_blocks)]
    page_C = [
        schema.page_slots * slot_bytes(schema, width=stop - start, blocks=1, first=int(block == 0), padded=False)
        for block, (start, stop) in enumerate(columns)
    ]
    shards, place = np.unique(owners, return_inverse=True)
    weights = np.broadcast_to(np.array(page_C, dtype=np.float64), owners.shape)
    held = np.bincount(place.reshape(-1), weights=weights.reshape(-1), minlength=shards.size)
    found = dict(zip(shards.tolist(), map(int, held), strict=True))
    for shard in key_owners.tolist():
        found[shard] = found.get(shard, 0) + key_page_bytes(schema)
    return dict(sorted(found.items()))
