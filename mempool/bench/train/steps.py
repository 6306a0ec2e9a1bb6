"""A table's training step (gather, backward, commit) of values here, in pools, in other libraries; gated first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mempool.bench.cases.inputs import distinct, sampled
from mempool.bench.gate import Check
from mempool.bench.serve.shapes import NUM_INPUTS, Shape, TableSize, checked_sums, drawn_pairs
from mempool.bench.serve.shapes import Pairs as Drawn
from mempool.bench.train.measured import GATHER, STEP, Measured, Work, timed
from mempool.bench.train.tables import EPS, FIRST_SUM, LEARNING_RATE, Trainable

_SAMPLED_PAIRS = 24
_SAMPLED_BAGS = 8
#: Of the change of a value, which is much smaller than the value that it is the difference of.
CHANGE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pairs:
    """What one step takes: ids and weights [B, K], of which weights want a gradient, and the gradient of the sums."""

    ids: Tensor
    weights: Tensor
    grads: Tensor


def pairs_of(shape: Shape, size: TableSize, seed: int) -> list[Pairs]:
    """Sets of pairs of a seed."""
    generator = torch.Generator().manual_seed(seed + 1)
    return [
        Pairs(
            pairs.ids,
            pairs.weights.requires_grad_(),
            torch.randn(shape.bags, size.value_dim, generator=generator),
        )
        for pairs in drawn_pairs(shape, size, seed, NUM_INPUTS)
    ]


def step(table: Trainable, pairs: Pairs) -> Tensor | None:
    """Forward, backward, commit; the gradient of the weights."""
    pairs.weights.grad = None
    table.gather(pairs.ids, pairs.weights).backward(pairs.grads)  # type: ignore[no-untyped-call]
    table.commit()
    return pairs.weights.grad


def gather(table: Trainable, pairs: Pairs) -> Tensor:
    """A look-up without a graph."""
    with torch.no_grad():
        return table.gather(pairs.ids, pairs.weights)


def measure(
    shape: Shape,
    size: TableSize,
    algorithm: str,
    tables: Mapping[str, Trainable],
    *,
    before_check: Callable[[], None],
    rounds: int,
    budget_s: float,
    seed: int,
    kind: str = "",
) -> Iterator[Measured]:
    """The gather, and then the step, of tables that hold the same.

    Args:
        shape: Of a step.
        size: Of the tables.
        algorithm: Of "sgd" and "adagrad".
        tables: By contender.
        before_check: Puts values that several of them share back to the start.
        rounds: Rounds to time.
        budget_s: When it is spent, the rounds of one of both end early.
        seed: Of the pairs.
        kind: Before the families' names.

    Raises:
        GateError: A result is wrong: nothing was timed.
    """
    sets = pairs_of(shape, size, seed)
    checks: dict[str, list[Check]] = {GATHER: [], STEP: []}
    for name, table in tables.items():
        before_check()
        drawn = Drawn(sets[0].ids, sets[0].weights.detach())
        checks[GATHER].append(checked_sums(name, size, drawn, gather(table, sets[0])))
        checks[STEP] += checked_step(name, size, algorithm, table, sets[0])
    for family, run in ((GATHER, gather), (STEP, step)):
        work = Work(kind + family, algorithm, size.num_slots, shape.bags, shape.pairs)
        runs = {name: partial(_on, run, table, sets) for name, table in tables.items()}
        yield timed(work, checks[family], runs, num_inputs=len(sets), rounds=rounds, budget_s=budget_s)


def _on(run: Callable[[Trainable, Pairs], object], table: Trainable, sets: list[Pairs], number: int) -> object:
    return run(table, sets[number])


def checked_step(name: str, size: TableSize, algorithm: str, table: Trainable, pairs: Pairs) -> list[Check]:
    """Gradients of some bags' weights, and the changes of some rows, after a table's first step."""
    found = step(table, pairs)
    assert found is not None, "a gradient of the weights"
    bags = sampled(_SAMPLED_BAGS, pairs.ids.shape[0], size.seed)
    rows = size.values(pairs.ids[bags].flatten()).double().view(len(bags), -1, size.value_dim)
    weight_grads = (rows @ pairs.grads[bags].double().unsqueeze(-1)).squeeze(-1)
    flat = pairs.ids.flatten()
    slots = distinct(flat[sampled(_SAMPLED_PAIRS, flat.numel(), size.seed)])
    changes = expected_changes(slots, pairs.ids, pairs.weights.detach(), pairs.grads, algorithm)
    changed = table.rows(slots).double() - size.values(slots).double()
    return [Check.of(name, [found[bags]], [weight_grads]), Check.of(name, [changed], [changes], CHANGE_TOLERANCE)]


def expected_changes(slots: Tensor, ids: Tensor, weights: Tensor, grads: Tensor, algorithm: str) -> Tensor:
    """Float64 changes [U, W] of some slots, ascending, in a first step.

    Args:
        slots: [U] int64.
        ids: [B, K] int64.
        weights: [B, K].
        grads: [B, W], of the sums.
        algorithm: "sgd" or "adagrad".
    """
    flat = ids.flatten()
    mine = torch.isin(flat, slots).nonzero().squeeze(1)
    parts = weights.flatten()[mine].double().unsqueeze(1) * grads[mine // ids.shape[1]].double()
    summed = torch.zeros(slots.numel(), grads.shape[1], dtype=torch.float64)
    summed.index_add_(0, torch.searchsorted(slots, flat[mine]), parts)
    if algorithm == "sgd":
        return -LEARNING_RATE * summed
    return -LEARNING_RATE * summed / ((FIRST_SUM + summed.square()).sqrt() + EPS)
