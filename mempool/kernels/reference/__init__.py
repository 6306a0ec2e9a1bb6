"""What every kernel means: plain torch in float64, one pair and one row at a time, for tests and for reading.

Tensors come back in float64 where kernels return float32; ``initial_values``, ``random_bits`` and the rounding of
elements, which are defined to the bit, are the exception. Nothing here is fast.
"""

from mempool.kernels.reference.bags import arena_row, gather_rows, scatter_rows, weight_gradient, weighted_sum
from mempool.kernels.reference.elements import (
    decode,
    encode,
    random_bits,
    read_values,
    to_bfloat16,
    write_values,
)
from mempool.kernels.reference.experts import expert_gradients, expert_sums
from mempool.kernels.reference.initial import initial_values
from mempool.kernels.reference.topk import flat_topk, product_gradient, product_select, product_topk, select_topk
from mempool.kernels.reference.updates import (
    catch_up,
    optimizer_step,
    segment_sum,
    sort_pairs,
    squared_norm,
    table_columns,
)

__all__ = [
    "arena_row",
    "catch_up",
    "decode",
    "encode",
    "expert_gradients",
    "expert_sums",
    "flat_topk",
    "gather_rows",
    "initial_values",
    "optimizer_step",
    "product_gradient",
    "product_select",
    "product_topk",
    "random_bits",
    "read_values",
    "scatter_rows",
    "segment_sum",
    "select_topk",
    "sort_pairs",
    "squared_norm",
    "table_columns",
    "to_bfloat16",
    "weight_gradient",
    "weighted_sum",
    "write_values",
]
