"""Cases that read rows: weighted sums, rows themselves, gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mempool import kernels
from mempool.bench import peers
from mempool.bench.cases.case import OWN, Prepared
from mempool.bench.cases.inputs import NUM_INPUTS, Pairs, Sample, Tables, TableSpec, sampled, tensors_bytes
from mempool.bench.gate import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, Check
from mempool.bench.measuring import Contender
from mempool.kernels import OptimizerStep, Paged, reference
from mempool.shard.pages.storage import Storage
from mempool.types import OptimizerSpec, Placement, TableSchema
from mempool.types.bags import Bags

#: mempool's float32 rows, beside which smaller elements are measured.
OWN_FLOAT32 = "mempool float32"
TORCH_BAG = "torch embedding_bag"
TORCH_COMPILED = "torch.compile gather"
FBGEMM = "fbgemm"
_SAMPLED_BAGS = 8
_SAMPLED_PAIRS = 512


@dataclass(frozen=True)
class _Summing:
    """A contender of a forward case: how it sums a set of pairs, on which arena, and how exact it has to be."""

    name: str
    paged: Paged
    run: Callable[[Pairs], Tensor]
    tolerance: float = FLOAT32_TOLERANCE


def forward(
    tables: Tables, spec: TableSpec, num_bags: int, bag_size: int, ids: str, beside: TableSpec | None
) -> Prepared:
    """Weighted sums, float32 out; smaller elements beside float32 rows of the table ``beside``.

    Unavoidable: each pair's row (with its scales), id and weight, the offsets, and the sums.
    """
    paged = tables.arena(spec)
    summing = [_Summing(OWN, paged, _own_sum(paged)), *_peers_sums(paged, bag_size)]
    if spec.element != "float32" and beside is not None:
        wide = tables.arena(beside)
        summing.append(_Summing(OWN_FLOAT32, wide, _own_sum(wide)))
    sets = tables.pairs(paged, spec.num_slots, num_bags, bag_size, ids)
    return _prepared_sums(spec, summing, sets, tables.seed)


def forward_of_shard(
    tables: Tables, spec: TableSpec, num_blocks: int, num_bags: int, bag_size: int, ids: str
) -> Prepared:
    """Weighted sums as a shard makes them that owns all column blocks of a table; peers read its memory."""
    table = _shard_table(tables, spec, num_blocks)
    (lane,) = table.lanes
    paged = lane.arena.paged()
    summing = [
        _Summing(OWN, paged, lambda pairs: table.pooled(Bags(pairs.ids, pairs.weights, pairs.offsets))),
        *_peers_sums(paged, bag_size),
    ]
    return _prepared_sums(spec, summing, tables.pairs(paged, spec.num_slots, num_bags, bag_size, ids), tables.seed)


def _shard_table(tables: Tables, spec: TableSpec, num_blocks: int) -> Storage:
    schema = TableSchema(
        table_id=1,
        name="bench",
        num_slots=spec.num_slots,
        value_dim=spec.value_dim,
        block_dim=spec.value_dim // num_blocks,
        page_slots=min(4096, spec.num_slots // 4),
        dtype=spec.element,
        seed=tables.seed,
        init_std=1.0,
        stride=0,
        layout="columns",
        optimizer=OptimizerSpec(algorithm="sgd", lr=0.0),
    )
    table = Storage(schema, shard=0, device=tables.device)
    owners = np.zeros((schema.num_row_pages, schema.num_blocks), dtype=np.int32)
    for _ in table.initialise(Placement(table_id=1, epoch=0, owners=owners, key_owners=owners[:0, 0])):
        pass
    return table


def _prepared_sums(spec: TableSpec, summing: list[_Summing], sets: list[Pairs], seed: int) -> Prepared:
    num_bags = sets[0].offsets.numel() - 1

    def check() -> list[Check]:
        chosen = sampled(_SAMPLED_BAGS, num_bags, seed)
        checks = []
        for one in summing:
            expected = _expected_sums(one.paged, sets[0], chosen)
            found = one.run(sets[0])
            checks.append(Check.of(one.name, [found[torch.tensor(chosen)]], [expected], one.tolerance))
        return checks

    num_bytes = sets[0].ids.numel() * (spec.row_bytes + 8 + 4) + 8 * (num_bags + 1)
    num_bytes += num_bags * spec.value_dim * 4
    contenders = [Contender(one.name, lambda i, run=one.run: run(sets[i])) for one in summing]  # type: ignore[misc]
    notes = ("torch takes and gives bfloat16 weights and sums",) if spec.element == "bfloat16" else ()
    return Prepared(contenders, NUM_INPUTS, check, num_bytes, notes=notes)


def _own_sum(paged: Paged) -> Callable[[Pairs], Tensor]:
    return lambda pairs: kernels.weighted_sum(paged, pairs.ids, pairs.weights, pairs.offsets)


def _peers_sums(paged: Paged, bag_size: int) -> list[_Summing]:
    """Peers know no page table and no packed rows; FBGEMM's CPU build sums no bfloat16 rows either."""
    if paged.packed is not None:
        return []
    rows = paged.rows

    def torch_sum(pairs: Pairs) -> Tensor:
        return torch.nn.functional.embedding_bag(
            pairs.arena_ids, rows, pairs.offsets, mode="sum", include_last_offset=True,
            per_sample_weights=pairs.weights if rows.dtype == torch.float32 else pairs.narrow_weights,
        )  # fmt: skip

    exact = FLOAT32_TOLERANCE if rows.dtype == torch.float32 else BFLOAT16_TOLERANCE
    found = [_Summing(TORCH_BAG, paged, torch_sum, exact)]
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and peers.fbgemm_has("sgd"):
        module = peers.fbgemm(rows, None, OptimizerStep("sgd", lr=0.0))

        def fbgemm_sum(pairs: Pairs) -> Tensor:
            with torch.no_grad():
                summed: Tensor = module(pairs.arena_ids, pairs.offsets, pairs.weights)
            return summed

        found.append(_Summing(FBGEMM, paged, fbgemm_sum))
    if rows.device.type == "cuda":
        compiled = torch.compile(_gathered)

        def compiled_sum(pairs: Pairs) -> Tensor:
            summed: Tensor = compiled(rows, pairs.arena_ids, pairs.weights, bag_size)
            return summed

        found.append(_Summing(TORCH_COMPILED, paged, compiled_sum))
    return found


