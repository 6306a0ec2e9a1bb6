"""Cases of rows that are experts, u and v of the same width: their sums, and their gradients with a commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mempool import kernels
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
from mempool.bench.gate import FLOAT32_TOLERANCE, Check
from mempool.bench.measuring import Contender
from mempool.kernels import OptimizerStep, Paged, reference
from mempool.kernels.torch_ops.bags import bag_of_pairs
from mempool.shard.experts.answers import held_twice
from mempool.types.bags import Bags

TORCH_EXPERTS = "torch gather, einsum"
TORCH_EXPERTS_SPARSE = "torch gather, einsum, sparse"
_ACT = "gelu"
_SAMPLED_BAGS = 4
_LEARNING_RATE = 0.1
#: Of the change of a value, which is a difference of values much larger than it.
_CHANGE_TOLERANCE = 1e-4


def sums(tables: Tables, spec: TableSpec, num_bags: int, bag_size: int, ids: str) -> Prepared:
    """What a bag's experts answer to its input, beside torch's gather and einsum.

    Unavoidable: each pair's row, id and gate, the offsets, the inputs and the sums.
    """
    paged = tables.arena(spec)
    sets = tables.pairs(paged, spec.num_slots, num_bags, bag_size, ids)
    input_dim = spec.value_dim // 2
    inputs = [_scaled(pairs)[:, :input_dim].contiguous() for pairs in sets]

    def own(i: int) -> Tensor:
        pairs = sets[i]
        return kernels.expert_sums(paged, pairs.ids, pairs.weights, pairs.offsets, inputs[i], act=_ACT)

    def torchs(i: int) -> Tensor:
        with torch.no_grad():
            return _of_torch(paged.rows, sets[i], sets[i].weights, inputs[i])

    contenders = [Contender(OWN, own), Contender(TORCH_EXPERTS, torchs)]

    def check() -> list[Check]:
        chosen = torch.tensor(sampled(_SAMPLED_BAGS, num_bags, tables.seed))
        found, offsets, sample = _of_bags(paged, sets[0], chosen, bag_size)
        ids_of, gates = sample.local(sets[0].ids.cpu()[found]), sets[0].weights.cpu()[found]
        expected = reference.expert_sums(sample.paged, ids_of, gates, offsets, inputs[0].cpu()[chosen], _ACT)
        return [_check(each, lambda run: [run(0)[chosen]], [expected], FLOAT32_TOLERANCE) for each in contenders]

    num_pairs = sets[0].ids.numel()
    num_bytes = num_pairs * (spec.row_bytes + 8 + 4) + tensors_bytes([sets[0].offsets, inputs[0]])
    num_bytes += 4 * num_bags * (spec.value_dim - input_dim)
    return Prepared(
        contenders, NUM_INPUTS, check, num_bytes, notes=(_on_the_wire(spec.value_dim, input_dim, bag_size),)
    )


def update(tables: Tables, spec: TableSpec, num_bags: int, bag_size: int, ids: str) -> Prepared:
    """Gradients of inputs and gates, and an Adagrad step of u and v, beside torch's autograd with sparse gradients.

    Unavoidable: each pair's row once, its id, gate and the gradient of that, and each distinct row and its state
    read and written; inputs, their gradients and those of the sums.
    """
    paged, input_dim = tables.arena_to_change(spec), spec.value_dim // 2
    sets = tables.pairs(paged, spec.num_slots, num_bags, bag_size, ids)
    grads = [_scaled(pairs) for pairs in sets]
    step = OptimizerStep("adagrad", lr=_LEARNING_RATE, eps=1e-8, block_dim=spec.value_dim)
    state = tables.state(spec, "adagrad", spec.value_dim)

    def own(i: int) -> Tensor:
        pairs = sets[i]
        found = kernels.expert_gradients(paged, pairs.ids, pairs.weights, pairs.offsets, grads[i], input_dim, act=_ACT)
        twice, both = held_twice(Bags(pairs.ids, pairs.weights, pairs.offsets), grads[i], input_dim, found)
        ordered = kernels.sort_pairs(paged, twice.ids)
        bags = bag_of_pairs(twice.offsets, twice.num_pairs)
        kernels.fused_step(paged, state, ordered, twice.weights, bags, both, step)
        return found.inputs

    theirs = _Backward(paged.rows, state["sum"], sets, grads, input_dim)
    contenders = [Contender(OWN, own), Contender(TORCH_EXPERTS_SPARSE, theirs.run, theirs.before)]

    def check() -> list[Check]:
        chosen = torch.tensor(sampled(_SAMPLED_BAGS, num_bags, tables.seed))
        pairs = sets[0]
        found, offsets, sample = _of_bags(paged, pairs, chosen, bag_size)
        local, gates = sample.local(pairs.ids.cpu()[found]), pairs.weights.cpu()[found]
        given = grads[0].cpu()
        expected, *_ = reference.expert_gradients(sample.paged, local, gates, offsets, given[chosen], input_dim, _ACT)
        rows, change = _expected_change(paged, pairs, given, input_dim, state, step, chosen[:1], bag_size)
        touched = arena_ids(paged, distinct(pairs.ids)).to(rows.device)
        kept, sums = paged.rows[touched], state["sum"][touched]
        checks = []
        for each in contenders:
            before = paged.rows[rows].double()

            def looked(run: Callable[[int], Any], before: Tensor = before) -> list[Tensor]:
                input_grad = run(0)[chosen]
                return [input_grad, (paged.rows[rows].double() - before)]

            checks.append(_check(each, looked, [expected, change], _CHANGE_TOLERANCE))
            paged.rows[touched], state["sum"][touched] = kept, sums
        return checks

    num_distinct = sum(distinct(pairs.ids).numel() for pairs in sets) / len(sets)
    num_bytes = round(num_distinct * 4 * spec.row_bytes) + sets[0].ids.numel() * (spec.row_bytes + 8 + 4 + 4)
    num_bytes += tensors_bytes([sets[0].offsets, grads[0]]) + 4 * num_bags * input_dim
    return Prepared(contenders, NUM_INPUTS, check, num_bytes, notes=(f"{num_distinct:,.0f} distinct rows",))


def _on_the_wire(value_dim: int, input_dim: int, bag_size: int) -> str:
    """What a token costs of a pool of one shard, in tensors of float32: inputs, ids, gates and an offset go out,
    sums come in; inputs and gradients go out, and those of inputs and gates come in."""
    forward = 4 * value_dim + 8 * bag_size + 8
    backward = 4 * value_dim + 4 * (bag_size + input_dim)
    rows = 4 * value_dim * bag_size
    return f"{forward:,} bytes a token on the wire, {backward:,} backward (its rows have {rows:,})"


class _Backward:
    """torch's layer: its forward pass made before, its backward pass and optimizer timed."""

    def __init__(self, rows: Tensor, squares: Tensor, sets: list[Pairs], grads: list[Tensor], input_dim: int) -> None:
        # As torch does it unless asked; said aloud, it gives no warning at each step.
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
        self._rows = torch.nn.Parameter(rows)  # the same memory
        self._sets, self._grads, self._input_dim = sets, grads, input_dim
        self._optimizer = torch.optim.Adagrad([self._rows], lr=_LEARNING_RATE, eps=1e-8)
        self._optimizer.state[self._rows]["sum"] = squares
        self._gates, self._inputs, self._sums = rows, rows, rows

    def before(self, i: int) -> None:
        self._gates = self._sets[i].weights.clone().requires_grad_()
        self._inputs = self._grads[i][:, : self._input_dim].clone().requires_grad_()
        self._sums = _of_torch(self._rows, self._sets[i], self._gates, self._inputs, sparse=True)

    def run(self, i: int) -> Tensor:
        self._sums.backward(self._grads[i][:, self._input_dim :])  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        assert self._inputs.grad is not None, "it was asked for"
        return self._inputs.grad


