"""Experts in a table's rows, one pair at a time in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mempool.kernels.arguments import Paged
from mempool.kernels.reference.bags import arena_row
from mempool.kernels.reference.elements import read_values

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def expert_sums(paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, inputs: Tensor, act: str) -> Tensor:
    """out[b] = sum over the bag's pairs that are here of gates[i] * act(<u, inputs[b]>) * v, [u, v] = V[ids[i]]."""
    bounds, values, input_dim = offsets.tolist(), read_values(paged), inputs.shape[1]
    out = torch.zeros(len(bounds) - 1, paged.width - input_dim, dtype=torch.float64)
    for bag, (first, end) in enumerate(itertools.pairwise(bounds)):
        for pair in range(first, end):
            row = arena_row(paged, int(ids[pair]))
            if row >= 0:
                gate = 1.0 if gates is None else float(gates[pair])
                product = inputs[bag].double().cpu() @ values[row, :input_dim]
                out[bag] += gate * _ACTS[act](product) * values[row, input_dim:]
    return out


def expert_gradients(
    paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, grads: Tensor, input_dim: int, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_inputs [B, I], d_gates [L], and what multiplies x in u's and dY in v's gradient, [L] each; act's derivative by
    torch's autograd."""
    bounds, values, both = offsets.tolist(), read_values(paged), grads.double().cpu()
    input_grad = torch.zeros(len(bounds) - 1, input_dim, dtype=torch.float64)
    gate_grad, of_u, of_v = (torch.zeros(ids.numel(), dtype=torch.float64) for _ in range(3))
    for bag, (first, end) in enumerate(itertools.pairwise(bounds)):
        for pair in range(first, end):
            row = arena_row(paged, int(ids[pair]))
            if row < 0:
                continue
            gate = 1.0 if gates is None else float(gates[pair])
            u, v = values[row, :input_dim], values[row, input_dim:]
            product = (both[bag, :input_dim] @ u).requires_grad_()
            answer = _ACTS[act](product)
            (slope,) = torch.autograd.grad(answer, product)
            along = both[bag, input_dim:] @ v
            gate_grad[pair] = answer.detach() * along
            of_u[pair] = gate * slope * along
            of_v[pair] = gate * answer.detach()
            input_grad[bag] += of_u[pair] * u
    return input_grad, gate_grad, of_u, of_v
