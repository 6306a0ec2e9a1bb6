"""Experts in a table's rows in torch's own operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mempool.kernels.arguments import Paged
from mempool.kernels.checking import check_offsets
from mempool.kernels.torch_ops.bags import bag_of_pairs, chunks, locate
from mempool.kernels.torch_ops.elements import read_rows


def activated(products: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """act of each product, and its derivative there; that of relu at 0 is 0, as in torch."""
    if act == "relu":
        return F.relu(products), (products > 0).to(products.dtype)
    if act == "silu":
        share = torch.sigmoid(products)
        return products * share, share * (1 + products * (1 - share))
    share = 0.5 * (1 + torch.erf(products * math.sqrt(0.5)))
    return products * share, share + products * torch.exp(-0.5 * products * products) / math.sqrt(2 * math.pi)


def expert_sums(paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, inputs: Tensor, act: str) -> Tensor:
    """See mempool.kernels.expert_sums."""
    check_offsets(offsets, ids.numel())
    input_dim = inputs.shape[1]
    sums = torch.zeros(inputs.shape[0], paged.width - input_dim, dtype=torch.float32, device=paged.rows.device)
    rows, here = locate(paged, ids)
    bags = bag_of_pairs(offsets, ids.numel())
    rows, bags, gates = rows[here], bags[here], None if gates is None else gates[here]
    for first, end in chunks(rows.numel(), paged.width):
        values, of = read_rows(paged, rows[first:end]), bags[first:end]
        answers, _ = activated((values[:, :input_dim] * inputs[of]).sum(dim=1), act)
        weights = answers if gates is None else answers * gates[first:end]
        sums.index_add_(0, of, values[:, input_dim:] * weights[:, None])
    return sums


def expert_gradients(
    paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, grads: Tensor, input_dim: int, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See mempool.kernels.expert_gradients."""
    check_offsets(offsets, ids.numel())
    device = paged.rows.device
    input_grad = torch.zeros(grads.shape[0], input_dim, dtype=torch.float32, device=device)
    gate_grad, of_u, of_v = torch.zeros(3, ids.numel(), dtype=torch.float32, device=device)
    rows, here = locate(paged, ids)
    bags = bag_of_pairs(offsets, ids.numel())
    for first, end in chunks(ids.numel(), paged.width):
        part = here[first:end].nonzero().squeeze(1) + first
        values, of = read_rows(paged, rows[part]), bags[part]
        products = values * grads[of]
        answers, slopes = activated(products[:, :input_dim].sum(dim=1), act)
        along = products[:, input_dim:].sum(dim=1)
        gate = 1.0 if gates is None else gates[part]
        gate_grad[part], of_u[part], of_v[part] = answers * along, gate * slopes * along, gate * answers
        input_grad.index_add_(0, of, values[:, :input_dim] * of_u[part, None])
    return input_grad, gate_grad, of_u, of_v
