"""Cases that change rows: a commit (sort, sums, optimizer), and a commit after the gradients of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mempool import kernels
from mempool.bench import peers
from mempool.bench.cases.bags import FBGEMM, expected_weight_gradient
from mempool.bench.cases.case import OWN, Prepared
from mempool.bench.cases.inputs import (
    NUM_INPUTS,
    Pairs,
    Sample,
    Tables,
    TableSpec,
    arena_ids,
    distinct,
    sampled,
    tensors_bytes,
)
from mempool.bench.gate import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, Check
from mempool.bench.measuring import Contender
from mempool.kernels import OptimizerStep, Paged, RandomRounding, reference

TORCH_SPARSE = "torch sparse"
#: Large enough for changes of a value to stand out of the rounding of the value itself.
_LEARNING_RATE = 0.1
_SAMPLED_PAIRS = 24
_SAMPLED_BAGS = 4
#: Of the change of a value, which is much smaller than the value that it is the difference of.
_CHANGE_TOLERANCE = 1e-4
#: Smaller values are compared as if they were so large: what cancels has no last place of its own.
_LEAST_MAGNITUDE = 2.0**-8


@dataclass(frozen=True)
class _Update:
    """What all contenders of a case work on and are checked by."""

    paged: Paged
    state: dict[str, Tensor]
    step: OptimizerStep
    sets: Sequence[Pairs]
    with_weights: bool

    def own(self, i: int) -> Tensor | None:
        pairs = self.sets[i]
        gradient = None
        if self.with_weights:
            gradient = kernels.weight_gradient(self.paged, pairs.ids, pairs.offsets, pairs.grads)
        ordered = kernels.sort_pairs(self.paged, pairs.ids)
        kernels.fused_step(self.paged, self.state, ordered, pairs.weights, pairs.bags, pairs.grads, self.step)
        return gradient


class _Backward:
    """A peer: its forward pass made before, its backward pass and optimizer timed."""

    def __init__(
        self, update: _Update, forward: Callable[[Pairs, Tensor], Tensor], after: Callable[[], object] | None = None
    ) -> None:
        self._update, self._forward, self._after = update, forward, after
        self._weights = [pairs.weights.clone().requires_grad_(update.with_weights) for pairs in update.sets]
        self._summed: Tensor | None = None

    def before(self, i: int) -> None:
        self._weights[i].grad = None
        self._summed = self._forward(self._update.sets[i], self._weights[i])

    def run(self, i: int) -> Tensor | None:
        assert self._summed is not None, "the forward pass comes first"
        self._summed.backward(self._update.sets[i].grads)  # type: ignore[no-untyped-call]
        self._summed = None
        if self._after is not None:
            self._after()
        return self._weights[i].grad


def commit(
    tables: Tables, spec: TableSpec, algorithm: kernels.Algorithm, num_bags: int, bag_size: int, ids: str
) -> Prepared:
    """Sort pairs by row, sum their gradients, one optimizer step; bfloat16 rows are rounded stochastically.

    Unavoidable: each distinct row and its state read and written, the sums' gradients once, each pair's id, weight and
    bag.
    """
    return _prepared(tables, spec, algorithm, num_bags, bag_size, ids, with_weights=False)


def update(
    tables: Tables, spec: TableSpec, algorithm: kernels.Algorithm, num_bags: int, bag_size: int, ids: str
) -> Prepared:
    """Gradients of the weights, then the commit: all that a backward pass asks of a shard.

    Unavoidable: as for the commit, and a float32 for each pair; rows are read once.
    """
    return _prepared(tables, spec, algorithm, num_bags, bag_size, ids, with_weights=True)


def _prepared(
    tables: Tables,
    spec: TableSpec,
    algorithm: kernels.Algorithm,
    num_bags: int,
    bag_size: int,
    ids: str,
    *,
    with_weights: bool,
) -> Prepared:
    paged = tables.arena_to_change(spec)
    sets = tables.pairs(paged, spec.num_slots, num_bags, bag_size, ids)
    decay = 0.01 if algorithm == "adamw" else 0.0
    step = OptimizerStep(algorithm, lr=_LEARNING_RATE, eps=1e-8, block_dim=spec.value_dim, weight_decay=decay)
    if spec.element != "float32":
        columns = torch.zeros(1, dtype=torch.int64, device=tables.device)
        step = replace(step, rounding=RandomRounding(RandomRounding.key_of(seed=0, table=0, step=1), columns))
    state = tables.state(spec, algorithm, spec.value_dim)
    work = _Update(paged, state, step, sets, with_weights)
    contenders = [Contender(OWN, work.own), *_peers(work)]
    num_distinct = sum(distinct(pairs.ids).numel() for pairs in sets) / len(sets)
    state_bytes = sum(tensor.shape[1] * 4 for tensor in state.values())
    num_pairs = sets[0].ids.numel()
    num_bytes = round(num_distinct * 2 * (spec.row_bytes + state_bytes)) + tensors_bytes([sets[0].grads])
    num_bytes += num_pairs * (8 + 4 + 8 + (4 if with_weights else 0))
    notes = (f"{num_distinct:,.0f} distinct rows",)
    return Prepared(contenders, NUM_INPUTS, lambda: _checks(work, contenders, tables.seed), num_bytes, notes=notes)


def _peers(work: _Update) -> list[Contender]:
    rows, step = work.paged.rows, work.step
    found = []
    if rows.dtype == torch.float32 and peers.torch_has(step.algorithm):
        found.append(_contender(TORCH_SPARSE, _torch_backward(work)))
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and peers.fbgemm_has(step.algorithm):
        state = next(iter(work.state.values()), None)
        module = peers.fbgemm(rows, state, step)

        def forward(pairs: Pairs, weights: Tensor) -> Tensor:
            summed: Tensor = module(pairs.arena_ids, pairs.offsets, weights)
            return summed

        found.append(_contender(FBGEMM, _Backward(work, forward)))
    return found


def _torch_backward(work: _Update) -> _Backward:
    theirs = peers.torch_update(work.paged.rows, work.state, work.step)

    def forward(pairs: Pairs, weights: Tensor) -> Tensor:
        summed: Tensor = theirs.bag(pairs.arena_ids, pairs.offsets, weights)
        return summed

    def step() -> None:
        optimizer: Any = theirs.optimizer
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _Backward(work, forward, step)


def _contender(name: str, backward: _Backward) -> Contender:
    return Contender(name, backward.run, backward.before)


def _checks(work: _Update, contenders: Sequence[Contender], seed: int) -> list[Check]:
    """Check changes of sampled rows and all their state, and gradients of sampled weights.

    Every contender starts from the same sampled rows: they are put back after each.
    """
    pairs = work.sets[0]
    ids = pairs.ids.cpu()
    picked = ids[torch.tensor(sampled(_SAMPLED_PAIRS, ids.numel(), seed))]
    sample = Sample.of(work.paged, picked)
    here = sample.rows.to(work.paged.rows.device)
    before = {name: tensor[here].cpu() for name, tensor in work.state.items()}
    expected = _expected(work, sample, before)
    gradients: list[Tensor] = []
    places = torch.empty(0, dtype=torch.int64)
    if work.with_weights:
        chosen = sampled(_SAMPLED_BAGS, pairs.grads.shape[0], seed)
        gradient, places = expected_weight_gradient(work.paged, pairs, chosen)
        gradients = [gradient]
    rounded = work.paged.rows.dtype != torch.float32
    started = sample.paged.rows.double()
    checks = []
    touched = arena_ids(work.paged, distinct(ids)).to(here.device)
    kept = work.paged.rows[touched]
    for contender in contenders:
        contender.before(0)
        found = contender.run(0)
        after = work.paged.rows[here].cpu().double()
        if rounded:
            # Each value within one unit in its own last place: as a share of the largest, a step could be lost in it.
            wanted = started + expected[0]
            magnitudes = wanted.abs().clamp(min=_LEAST_MAGNITUDE)
            checks.append(Check.of(contender.name, [after / magnitudes], [wanted / magnitudes], BFLOAT16_TOLERANCE))
        states = [work.state[name][here] for name in work.state]
        exact, wanted_exact = (states, expected[1:]) if rounded else ([after - started, *states], expected)
        if exact:
            checks.append(Check.of(contender.name, exact, wanted_exact, _CHANGE_TOLERANCE))
        if gradients:
            assert isinstance(found, Tensor)
            checks.append(Check.of(contender.name, [found[places.to(found.device)]], gradients, FLOAT32_TOLERANCE))
        work.paged.rows[touched] = kept  # the next one's weight gradients are of these values
        for name, tensor in before.items():
            work.state[name][here] = tensor.to(here.device)
    return checks


def _expected(work: _Update, sample: Sample, before: dict[str, Tensor]) -> list[Tensor]:
    """Float64 changes of the sampled rows, and their state after the step."""
    pairs = work.sets[0]
    ids = pairs.ids.cpu()
    mine = torch.isin(ids, sample.slots)
    ordered = reference.sort_pairs(sample.paged, sample.local(ids[mine]))
    sums = reference.segment_sum(ordered, pairs.weights.cpu()[mine], pairs.bags.cpu()[mine], pairs.grads.cpu())
    values = reference.read_values(sample.paged)
    state = {name: tensor.double() for name, tensor in before.items()}
    started = values.clone()
    reference.optimizer_step(values, state, ordered.rows, sums, work.step)
    return [values - started, *state.values()]
