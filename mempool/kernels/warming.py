"""Compiling every kernel of a device before the first request needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import ELEMENTS, Element, Paged
from mempool.kernels.layout import PackedLayout
from mempool.kernels.steps import (
    ALGORITHMS,
    BLOCK_STATE,
    LAST_STEP,
    MASTER,
    STATE_NAMES,
    DenseSchedule,
    OptimizerStep,
)


def warm_up(device: torch.device | str = "cpu") -> None:
    """Compile (or load from the disk cache) every kernel that a device uses, for every stored element.

    Options of optimizers (``OptimizerStep.plain``) have variants of their own, compiled when a table first has a step
    with them.

    For whoever wants no request to wait for a compiler, which takes tens of seconds where the disk cache is empty.

    Args:
        device: Where the shard's arenas lie.
    """
    from mempool import kernels

    device = torch.device(device)
    ids = torch.tensor([0, 1, 1], device=device)
    offsets, bags = torch.tensor([0, 2, 3], device=device), torch.tensor([0, 0, 1], device=device)
    weights, grads = torch.ones(3, device=device), torch.ones(2, 4, device=device)
    page_table = torch.zeros(1, dtype=torch.int32, device=device)
    schedule = DenseSchedule(first_step=1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, device=device)
    schedule.append(0.0)
    for element in ELEMENTS:
        paged = _small_arena(element, page_table)
        kernels.weighted_sum(paged, ids, weights, offsets)
        kernels.weight_gradient(paged, ids, offsets, grads)
        kernels.scatter_rows(paged, ids, kernels.gather_rows(paged, ids))
        kernels.gather_rows(paged, ids, dtype=torch.float16)
        pairs = kernels.sort_pairs(paged, ids)
        sums = kernels.segment_sum(pairs, weights, bags, grads)
        kernels.add_segments(sums, torch.arange(2, device=device), pairs, weights, bags, grads)
        kernels.squared_norm(sums)
        state = {
            name: torch.zeros(2, 1 if name in BLOCK_STATE else 4, device=device)
            for names in STATE_NAMES.values()
            for name in names
        }
        for algorithm in ALGORITHMS:
            step = OptimizerStep(algorithm, lr=0.0)
            if not step.plain:
                continue
            kernels.optimizer_step(paged, state, pairs, sums, step)
            kernels.fused_step(paged, state, pairs, weights, bags, grads, step)
        state |= {
            MASTER: torch.zeros(2, 4, device=device),
            LAST_STEP: torch.zeros(2, 1, dtype=torch.int32, device=device),
        }
        kernels.fused_step(paged, state, pairs, weights, bags, grads, OptimizerStep("sgd", lr=0.0))
        kernels.catch_up(paged, state, pairs.rows, schedule, to=1, block_dim=64)
        if paged.element == "float32":
            del state[MASTER]
            kernels.catch_up(paged, state, pairs.rows, schedule, to=1, block_dim=64)
        if paged.packed is None:
            kernels.flat_topk(grads, paged, 1, 2)
    kernels.select_topk(grads, 1)
    kernels.product_select(grads, grads, 1, 4)
    queries, keys = grads[:, None].contiguous(), torch.ones(1, 2, 2, 2, device=device)
    scores, index1, index2 = kernels.product_indices(queries, keys, 1)
    kernels.product_gradient(queries, keys, index1, index2, scores)
    kernels.initial_values(0, 0, 1, 0, 1, 1.0)


def _small_arena(element: Element, page_table: Tensor) -> Paged:
    if element == "float32" or element == "bfloat16":
        rows = torch.zeros(2, 4, dtype=torch.float32 if element == "float32" else torch.bfloat16)
        return Paged(rows.to(page_table.device), page_table, 1)
    packed = PackedLayout(element, width=4, block_dim=64)
    rows = torch.zeros(2, packed.row_bytes, dtype=torch.uint8, device=page_table.device)
    return Paged(rows, page_table, 1, packed)
