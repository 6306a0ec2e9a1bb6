"""What a table's pages weigh: bytes of rows, pages and keys by schema alone. Which shard has them is for placement."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mempool.types.schema import (
    ELEMENT_BYTES,
    Algorithm,
    FlatKeySpec,
    OptimizerSpec,
    Placement,
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
        first: 1 where block 0 is among them: flat keys lie beside it.
        padded: With what fills up a row of one-byte elements; without it, what more blocks add to a row.
    """
    per_element, per_block = state_numbers(schema.optimizer)
    values = width * ELEMENT_BYTES[schema.dtype]
    if schema.packed and not padded:
        values = values + 4 * blocks
    elif schema.packed:  # elements, then scales, filled up to 16 bytes
        values = -(-(-(-width // 4) * 4 + 4 * blocks) // 16) * 16
    keys = 4 * schema.keys.key_dim * first if isinstance(schema.keys, FlatKeySpec) else 0 * first
    return values + 4 * (per_element + schema.master) * width + 4 * per_block * blocks + keys


def row_page_bytes(schema: TableSchema) -> int:
    """Bytes of one row page with all its blocks: the most that must travel in one message when it moves."""
    return schema.page_slots * slot_bytes(schema, width=schema.value_dim, blocks=schema.num_blocks, first=1)


def key_page_bytes(schema: TableSchema) -> int:
    """Bytes of one head's product keys; 0 without."""
    return 4 * schema.stride * schema.keys.key_dim if isinstance(schema.keys, ProductKeySpec) else 0


def owned_bytes(schema: TableSchema, placement: Placement, shard: int) -> int:
    """Bytes of all that a placement gives a shard, its page tables (4 bytes a row page) left out."""
    owned_PC = (placement.owners == shard).astype(np.int64)
    starts = np.arange(schema.num_blocks, dtype=np.int64) * schema.block_dim
    width_C = np.minimum(schema.block_dim, schema.value_dim - starts)
    rows_P = slot_bytes(schema, width=owned_PC @ width_C, blocks=owned_PC.sum(axis=1), first=owned_PC[:, 0])
    heads = int((placement.key_owners == shard).sum())
    return schema.page_slots * int(rows_P.sum()) + heads * key_page_bytes(schema)
