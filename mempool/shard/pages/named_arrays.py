"""The named arrays of a table's pages: what a row has in each, where a block's columns lie in it, what it holds first.

What belongs to a trainable array is named `<array>.<what>`: its optimizer state, master, scales and last step. Knows no
storage. Work is linear in the columns asked for, whatever the number of blocks.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.steps.optimizers import state_arrays
from mempool.types import FlatKeySpec, ProductKeySpec, TableSchema
from mempool.types.keys.key_table import key_seed

Blocks = tuple[int, ...]
"""Column blocks, ascending."""

Columns = npt.NDArray[np.int64]

VALUES = "values"
SCALES = f"{VALUES}.scales"
MASTER = f"{VALUES}.{kernels.MASTER}"
LAST_STEP = f"{VALUES}.{kernels.LAST_STEP}"
USES = f"{VALUES}.uses"
LAST_USE = f"{VALUES}.last_use"
KEYS = "keys"
HEAD_KEYS = "head_keys"

VALUE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float32,
    "int8": torch.float32,
}
"""What values are read and written as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedArray:
    """One array of the rows of an arena.

    Attributes:
        per: "element": as wide as the values; "block": one column per block; "slot": ``columns``, kept with block 0
            only.
        initial: What a new row holds; None: drawn from the generator.
        columns: Of an array per slot.
    """

    name: str
    per: Literal["element", "block", "slot"]
    dtype: torch.dtype
    initial: float | None
    schema: TableSchema
    columns: int = 0

    def width(self, blocks: Blocks) -> int:
        """Columns of these blocks together."""
        if self.per == "block":
            return len(blocks)
        if self.per == "slot":
            return self.columns if blocks[:1] == (0,) else 0
        return self.schema.width(blocks)

    def places(self, blocks: Blocks, among: Blocks) -> Columns:
        """Where the columns of ``blocks`` stand in a row of the blocks ``among``, of which they are some."""
        if self.per == "slot":
            return np.arange(self.width(blocks), dtype=np.int64)
        where = np.searchsorted(np.asarray(among, dtype=np.int64), np.asarray(blocks, dtype=np.int64))
        if self.per == "block":
            return where.astype(np.int64)
        ends = np.cumsum(_block_widths(self.schema, among))
        widths = _block_widths(self.schema, blocks)
        starts = ends[where] - widths
        within = np.arange(int(widths.sum()), dtype=np.int64) - np.repeat(np.cumsum(widths) - widths, widths)
        return np.repeat(starts, widths) + within

    def copies(self, blocks: Blocks, *, into: Blocks, out_of: Blocks) -> list[tuple[slice, slice]]:
        """The columns of ``blocks`` in rows of ``into`` and in rows of ``out_of``, as pairs of ranges: as few as go."""
        to, taken = self.places(blocks, into), self.places(blocks, out_of)
        if not len(to):
            return []
        cuts = np.flatnonzero((np.diff(to) != 1) | (np.diff(taken) != 1)) + 1
        firsts, lasts = np.append(0, cuts), np.append(cuts, len(to)) - 1
        return [
            (slice(int(to[first]), int(to[last]) + 1), slice(int(taken[first]), int(taken[last]) + 1))
            for first, last in zip(firsts, lasts, strict=True)
        ]


def named_arrays(schema: TableSchema) -> tuple[NamedArray, ...]:
    """All arrays of the table's row pages, values first."""
    dtype = torch.uint8 if schema.packed else VALUE_DTYPES[schema.dtype]
    arrays = [NamedArray(name=VALUES, per="element", dtype=dtype, initial=None, schema=schema)]
    if schema.packed:
        arrays.append(NamedArray(name=SCALES, per="block", dtype=torch.float32, initial=None, schema=schema))
    if schema.master:
        arrays.append(NamedArray(name=MASTER, per="element", dtype=torch.float32, initial=None, schema=schema))
    arrays += [
        NamedArray(
            name=f"{VALUES}.{state.name}", per=state.per, dtype=state.dtype, initial=state.initial, schema=schema
        )
        for state in state_arrays(schema.optimizer)
    ]
    if schema.usage:
        arrays += [
            NamedArray(name=name, per="slot", dtype=torch.int64, initial=0, schema=schema, columns=1)
            for name in (USES, LAST_USE)
        ]
    if isinstance(schema.keys, FlatKeySpec):
        width = key_dim(schema)
        arrays.append(
            NamedArray(name=KEYS, per="slot", dtype=torch.float32, initial=None, schema=schema, columns=width)
        )
    return tuple(arrays)


