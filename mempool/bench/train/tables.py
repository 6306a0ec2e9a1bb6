"""Tables trained by ``gather``, ``backward``, ``commit``: a pool's as it is; values here, others', behind the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import mempool
from mempool import kernels
from mempool.bench import peers
from mempool.bench.cases.inputs import Tables
from mempool.bench.serve.contenders.pools import Layout
from mempool.bench.serve.shapes import TableSize
from mempool.config import SGD, Adagrad, Optimizer
from mempool.kernels import OptimizerStep, Paged

#: Large enough for changes of a value to stand out of the rounding of the value itself.
LEARNING_RATE = 0.1
EPS = 1e-8
#: Of Adagrad, where its rule is well-conditioned.
FIRST_SUM = 1.0
ALGORITHMS = ("sgd", "adagrad")
_PAGE_SHIFT = 12


class Trainable(Protocol):
    """What a step needs of a table; ``mempool.Table`` is one."""

    def gather(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Sums [B, W] of ids and weights [B, K], differentiable in weights and, by ``commit``, in the values."""

    def commit(self) -> object:
        """One optimizer step with what backward passes have brought."""

    def rows(self, ids: Tensor) -> Tensor:
        """Values [M, W] of ids [M]."""


def optimizer(algorithm: str) -> Optimizer:
    """As a pool's table asks for it."""
    if algorithm == "sgd":
        return SGD(LEARNING_RATE)
    return Adagrad(LEARNING_RATE, eps=EPS, initial_accumulator_value=FIRST_SUM)


def pool_table(
    pool: mempool.Pool,
    size: TableSize,
    algorithm: str,
    *,
    name: str = "facts",
    layout: Layout = "auto",
    block_dim: int | None = None,
) -> mempool.Table:
    """The table, made in a pool."""
    table = pool.create_table(
        mempool.TableConfig(
            name=name, num_slots=size.num_slots, value_dim=size.value_dim, optimizer=optimizer(algorithm),
            layout=layout, block_dim=block_dim,
        )
    )  # fmt: skip
    size.write(table.write)
    return table


@dataclass(frozen=True)
class Memory:
    """Values and optimizer state in this process, which several tables may share."""

    size: TableSize
    rows: Tensor
    state: dict[str, Tensor]
    step: OptimizerStep

    @classmethod
    def of(cls, size: TableSize, algorithm: str) -> Memory:
        """New memory, in huge pages where the system has them; filled."""
        tables = Tables("cpu", size.seed)
        step = OptimizerStep(
            "sgd" if algorithm == "sgd" else "adagrad", lr=LEARNING_RATE, eps=EPS, block_dim=size.value_dim
        )
        names = kernels.STATE_NAMES[step.algorithm]
        shape = (size.num_slots, size.value_dim)
        made = cls(
            size,
            tables.empty(*shape, torch.float32),
            {name: tables.empty(*shape, torch.float32) for name in names},
            step,
        )
        made.fill()
        return made

    def fill(self) -> None:
        """As at the start."""
        self.size.fill(self.rows)
        for tensor in self.state.values():
            tensor.fill_(FIRST_SUM)


class LocalTable:
    """The product's kernels on values of this process: what a step takes without a pool."""

    def __init__(self, memory: Memory) -> None:
        shift = max(0, min(_PAGE_SHIFT, memory.size.num_slots.bit_length() - 3))
        pages = torch.arange(-(-memory.size.num_slots >> shift), dtype=torch.int32)
        self._memory = memory
        self._paged = Paged(memory.rows, pages, shift)
        self._pending: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def gather(self, ids: Tensor, weights: Tensor) -> Tensor:
        summed: Tensor = _Sum.apply(weights, ids, self)  # type: ignore[no-untyped-call]
        return summed

    def commit(self) -> None:
        if self._pending is not None:
            ids, weights, bags, grads = self._pending
            self._pending = None
            ordered = kernels.sort_pairs(self._paged, ids)
            memory = self._memory
            kernels.fused_step(self._paged, memory.state, ordered, weights, bags, grads, memory.step)

    def rows(self, ids: Tensor) -> Tensor:
        return self._memory.rows[ids]

    def summed(self, ids: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """[TRAINER] forward."""
        return kernels.weighted_sum(self._paged, ids, weights, offsets)

    def weight_gradient(self, ids: Tensor, weights: Tensor, offsets: Tensor, grads: Tensor) -> Tensor:
        """[TRAINER] backward: the values' own gradient waits for ``commit``."""
        bags = torch.repeat_interleave(torch.arange(grads.shape[0]), offsets.diff())
        self._pending = (ids, weights, bags, grads)
        return kernels.weight_gradient(self._paged, ids, offsets, grads)


class _Sum(torch.autograd.Function):
    """A gather of a table here."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, ids: Tensor, table: LocalTable) -> Tensor:
        bags, size = ids.shape
        ctx.table, ctx.shape = table, weights.shape
        ctx.pairs = (ids.flatten(), weights.detach().flatten(), torch.arange(0, bags * size + 1, size))
        return table.summed(*ctx.pairs)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.table.weight_gradient(*ctx.pairs, grads.contiguous()).view(ctx.shape), None, None


class PeerTable:
    """Another library's bags on shared memory."""

    def __init__(
        self, memory: Memory, bags: Callable[[Tensor, Tensor, Tensor], Tensor], step: Callable[[], object] | None = None
    ) -> None:
        self._memory, self._bags, self._step = memory, bags, step

    def gather(self, ids: Tensor, weights: Tensor) -> Tensor:
        bags, size = ids.shape
        return self._bags(ids.flatten(), torch.arange(0, bags * size + 1, size), weights.flatten())

    def commit(self) -> None:
        if self._step is not None:
            self._step()

    def rows(self, ids: Tensor) -> Tensor:
        return self._memory.rows[ids]


def torch_table(memory: Memory) -> PeerTable:
    """torch's EmbeddingBag with sparse gradients, and its optimizer for them."""
    theirs = peers.torch_update(memory.rows, memory.state, memory.step)
    optimizer: Any = theirs.optimizer

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return PeerTable(memory, theirs.bag, step)


def fbgemm_table(memory: Memory) -> PeerTable:
    """FBGEMM's CPU build, whose backward pass has the optimizer in it."""
    return PeerTable(memory, peers.fbgemm(memory.rows, next(iter(memory.state.values()), None), memory.step))
