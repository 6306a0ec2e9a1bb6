"""The calls that between them need every kernel of a table, or of a device: each is small, and stands for itself.

Who makes a call has its kernels compiled, or loaded from the disk cache. ``making`` does so for a table in time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mempool.kernels.arguments import ELEMENTS, RUN_PIECE, Element, Paged, SortedPairs
from mempool.kernels.layout import PackedLayout
from mempool.kernels.steps import (
    ALGORITHMS,
    BLOCK_STATE,
    LAST_STEP,
    MASTER,
    STATE_NAMES,
    Algorithm,
    DenseSchedule,
    OptimizerStep,
)

_WIDTH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What tells which kernels a table needs; or scoring in a trainer, to which the rest is of no meaning.

    Attributes:
        element: What values are stored as.
        algorithm: The rule of its optimizer.
        plain: As ``OptimizerStep.plain``: without options, which have a variant of the step.
        master: Float32 values are kept beside those stored.
        dense: Rows do the steps that they missed.
        experts: Rows may be asked as experts.
        keys: Of the shard, "" for none.
        device: Type of the device of its arenas.
        ids: In which slot ids are kept: what bags and commits are given. Rows are read by int64 in any case.
        scoring: Product-key scoring in a trainer, with its gradient, instead of a table.
        parts: Of keys of more than two parts, too.
    """

    element: Element = "float32"
    algorithm: Algorithm = "sgd"
    plain: bool = True
    master: bool = False
    dense: bool = False
    experts: bool = False
    keys: Literal["", "product", "flat"] = ""
    device: str = "cpu"
    ids: Literal["int32", "int64"] = "int32"
    scoring: bool = False
    parts: bool = False


def calls_of(needs: Needs) -> tuple[str, ...]:
    """Names of the calls that need all of these kernels, those that take long to compile first."""
    if needs.scoring:
        return ("product_topk", "product_gradient", *(["parts_topk"] if needs.parts else []))
    if needs.device != "cpu":  # initial values are drawn on the CPU in any case
        return ("initial_values",)
    names = ["step", *(["expert_sums", "expert_gradients"] if needs.experts else []), "weighted_sum"]
    names += ["catch_up"] if needs.dense else []
    names += ["product_topk"] if needs.keys == "product" else ["flat_keys"] if needs.keys == "flat" else []
    return (
        *names, "sort_pairs", "segment_sum", "weight_gradient", "rows", "admit_bags", "deal_pairs", "initial_values",
        "squared_norm",
    )  # fmt: skip


def call(name: str, needs: Needs) -> None:
    """Make a call by its name."""
    _CALLS[name](needs)


SCORING = Needs(scoring=True)
"""Of a trainer that scores product keys."""
SCORING_PARTS = Needs(scoring=True, parts=True)
"""Those of more than two parts."""


def warm_up(device: torch.device | str = "cpu") -> None:
    """Compile (or load from the disk cache) every kernel that a device uses, for every stored element.

    Options of optimizers (``OptimizerStep.plain``) have variants of their own, compiled when a table first has a step
    with them.

    Slot ids of bags are taken as tables of fewer than 2**31 slots keep them (``Needs.ids``).

    For whoever wants no request to wait for a compiler, which takes tens of seconds where the disk cache is empty.

    Args:
        device: Where the shard's arenas lie.
    """
    place = str(device)
    for element in ELEMENTS:
        for algorithm in ALGORITHMS:
            if algorithm != "sgd_momentum":
                _step(Needs(element=element, algorithm=algorithm, device=place))
        needs = Needs(element=element, master=True, device=place)
        for name in (
            "step",
            "catch_up",
            "weighted_sum",
            "weight_gradient",
            "expert_sums",
            "expert_gradients",
            "rows",
            "sort_pairs",
            "segment_sum",
        ):
            call(name, needs)
        if element in ("float32", "bfloat16"):
            _flat_topk(needs)
    needs = Needs(device=place)
    for name in (
        "catch_up",
        "squared_norm",
        "admit_bags",
        "deal_pairs",
        "select_topk",
        "product_topk",
        "parts_topk",
        "product_gradient",
        "initial_values",
    ):
        call(name, needs)


def _small_arena(needs: Needs) -> Paged:
    element = needs.element
    page_table = torch.zeros(1, dtype=torch.int32, device=needs.device)
    if element == "float32" or element == "bfloat16":
        dtype = torch.float32 if element == "float32" else torch.bfloat16
        return Paged(torch.zeros(2, _WIDTH, dtype=dtype, device=needs.device), page_table, 1)
    packed = PackedLayout(element, width=_WIDTH, block_dim=64)
    rows = torch.zeros(2, packed.row_bytes, dtype=torch.uint8, device=needs.device)
    return Paged(rows, page_table, 1, packed)