def _of_torch(rows: Tensor, pairs: Pairs, gates: Tensor, inputs: Tensor, *, sparse: bool = False) -> Tensor:
    """The layer's formula: gather, einsum, act, einsum."""
    found = F.embedding(pairs.arena_ids.view(inputs.shape[0], -1), rows, sparse=sparse)
    u, v = found[..., : inputs.shape[1]], found[..., inputs.shape[1] :]
    answers = F.gelu(torch.einsum("bpi,bi->bp", u, inputs)) * gates.view(inputs.shape[0], -1)
    sums: Tensor = torch.einsum("bp,bpo->bo", answers, v)
    return sums


def _scaled(pairs: Pairs) -> Tensor:
    """Inputs of which products with rows of standard normal numbers are about 1, and gradients as small."""
    scaled: Tensor = pairs.grads / pairs.grads.shape[1] ** 0.5
    return scaled


def _of_bags(paged: Paged, pairs: Pairs, chosen: Tensor, bag_size: int) -> tuple[Tensor, Tensor, Sample]:
    """Places of the pairs of some bags, offsets as if there were no others, and their rows."""
    places = (chosen[:, None] * bag_size + torch.arange(bag_size)).reshape(-1)
    offsets = torch.arange(chosen.numel() + 1) * bag_size
    return places, offsets, Sample.of(paged, pairs.ids.cpu()[places])


def _expected_change(
    paged: Paged,
    pairs: Pairs,
    grads: Tensor,
    input_dim: int,
    state: dict[str, Tensor],
    step: OptimizerStep,
    chosen: Tensor,
    bag_size: int,
) -> tuple[Tensor, Tensor]:
    """Rows of the arena that one bag has pairs of, and their float64 changes, of all pairs that name them."""
    ids = pairs.ids.cpu()
    _, _, sample = _of_bags(paged, pairs, chosen, bag_size)
    mine = torch.isin(ids, sample.slots).nonzero().squeeze(1)
    bags = pairs.bags.cpu()[mine]
    offsets = torch.arange(mine.numel() + 1)  # each pair as a bag: bags of pairs that are left out have gaps
    local, both = sample.local(ids[mine]), grads[bags]
    _, _, of_u, of_v = reference.expert_gradients(
        sample.paged, local, pairs.weights.cpu()[mine], offsets, both, input_dim, _ACT
    )
    along = torch.cat([of_u[:, None].expand(-1, input_dim), of_v[:, None].expand(-1, both.shape[1] - input_dim)], dim=1)
    total = torch.zeros(sample.slots.numel(), both.shape[1], dtype=torch.float64)
    total.index_add_(0, local, along * both.double())
    rows = sample.rows.to(paged.rows.device)
    values, own = reference.read_values(sample.paged), {"sum": state["sum"][rows].cpu().double()}
    started = values.clone()
    reference.optimizer_step(values, own, torch.arange(sample.slots.numel()), total, step)
    return rows, values - started


def _check(
    contender: Contender, look: Callable[[Callable[[int], Any]], list[Tensor]], expected: list[Tensor], tolerance: float
) -> Check:
    contender.before(0)
    return Check.of(contender.name, look(contender.run), expected, tolerance)
