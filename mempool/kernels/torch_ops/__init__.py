"""Every kernel in torch's own operations: what runs where Numba or Triton is missing, on any device.

Sums over pairs are made in the order of the pairs (by torch's index_add_ on the CPU); selection goes by integer ranks,
so ties are exact.
"""

from mempool.kernels.torch_ops.admission import admit_bags
from mempool.kernels.torch_ops.bags import gather_rows, scatter_rows, sort_pairs, weight_gradient, weighted_sum
from mempool.kernels.torch_ops.dealing import deal_pairs
from mempool.kernels.torch_ops.experts import expert_gradients, expert_sums
from mempool.kernels.torch_ops.initial import initial_values
from mempool.kernels.torch_ops.topk import (
    flat_topk,
    parts_topk,
    positions,
    product_gradient,
    product_select,
    product_topk,
    ranks,
    select_topk,
)
from mempool.kernels.torch_ops.updates import (
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
    "deal_pairs",
    "expert_gradients",
    "expert_sums",
    "flat_topk",
    "fused_step",
    "gather_rows",
    "initial_values",
    "optimizer_step",
    "parts_topk",
    "positions",
    "product_gradient",
    "product_select",
    "product_topk",
    "ranks",
    "scatter_rows",
    "segment_sum",
    "segment_sum_and_norm",
    "select_topk",
    "sort_pairs",
    "squared_norm",
    "weight_gradient",
    "weighted_sum",
]