def packed_layout(schema: TableSchema, blocks: Blocks) -> kernels.PackedLayout | None:
    """How rows of these blocks lie where elements are one byte; None for others."""
    if schema.dtype == "float8_e4m3fn" or schema.dtype == "int8":
        return kernels.PackedLayout(schema.dtype, width=schema.width(blocks), block_dim=schema.block_dim)
    return None


def packed_sums(schema: TableSchema, blocks: Blocks) -> kernels.PackedLayout | None:
    """How sums over these blocks, and their gradients, lie in packed rows, whatever the values are stored as; None of
    no blocks."""
    if not blocks:
        return None
    return kernels.PackedLayout("float8_e4m3fn", width=schema.width(blocks), block_dim=schema.block_dim)


def row_bytes(schema: TableSchema, blocks: Blocks) -> int:
    """Bytes of one slot's row of these blocks in all arrays, padding included; 0 of no blocks: of keys alone."""
    if not blocks:
        return 0
    packed = packed_layout(schema, blocks)
    return sum(
        array.width(blocks) * array.dtype.itemsize
        for array in named_arrays(schema)
        if packed is None or array.name not in (VALUES, SCALES)
    ) + (0 if packed is None else packed.row_bytes)


def key_dim(schema: TableSchema) -> int:
    """Width of a flat key, or of both half-keys of a product key together; 0 where none are kept beside the values."""
    return schema.keys.key_dim if isinstance(schema.keys, FlatKeySpec | ProductKeySpec) else 0


def half_keys(schema: TableSchema) -> int:
    """n: half-keys of each codebook of a head; n * n = num_slots."""
    return math.isqrt(schema.num_slots)


def head_keys_shape(schema: TableSchema) -> tuple[int, int, int]:
    """(2, n, key_dim / 2): the product keys of one head; without product keys (2, 0, 0)."""
    return (2, half_keys(schema), key_dim(schema) // 2) if schema.num_key_pages else (2, 0, 0)


def initial_columns(array: NamedArray, slots: range, first: int, end: int) -> Tensor:
    """What rows of these slots hold at first, where it is drawn from the generator.

    Args:
        array: One with ``initial`` None.
        slots: Consecutive.
        first: The first of the table's columns; of flat keys, the first of the key's.
        end: The one after the last.

    Returns:
        [len(slots), end - first] float32, the same numbers however they are cut.
    """
    if array.per == "slot":
        return _initial_keys(array.schema, slots, first, end)
    return kernels.initial_values(array.schema.seed, slots.start, len(slots), first, end - first, array.schema.init_std)


def initial_head_keys(schema: TableSchema, head: int, rows: range) -> Tensor:
    """[len(rows), key_dim / 2] float32: half-keys of one head, ``half * n + i``, drawn as rows ``head * 2n`` and on."""
    assert isinstance(schema.keys, ProductKeySpec)
    first = head * 2 * half_keys(schema)
    return _initial_keys(schema, range(first + rows.start, first + rows.stop), 0, schema.keys.key_dim // 2)


def _initial_keys(schema: TableSchema, rows: range, first: int, end: int) -> Tensor:
    return kernels.initial_values(
        key_seed(schema.seed), rows.start, len(rows), first, end - first, 1.0 / math.sqrt(key_dim(schema))
    )


def _block_widths(schema: TableSchema, blocks: Blocks) -> Columns:
    """The width of each block."""
    starts = np.asarray(blocks, dtype=np.int64) * schema.block_dim
    return np.minimum(schema.block_dim, schema.value_dim - starts)
