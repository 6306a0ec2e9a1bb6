"""The CPU implementation: Numba kernels on numpy views of the tensors. Arguments are checked by mempool.kernels."""

from mempool.kernels.cpu.admission import admit_bags
from mempool.kernels.cpu.bags import sum_arrays, weight_gradient, weighted_sum
from mempool.kernels.cpu.dealing import deal_pairs
from mempool.kernels.cpu.experts.passes import expert_gradients, expert_sums
from mempool.kernels.cpu.initial import initial_values
from mempool.kernels.cpu.rows import gather_rows, scatter_rows
from mempool.kernels.cpu.runtime import choose_threading_layer
from mempool.kernels.cpu.scoring.flat import flat_topk
from mempool.kernels.cpu.scoring.parts import parts_topk
from mempool.kernels.cpu.scoring.topk import product_gradient, product_select, product_topk, select_topk
from mempool.kernels.cpu.sorting import sort_pairs
from mempool.kernels.cpu.updates import (
    add_segments,
    catch_up,
    fused_step,
    optimizer_step,
    segment_sum,
    segment_sum_and_norm,
    squared_norm,
)

__all__ = [
    "add_segments",
    "admit_bags",
    "catch_up",
    "choose_threading_layer",
    "deal_pairs",
    "expert_gradients",
    "expert_sums",
    "flat_topk",
    "fused_step",
    "gather_rows",
    "initial_values",
    "optimizer_step",
    "parts_topk",
    "product_gradient",
    "product_select",
    "product_topk",
    "scatter_rows",
    "segment_sum",
    "segment_sum_and_norm",
    "select_topk",
    "sort_pairs",
    "squared_norm",
    "sum_arrays",
    "weight_gradient",
    "weighted_sum",
]