def rows(tables: Tables, spec: TableSpec, num_rows: int, ids: str) -> Prepared:
    """Rows as they are, no sum: what tables of concatenated n-grams read.

    Unavoidable: each id, and each row read and written.
    """
    paged = tables.arena(spec)
    sets = tables.pairs(paged, spec.num_slots, num_rows, 1, ids)
    contenders = [Contender(OWN, lambda i: kernels.gather_rows(paged, sets[i].ids))]
    if paged.packed is None:
        contenders.append(Contender("torch index_select", lambda i: paged.rows.index_select(0, sets[i].arena_ids)))
    if paged.packed is None and paged.rows.device.type == "cpu":
        # Most of the former's time is page faults of what it returns.
        shape = (num_rows, spec.value_dim)

        def select_into_huge_pages(i: int) -> Tensor:
            out = tables.empty(*shape, paged.rows.dtype)
            return torch.index_select(paged.rows, 0, sets[i].arena_ids, out=out)

        contenders.append(Contender("torch index_select in huge pages", select_into_huge_pages))

    def check() -> list[Check]:
        chosen = torch.tensor(sampled(_SAMPLED_PAIRS, num_rows, tables.seed))
        wanted = sets[0].ids.cpu()[chosen]
        sample = Sample.of(paged, wanted)
        expected = reference.read_values(sample.paged)[sample.local(wanted)]
        return _checked_runs(contenders, expected, chosen)

    written = spec.value_dim * paged.value_dtype.itemsize
    return Prepared(contenders, NUM_INPUTS, check, num_rows * (8 + spec.row_bytes + written))


