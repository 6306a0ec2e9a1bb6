"""The named arrays of row pages: what columns each block has in each of them, and what they hold at first.

Storage itself is in ``arena``; product keys, which are pages of their own, are in ``table``.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.optimizers import state_arrays
from mempool.types import FlatKeySpec, ProductKeySpec, TableSchema

Blocks = tuple[int, ...]

VALUES = "values"
KEYS = "keys"
HEAD_KEYS = "head_keys"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_KEY_STREAM = 0x9E3779B97F4A7C15
"""Keys come from the values' generator under another seed: a key is no copy of its value's first columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedArray:
    """One array of the rows of an arena.

    Attributes:
        per: "element": as wide as the values; "block": one column per block; "slot": ``key_dim`` columns, kept with
            block 0 only.
        initial: What a new row holds; None: drawn from the generator.
    """

    name: str
    per: Literal["element", "block", "slot"]
    dtype: torch.dtype
    initial: float | None
    schema: TableSchema

    def columns(self, blocks: Blocks, block: int) -> slice:
        """The columns of one block among those of ``blocks``, which are side by side and ascending."""
        place = blocks.index(block)
        if self.per == "block":
            return slice(place, place + 1)
        if self.per == "slot":
            return slice(0, self.width((block,)))
        start = self.schema.width(blocks[:place])
        return slice(start, start + self.schema.width((block,)))

    def width(self, blocks: Blocks) -> int:
        """Columns of these blocks together."""
        if self.per == "block":
            return len(blocks)
        if self.per == "slot":
            return key_dim(self.schema) if 0 in blocks else 0
        return self.schema.width(blocks)


def named_arrays(schema: TableSchema) -> tuple[NamedArray, ...]:
    """All arrays of the table's row pages, values first."""
    dtype = DTYPES[schema.dtype]
    arrays = [NamedArray(name=VALUES, per="element", dtype=dtype, initial=None, schema=schema)]
    arrays += [
        NamedArray(name=state.name, per=state.per, dtype=torch.float32, initial=state.initial, schema=schema)
        for state in state_arrays(schema.optimizer)
    ]
    if isinstance(schema.keys, FlatKeySpec):
        arrays.append(NamedArray(name=KEYS, per="slot", dtype=torch.float32, initial=None, schema=schema))
    return tuple(arrays)


def key_dim(schema: TableSchema) -> int:
    """Width of a flat key, or of both half-keys of a product key together; 0 without keys."""
    return schema.keys.key_dim if schema.keys is not None else 0


def initial_rows(array: NamedArray, slots: range, block: int) -> Tensor | float:
    """What rows of these slots hold at first in the columns of ``block``: [len(slots), width], or one number."""
    if array.initial is not None:
        return array.initial
    if array.per == "slot":
        return _initial_keys(array.schema, slots, array.schema.keys.key_dim if array.schema.keys else 0)
    first, stop = array.schema.block_columns(block)
    return kernels.initial_values(
        array.schema.seed, slots.start, len(slots), first, stop - first, array.schema.init_std
    )


def initial_head_keys(schema: TableSchema, head: int) -> Tensor:
    """[2, n, key_dim / 2] float32: the product keys of one head, drawn as rows (head * 2 + half) * n + i."""
    assert isinstance(schema.keys, ProductKeySpec)
    n, half_dim = half_keys(schema), schema.keys.key_dim // 2
    rows = range(head * 2 * n, (head + 1) * 2 * n)
    return _initial_keys(schema, rows, half_dim).view(2, n, half_dim)


def half_keys(schema: TableSchema) -> int:
    """n: half-keys of each codebook of a head; n * n = num_slots."""
    return math.isqrt(schema.num_slots)


def _initial_keys(schema: TableSchema, rows: range, width: int) -> Tensor:
    seed = (schema.seed ^ _KEY_STREAM) & (2**63 - 1)
    return kernels.initial_values(seed, rows.start, len(rows), 0, width, 1.0 / math.sqrt(key_dim(schema)))