def _numbers(needs: Needs, *numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=needs.device)


def _ids(needs: Needs, *numbers: int) -> Tensor:
    return _numbers(needs, *numbers).to(torch.int32 if needs.ids == "int32" else torch.int64)


def _pairs(needs: Needs) -> SortedPairs:
    """Three pairs of two slots."""
    order, rows, starts = _numbers(needs, 0, 1, 2), _numbers(needs, 0, 1), _numbers(needs, 0, 1, 3)
    return SortedPairs(order=order, rows=rows, slots=rows.clone(), starts=starts)


def _long_run(needs: Needs) -> tuple[SortedPairs, Tensor]:
    """Pairs of one slot, so many that threads share its sum, and their bags."""
    num_pairs = 4 * RUN_PIECE + 1
    order, one = torch.arange(num_pairs, dtype=torch.int64, device=needs.device), _numbers(needs, 0)
    pairs = SortedPairs(order=order, rows=one, slots=one.clone(), starts=_numbers(needs, 0, num_pairs))
    return pairs, torch.zeros_like(order)


def _grads(needs: Needs) -> Tensor:
    return torch.ones(2, _WIDTH, dtype=torch.float32, device=needs.device)


def _state(needs: Needs) -> dict[str, Tensor]:
    names = STATE_NAMES[needs.algorithm]
    state = {
        name: torch.zeros(2, 1 if name in BLOCK_STATE else _WIDTH, dtype=torch.float32, device=needs.device)
        for name in names
    }
    if needs.master:
        state[MASTER] = torch.zeros(2, _WIDTH, dtype=torch.float32, device=needs.device)
    return state


def _weighted_sum(needs: Needs) -> None:
    from mempool import kernels

    weights = torch.ones(3, dtype=torch.float32, device=needs.device)
    kernels.weighted_sum(_small_arena(needs), _ids(needs, 0, 1, 1), weights, _numbers(needs, 0, 2, 3))


def _weight_gradient(needs: Needs) -> None:
    from mempool import kernels

    ids, offsets = _ids(needs, 0, 1, 1), _numbers(needs, 0, 2, 3)
    kernels.weight_gradient(_small_arena(needs), ids, offsets, _grads(needs))