def weight_gradient(tables: Tables, spec: TableSpec, num_bags: int, bag_size: int, ids: str) -> Prepared:
    """Gradients of weights alone: ``<grads[bag], V[id]>`` for each pair.

    Unavoidable: each pair's row and id, the offsets, the sums' gradients, and a float32 for each pair.
    """
    paged = tables.arena(spec)
    sets = tables.pairs(paged, spec.num_slots, num_bags, bag_size, ids)

    def own(i: int) -> Tensor:
        return kernels.weight_gradient(paged, sets[i].ids, sets[i].offsets, sets[i].grads)

    contenders = [Contender(OWN, own)]
    if spec.element == "float32":
        frozen = [_Differentiable(paged.rows, pairs) for pairs in sets]
        contenders.append(Contender(TORCH_BAG, lambda i: frozen[i].backward(), before=lambda i: frozen[i].forward()))

    def check() -> list[Check]:
        chosen = sampled(_SAMPLED_BAGS, num_bags, tables.seed)
        expected, places = expected_weight_gradient(paged, sets[0], chosen)
        return _checked_runs(contenders, expected, places)

    one = sets[0]
    num_bytes = one.ids.numel() * (spec.row_bytes + 8 + 4) + tensors_bytes([one.offsets, one.grads])
    return Prepared(contenders, NUM_INPUTS, check, num_bytes)


class _Differentiable:
    """torch's embedding_bag of one set of pairs, differentiable in the weights alone."""

    def __init__(self, rows: Tensor, pairs: Pairs) -> None:
        self._rows, self._pairs = rows, pairs
        self._weights = pairs.weights.clone().requires_grad_()
        self._sum: Tensor | None = None

    def forward(self) -> None:
        self._sum = torch.nn.functional.embedding_bag(
            self._pairs.arena_ids, self._rows, self._pairs.offsets, mode="sum", per_sample_weights=self._weights,
            include_last_offset=True,
        )  # fmt: skip

    def backward(self) -> Tensor:
        assert self._sum is not None, "forward comes first"
        (gradient,) = torch.autograd.grad(self._sum, self._weights, self._pairs.grads)
        return gradient


def expected_weight_gradient(paged: Paged, pairs: Pairs, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Float64 weight gradients of some bags' pairs, and those pairs' places."""
    places, ids, offsets = _of_bags(pairs, chosen)
    sample = Sample.of(paged, ids)
    grads = pairs.grads.cpu()[torch.tensor(chosen)]
    return reference.weight_gradient(sample.paged, sample.local(ids), offsets, grads), places


def _checked_runs(contenders: Sequence[Contender], expected: Tensor, places: Tensor) -> list[Check]:
    """Check some rows of what each contender returns."""
    checks = []
    for contender in contenders:
        contender.before(0)
        found = contender.run(0)
        assert isinstance(found, Tensor)
        checks.append(Check.of(contender.name, [found[places.to(found.device)]], [expected]))
    return checks


def _expected_sums(paged: Paged, pairs: Pairs, chosen: Sequence[int]) -> Tensor:
    places, ids, offsets = _of_bags(pairs, chosen)
    sample = Sample.of(paged, ids)
    return reference.weighted_sum(sample.paged, sample.local(ids), pairs.weights.cpu()[places], offsets)


def _of_bags(pairs: Pairs, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Places and ids of the pairs of some bags, and offsets as if there were no others."""
    bounds = pairs.offsets.tolist()
    places = torch.cat([torch.arange(bounds[bag], bounds[bag + 1]) for bag in chosen])
    offsets = torch.tensor([0, *(bounds[bag + 1] - bounds[bag] for bag in chosen)]).cumsum(0)
    return places, pairs.ids.cpu()[places], offsets


def _gathered(rows: Tensor, ids: Tensor, weights: Tensor, bag_size: int) -> Tensor:
    return (rows[ids].float() * weights[:, None]).view(-1, bag_size, rows.shape[1]).sum(1)
