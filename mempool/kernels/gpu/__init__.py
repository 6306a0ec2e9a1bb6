"""The GPU implementation: Triton kernels, sorting left to torch. Arguments are checked by mempool.kernels.

Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly.
"""

from mempool.kernels.gpu.bags import gather_rows, scatter_rows, weight_gradient, weighted_sum
from mempool.kernels.gpu.dense import catch_up
from mempool.kernels.gpu.experts import expert_gradients, expert_sums
from mempool.kernels.gpu.segments import add_segments, segment_sum
from mempool.kernels.gpu.selection import product_select, select_topk
from mempool.kernels.gpu.sorting import sort_pairs
from mempool.kernels.gpu.topk import flat_topk, product_gradient, product_topk
from mempool.kernels.gpu.updates import fused_step, optimizer_step, segment_sum_and_norm, squared_norm
from mempool.kernels.torch_ops import admit_bags, deal_pairs, initial_values, parts_topk

__all__ = [
    "add_segments",
    "admit_bags",
    "catch_up",
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
    "weight_gradient",
    "weighted_sum",
]
