"""Experts in a table's rows on the GPU: products and sums by the kernels of bags, in between one number a pair.

Rows are read once for their products and once for their sums; nothing as large as they are is kept between.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mempool.kernels.arguments import Paged
from mempool.kernels.gpu.bags import weight_gradient, weighted_sum
from mempool.kernels.torch_ops.experts import activated


def expert_sums(paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, inputs: Tensor, act: str) -> Tensor:
    """See mempool.kernels.expert_sums."""
    input_dim = inputs.shape[1]
    products = weight_gradient(paged, ids, offsets, F.pad(inputs, (0, paged.width - input_dim)))
    answers, _ = activated(products, act)
    weights = answers if gates is None else answers * gates
    return weighted_sum(paged, ids, weights, offsets, torch.float32)[:, input_dim:].contiguous()


def expert_gradients(
    paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, grads: Tensor, input_dim: int, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See mempool.kernels.expert_gradients."""
    along_u, along_v = torch.zeros_like(grads), torch.zeros_like(grads)
    along_u[:, :input_dim], along_v[:, input_dim:] = grads[:, :input_dim], grads[:, input_dim:]
    answers, slopes = activated(weight_gradient(paged, ids, offsets, along_u), act)
    along = weight_gradient(paged, ids, offsets, along_v)
    of_u = slopes * along if gates is None else gates * slopes * along
    of_v = answers if gates is None else gates * answers
    input_grad = weighted_sum(paged, ids, of_u, offsets, torch.float32)[:, :input_dim].contiguous()
    return input_grad, answers * along, of_u, of_v
