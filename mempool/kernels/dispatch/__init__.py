"""Each function of the kernels' contract: arguments are checked, the device picks the implementation."""

from mempool.kernels.dispatch.admission import admit_bags
from mempool.kernels.dispatch.bags import (
    array_sums,
    gather_rows,
    initial_values,
    scatter_rows,
    weight_gradient,
    weighted_sum,
)
from mempool.kernels.dispatch.dealing import deal_pairs
from mempool.kernels.dispatch.experts import EXPERT_ACTS, ExpertGradients, expert_gradients, expert_sums
from mempool.kernels.dispatch.groups import grouped_topk
from mempool.kernels.dispatch.topk import (
    best_sums,
    flat_topk,
    parts_topk,
    product_gradient,
    product_indices,
    product_select,
    product_topk,
    select_topk,
)
from mempool.kernels.dispatch.updates import (
    add_segments,
    catch_up,
    fused_step,
    optimizer_step,
    segment_sum,
    segment_sum_and_norm,
    sort_pairs,
    squared_norm,
)

__all__ = [
    "EXPERT_ACTS",
    "ExpertGradients",
    "add_segments",
    "admit_bags",
    "array_sums",
    "best_sums",
    "catch_up",
    "deal_pairs",
    "expert_gradients",
    "expert_sums",
    "flat_topk",
    "fused_step",
    "gather_rows",
    "grouped_topk",
    "initial_values",
    "optimizer_step",
    "parts_topk",
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
    "weight_gradient",
    "weighted_sum",
]