def _expert_sums(needs: Needs) -> None:
    from mempool import kernels

    ids, offsets, inputs = _ids(needs, 0, 1, 1), _numbers(needs, 0, 2, 3), _grads(needs)[:, : _WIDTH // 2]
    kernels.expert_sums(_small_arena(needs), ids, None, offsets, inputs, act="relu")


def _expert_gradients(needs: Needs) -> None:
    from mempool import kernels

    ids, offsets = _ids(needs, 0, 1, 1), _numbers(needs, 0, 2, 3)
    kernels.expert_gradients(_small_arena(needs), ids, None, offsets, _grads(needs), _WIDTH // 2, act="relu")


def _rows(needs: Needs) -> None:
    from mempool import kernels

    paged, ids = _small_arena(needs), _numbers(needs, 0, 1)
    kernels.scatter_rows(paged, ids, kernels.gather_rows(paged, ids))
    kernels.gather_rows(paged, ids, dtype=torch.float16)


def _admit_bags(needs: Needs) -> None:
    from mempool import kernels

    kept = _ids(needs).dtype
    # As they come; an embedded pool's own are those that are kept.
    for dtype in (torch.int64, torch.uint32, *([torch.int32] if kept == torch.int32 else [])):
        ids = _numbers(needs, 0, 1, 1).to(dtype)
        kernels.admit_bags(ids, _numbers(needs, 0, 2, 3), num_slots=2, dtype=kept, own=True)


def _deal_pairs(needs: Needs) -> None:
    """What a client of the pool in this process, or on this host, does for a table that lies on shards by rows."""
    from mempool import kernels

    groups = torch.zeros(2, dtype=torch.int16, device="cpu")
    offsets = torch.arange(2, dtype=torch.int64, device="cpu")
    ids = torch.zeros(1, dtype=_ids(needs).dtype, device="cpu")
    kernels.deal_pairs(ids, None, offsets, groups, num_groups=1, page_shift=0)


def _sort_pairs(needs: Needs) -> None:
    from mempool import kernels

    kernels.sort_pairs(_small_arena(needs), _ids(needs, 0, 1, 1))


def _segment_sum(needs: Needs) -> None:
    from mempool import kernels

    weights, bags, grads = (
        torch.ones(3, dtype=torch.float32, device=needs.device),
        _numbers(needs, 0, 0, 1),
        _grads(needs),
    )
    sums = kernels.segment_sum(_pairs(needs), weights, bags, grads)
    kernels.segment_sum_and_norm(_pairs(needs), weights, bags, grads)
    kernels.add_segments(sums, _numbers(needs, 0, 1), _pairs(needs), weights, bags, grads)
    pairs, bags = _long_run(needs)
    kernels.segment_sum(pairs, None, bags, grads)


def _squared_norm(needs: Needs) -> None:
    from mempool import kernels

    kernels.squared_norm(_grads(needs))


def _step(needs: Needs) -> None:
    from mempool import kernels

    paged, state = _small_arena(needs), _state(needs)
    # Any option has the variant of all: a norm is one that every rule has.
    bound = float("inf") if needs.plain else 1.0
    step = OptimizerStep(needs.algorithm, lr=0.0, max_norm=bound)
    grads, weights, bags = (
        _grads(needs),
        torch.ones(3, dtype=torch.float32, device=needs.device),
        _numbers(needs, 0, 0, 1),
    )
    kernels.optimizer_step(paged, state, _pairs(needs), grads, step)
    kernels.fused_step(paged, state, _pairs(needs), weights, bags, grads, step)


def _catch_up(needs: Needs) -> None:
    from mempool import kernels

    schedule = DenseSchedule(first_step=1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, device=needs.device)
    schedule.append(0.0)
    state = {name: torch.zeros(2, _WIDTH, dtype=torch.float32, device=needs.device) for name in STATE_NAMES["adamw"]}
    state[LAST_STEP] = torch.zeros(2, 1, dtype=torch.int32, device=needs.device)
    if needs.master:
        state[MASTER] = torch.zeros(2, _WIDTH, dtype=torch.float32, device=needs.device)
    kernels.catch_up(_small_arena(needs), state, _numbers(needs, 0, 1), schedule, to=1, block_dim=64)


def _flat_topk(needs: Needs) -> None:
    from mempool import kernels

    kernels.flat_topk(_grads(needs), _small_arena(needs), 1, 2)


def _flat_keys(needs: Needs) -> None:
    _flat_topk(replace(needs, element="float32"))  # whatever values are stored as


def _select_topk(needs: Needs) -> None:
    from mempool import kernels

    kernels.select_topk(_grads(needs), 1)
    kernels.product_select(_grads(needs), _grads(needs), 1, _WIDTH)


def _product_topk(needs: Needs) -> None:
    from mempool import kernels

    queries, keys = (
        _grads(needs)[:, None].contiguous(),
        torch.ones(1, 2, 2, 2, dtype=torch.float32, device=needs.device),
    )
    kernels.product_indices(queries, keys, 1)


def _parts_topk(needs: Needs) -> None:
    from mempool import kernels

    queries = torch.ones(2, 1, 3, dtype=torch.float32, device=needs.device)
    keys = torch.ones(1, 3, 2, 1, dtype=torch.float32, device=needs.device)
    kernels.parts_topk(queries, keys, 1, ((0, 2),) * 3)


def _product_gradient(needs: Needs) -> None:
    from mempool import kernels

    queries, keys = (
        _grads(needs)[:, None].contiguous(),
        torch.ones(1, 2, 2, 2, dtype=torch.float32, device=needs.device),
    )
    index = _numbers(needs, 0, 0).view(2, 1, 1)
    kernels.product_gradient(
        queries, keys, index, index.clone(), torch.ones(2, 1, 1, dtype=torch.float32, device=needs.device)
    )


def _initial_values(needs: Needs) -> None:  # noqa: ARG001 - the same for all
    from mempool import kernels

    kernels.initial_values(0, 0, 1, 0, 1, 1.0)


_CALLS: dict[str, Callable[[Needs], None]] = {
    "weighted_sum": _weighted_sum,
    "weight_gradient": _weight_gradient,
    "expert_sums": _expert_sums,
    "expert_gradients": _expert_gradients,
    "rows": _rows,
    "admit_bags": _admit_bags,
    "deal_pairs": _deal_pairs,
    "sort_pairs": _sort_pairs,
    "segment_sum": _segment_sum,
    "squared_norm": _squared_norm,
    "step": _step,
    "catch_up": _catch_up,
    "flat_keys": _flat_keys,
    "select_topk": _select_topk,
    "product_topk": _product_topk,
    "parts_topk": _parts_topk,
    "product_gradient": _product_gradient,
    "initial_values": _initial_values,
}
