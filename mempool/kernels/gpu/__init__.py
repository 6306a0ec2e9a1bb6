"""The GPU implementation: Triton kernels, sorting left to torch. Arguments are checked by mempool.kernels.

Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly.
"""

from mempool.kernels.gpu.bags import gather_rows, scatter_rows, weight_gradient, weighted_sum
from mempool.kernels.gpu.topk import flat_topk, product_select, product_topk, select_topk
from mempool.kernels.gpu.updates import fused_step, optimizer_step, segment_sum, squared_norm
from mempool.kernels.torch_ops import initial_values, sort_pairs

__all__ = [
    "flat_topk",
    "fused_step",
    "gather_rows",
    "initial_values",
    "optimizer_step",
    "product_select",
    "product_topk",
    "scatter_rows",
    "segment_sum",
    "select_topk",
    "sort_pairs",
    "squared_norm",
    "weight_gradient",
    "weighted_sum",
]
