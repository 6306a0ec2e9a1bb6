"""What a table is (schema) and where its pages are (placement)."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Layout = Literal["auto", "columns", "rows", "grid"]
StorageDtype = Literal["float32", "bfloat16", "float8_e4m3fn", "int8"]
Rounding = Literal["stochastic", "nearest"]
Algorithm = Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "adamw", "rowwise_adam"]

ELEMENT_BYTES: dict[StorageDtype, int] = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
"""Bytes of one element of a value; elements of one byte have a float32 scale per column block beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """The optimizer a table's shards run, with torch's names and meanings of its hyper-parameters.

    Attributes:
        weight_decay: Added to the gradient, times the values; with ``decoupled_weight_decay``, and for AdamW, values
            are first multiplied by 1 - lr * weight_decay.
        dense: AdamW of every slot at every step, as torch.optim.AdamW on the whole table; otherwise, as all others do,
            of slots that have a gradient only.
        momentum, dampening, nesterov: SGD's; the momentum of a slot rests while it has no gradient.
        corrected_eps: Adam and row-wise Adam add eps after the bias correction, as torch.optim.Adam and FBGEMM; False:
            before it, as torch.optim.SparseAdam.
        max_norm: Slots whose value has a larger 2-norm after a step are scaled to it; None bounds nothing. Of tables
            with one column block.
    """

    algorithm: Algorithm
    lr: float
    eps: float = 1e-10
    beta1: float = 0.9
    beta2: float = 0.999
    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    weight_decay: float = 0.0
    dense: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    decoupled_weight_decay: bool = False
    corrected_eps: bool = False
    max_norm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductKeySpec:
    """Product keys kept in the pool: per head two codebooks of n half-keys of key_dim / 2, n * n = num_slots.

    deterministic: Scores are summed in a fixed order: a query has the same bits alone and in any batch.
    """

    heads: int
    key_dim: int
    deterministic: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatKeySpec:
    """One key per slot, kept beside the slot's first column block. deterministic: As above, and for any shards."""

    key_dim: int
    deterministic: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedKeySpec:
    """Keys that are trained in the pool: the rows of a table of their own, ``types.keys.key_table``.

    Attributes:
        key_dim: Width of a query of one head.
        optimizer: What the shards run on the keys at each commit.
        product: Product keys, as of ``ProductKeySpec``, or of more parts than two; otherwise flat or hierarchical keys.
        heads: Of product keys; others have 1.
        ways: Parts of a product key, each of a codebook of n, n the least with n ** ways >= num_slots. Others leave it.
        groups: Of hierarchical keys, which have one beside each slot's; 0: they are none.
        probes: Groups that a query looks into; 0 without.
    """

    key_dim: int
    optimizer: OptimizerSpec
    product: bool = False
    heads: int = 1
    ways: int = 2
    groups: int = 0
    probes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnKeySpec:
    """The values of the table are keys, of another table: queries are scored against them.

    Attributes:
        sections: Its slots are so many ranges of equal length, of whole pages; each query is for one of them.
        rows: The slots of a section that are keys, from its first on; those after them fill its last page up.
        ways: Sections of a head, as many as its keys have parts. Of one section it means nothing.
        groups: So many of the rows, of one section, are keys of groups, each before those of its slots
            (``types.keys.Grouping``): hierarchical keys. 0: none are.
    """

    sections: int
    rows: int
    ways: int = 2
    groups: int = 0


KeySpec = ProductKeySpec | FlatKeySpec | TrainedKeySpec | OwnKeySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSchema:
    """Everything about a table that placement does not change.

    Attributes:
        table_id: Unique in the pool's life and never used again, so that a new table of an old name is another table.
        stride: The root of num_slots, 0 where that is no square. With product keys that nobody trains a slot id is
            ``i1 * stride + i2``.
        block_dim: Width of a column block; the last may be narrower.
        page_slots: Slots of a page, a power of two; the last page may have slots that are never used.
        dtype: What values are stored as; float8_e4m3fn and int8 with a float32 scale per (slot, block).
        rounding: How a step's results are rounded to ``dtype``; "nearest" where there is nothing to choose (float32, or
            a master).
        master: Float32 values are kept beside those stored, and trained; the stored ones are rounded from them.
        seed, init_std: Initial values are N(0, init_std^2), a function of (seed, slot, column) alone.
        usage: It is counted how often each slot is trained, and kept when last.
    """

    table_id: int
    name: str
    num_slots: int
    value_dim: int
    block_dim: int
    page_slots: int
    dtype: StorageDtype
    seed: int
    init_std: float
    stride: int
    layout: Layout
    optimizer: OptimizerSpec
    keys: KeySpec | None = None
    rounding: Rounding = "nearest"
    master: bool = False
    usage: bool = False

    @property
    def packed(self) -> bool:
        """Whether values are stored as elements of one byte with scales."""
        return ELEMENT_BYTES[self.dtype] == 1

    @property
    def num_row_pages(self) -> int:
        return -(-self.num_slots // self.page_slots)

    @property
    def num_blocks(self) -> int:
        return -(-self.value_dim // self.block_dim)

    @property
    def num_key_pages(self) -> int:
        """Key pages of their own: one per head with product keys, none otherwise."""
        return self.keys.heads if isinstance(self.keys, ProductKeySpec) else 0

    @property
    def page_shift(self) -> int:
        return self.page_slots.bit_length() - 1

    def block_columns(self, block: int) -> tuple[int, int]:
        """First column of a block and the one after its last."""
        start = block * self.block_dim
        return start, min(start + self.block_dim, self.value_dim)

    def width(self, blocks: tuple[int, ...]) -> int:
        """Columns of these blocks, ascending, together."""
        lacking = self.num_blocks * self.block_dim - self.value_dim if blocks[-1:] == (self.num_blocks - 1,) else 0
        return len(blocks) * self.block_dim - lacking


def default_rounding(dtype: StorageDtype, *, master: bool) -> Rounding:
    """Stochastic where small steps would otherwise be lost: values in fewer bits than float32, without a master."""
    return "nearest" if dtype == "float32" or master else "stochastic"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Which shard owns which page of one table; each change of it has a higher epoch.

    Attributes:
        owners: [num_row_pages, num_blocks] int32, shard ids.
        key_owners: [num_key_pages] int32, shard ids.
    """

    table_id: int
    epoch: int
    owners: npt.NDArray[np.int32]
    key_owners: npt.NDArray[np.int32]
    _shards: tuple[int, ...] | None = field(default=None, init=False, repr=False)

    def same_owners(self, other: "Placement") -> bool:
        """Whether every page has the same owner in both."""
        return np.array_equal(self.owners, other.owners) and np.array_equal(self.key_owners, other.key_owners)

    @property
    def shards(self) -> tuple[int, ...]:
        """Every shard that owns something of the table, ascending. Looked for once: steps ask, and pages are many."""
        if self._shards is None:
            found = tuple(int(shard) for shard in np.union1d(self.owners, self.key_owners))
            object.__setattr__(self, "_shards", found)
            return found
        return self._shards
