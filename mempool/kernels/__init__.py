"""The arithmetic of a shard, and of scoring on a trainer: each function runs on the device where its tensors are.

Triton on CUDA, Numba on the CPU, torch's own operations where those are missing; ``reference`` says in float64 what
each means. Callers never know which implementation runs. This package sees only tensors: ids come in validated.

Shape legend: B bags, L pairs in all bags, R arena rows, W arena row width, P pages, U distinct rows, H heads, K top-k,
D key dim, n half-keys of a codebook, M rows of scores.
"""

from __future__ import annotations

from mempool.kernels.arguments import ELEMENTS, LONG_RUN, RUN_PIECE, Dealt, Element, Paged, SortedPairs
from mempool.kernels.dispatch import (
    EXPERT_ACTS,
    ExpertGradients,
    add_segments,
    admit_bags,
    array_sums,
    catch_up,
    deal_pairs,
    expert_gradients,
    expert_sums,
    flat_topk,
    fused_step,
    gather_rows,
    initial_values,
    optimizer_step,
    parts_topk,
    product_gradient,
    product_indices,
    product_select,
    product_topk,
    scatter_rows,
    segment_sum,
    segment_sum_and_norm,
    select_topk,
    sort_pairs,
    squared_norm,
    weight_gradient,
    weighted_sum,
)
from mempool.kernels.implementation import Implementation, implementation
from mempool.kernels.layout import PackedElement, PackedLayout, num_blocks
from mempool.kernels.making import make_ready
from mempool.kernels.steps import (
    ALGORITHMS,
    BLOCK_STATE,
    LAST_STEP,
    MASTER,
    NO_MOMENTUM,
    STATE_NAMES,
    Algorithm,
    DenseSchedule,
    OptimizerStep,
    RandomRounding,
)
from mempool.kernels.torch_ops.packing import pack_rows, pick_blocks, unpack_rows
from mempool.kernels.warming import SCORING, SCORING_PARTS, Needs, warm_up

__all__ = [
    "ALGORITHMS",
    "BLOCK_STATE",
    "ELEMENTS",
    "EXPERT_ACTS",
    "LAST_STEP",
    "LONG_RUN",
    "MASTER",
    "NO_MOMENTUM",
    "RUN_PIECE",
    "SCORING",
    "SCORING_PARTS",
    "STATE_NAMES",
    "Algorithm",
    "Dealt",
    "DenseSchedule",
    "Element",
    "ExpertGradients",
    "Implementation",
    "Needs",
    "OptimizerStep",
    "PackedElement",
    "PackedLayout",
    "Paged",
    "RandomRounding",
    "SortedPairs",
    "add_segments",
    "admit_bags",
    "array_sums",
    "catch_up",
    "deal_pairs",
    "expert_gradients",
    "expert_sums",
    "flat_topk",
    "fused_step",
    "gather_rows",
    "implementation",
    "initial_values",
    "make_ready",
    "num_blocks",
    "optimizer_step",
    "pack_rows",
    "parts_topk",
    "pick_blocks",
    "product_gradient",
    "product_indices",
    "product_select",
    "product_topk",
    "scatter_rows",
    "segment_sum",
    "segment_sum_and_norm",
    "select_topk",
    "sort_pairs",
    "squared_norm",
    "unpack_rows",
    "warm_up",
    "weight_gradient",
    "weighted_sum",
]
