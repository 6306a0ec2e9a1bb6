"""What kernels take and return besides tensors: an arena behind its page table, sorted pairs, an optimizer's step.

Shape legend of the package: B bags, L pairs in all bags, R arena rows, W arena row width, P pages, U distinct rows,
H heads, K top-k, D key dim, n half-keys of a codebook, M rows of scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]

#: Names of the state tensors each algorithm keeps, in the order in which kernels take them.
STATE_NAMES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("row_sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
}

ALGORITHMS: tuple[Algorithm, ...] = ("sgd", "adagrad", "rowwise_adagrad", "adam")

STORAGE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Paged:
    """One arena seen through its page table.

    The row of slot ``id`` is ``page_table[id >> page_shift] << page_shift | id & (2**page_shift - 1)``, in int64.
    A slot whose page is -1, or whose id lies outside the page table, is *not here*: kernels read it as zeros and
    never write it. Refusing ids outside the table is the work of whoever received them.

    Attributes:
        rows: [R, W] float32 or bfloat16, contiguous: the arena.
        page_table: [P] int32, contiguous, logical page -> arena page, -1 if not here. No arena page appears twice.
        page_shift: log2 of the slots of a page.

    Raises:
        ValueError: A tensor has another shape, dtype, layout or device.
    """

    rows: Tensor
    page_table: Tensor
    page_shift: int

    def __post_init__(self) -> None:
        rows, table = self.rows, self.page_table
        if rows.dim() != 2 or rows.dtype not in STORAGE_DTYPES or not rows.is_contiguous():
            raise ValueError(
                f"rows must be a contiguous [R, W] float32 or bfloat16 tensor, got {rows.dtype} {list(rows.shape)}"
                f" with strides {rows.stride()}"
            )
        if table.dim() != 1 or table.dtype != torch.int32 or not table.is_contiguous():
            raise ValueError(f"page_table must be a contiguous [P] int32 tensor, got {table.dtype} {list(table.shape)}")
        if table.device != rows.device:
            raise ValueError(f"rows are on {rows.device} but page_table is on {table.device}; put both on one device")
        if not 0 <= self.page_shift <= 40:
            raise ValueError(f"page_shift must lie in 0..40, got {self.page_shift}")


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """Pairs in the canonical order of a commit: by slot id, and within a slot in the order they were given.

    Attributes:
        order: [L'] int64, positions in the ids that were sorted; pairs that are not here are left out.
        rows: [U] int64, the distinct arena rows, by slot id ascending.
        starts: [U + 1] int64, the pairs of ``rows[u]`` are ``order[starts[u]:starts[u + 1]]``.
    """

    order: Tensor
    rows: Tensor
    starts: Tensor


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One commit's optimizer step, with the arithmetic of torch's own sparse optimizers.

    Attributes:
        algorithm: Which rule; see STATE_NAMES for the state it keeps.
        lr: Learning rate.
        grad_scale: Multiplies every summed gradient first (clipping, unscaling, mean over ranks).
        step: Number of this commit, from 1; the step of Adam's bias correction and of Adagrad's learning rate decay.
        eps: Added to the square root, as torch.optim.Adagrad and torch.optim.SparseAdam add it.
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.
        lr_decay: Adagrad's learning rate decay.
        block_dim: Columns of a block; row-wise state is per (row, block). The last block may be narrower.

    Raises:
        ValueError: Unknown algorithm, step below 1, or block_dim below 1.
    """

    algorithm: Algorithm
    lr: float
    grad_scale: float = 1.0
    step: int = 1
    eps: float = 1e-10
    beta1: float = 0.9
    beta2: float = 0.999
    lr_decay: float = 0.0
    block_dim: int = 64

    def __post_init__(self) -> None:
        if self.algorithm not in STATE_NAMES:
            raise ValueError(f"unknown optimizer algorithm {self.algorithm!r}; known: {', '.join(STATE_NAMES)}")
        if self.step < 1:
            raise ValueError(f"step counts commits from 1, got {self.step}")
        if self.block_dim < 1:
            raise ValueError(f"block_dim must be at least 1, got {self.block_dim}")

    @property
    def step_size(self) -> float:
        """What multiplies the update: the decayed learning rate, with Adam's bias corrections folded in."""
        if self.algorithm in ("adagrad", "rowwise_adagrad"):
            return self.lr / (1.0 + (self.step - 1) * self.lr_decay)
        if self.algorithm == "adam":
            return self.lr * math.sqrt(1.0 - self.beta2**self.step) / (1.0 - self.beta1**self.step)
        return self.lr


def num_blocks(width: int, block_dim: int) -> int:
    """Number of column blocks in a row of ``width`` columns."""
    return -(-width // block_dim)
