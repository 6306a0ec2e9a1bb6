"""Rows that are experts [u, v]: the sum of what a bag's experts answer to its input, and the gradients of that.

Legend: B bags, L pairs in all bags, W arena row width, I columns of u.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.checking import check_bags, check_matrix, check_weights
from mempool.kernels.implementation import implementation_for

EXPERT_ACTS = ("gelu", "relu", "silu")
"""What an expert does to its product; gelu: the exact one, of erf."""


class ExpertGradients(NamedTuple):
    """Gradients of ``expert_sums``, float32; 0 for pairs that are not here.

    Attributes:
        inputs: [B, I].
        gates: [L].
        of_u: [L]: a pair's part of u's gradient is this times the bag's input.
        of_v: [L]: and of v's, this times the gradient of the bag's sum.
    """

    inputs: Tensor
    gates: Tensor
    of_u: Tensor
    of_v: Tensor


def expert_sums(
    paged: Paged, ids: Tensor, gates: Tensor | None, offsets: Tensor, inputs: Tensor, *, act: str
) -> Tensor:
    """Sum what the experts of each bag answer: gate * act(<u, input>) * v, of rows [u, v].

    Products and sums are accumulated in float32; the sum pair after pair, every column apart from the others.

    Args:
        paged: The rows.
        ids: [L] int64, int32 or uint32 slot ids; pairs that are not here contribute nothing.
        gates: [L] float32, or None for all ones.
        offsets: [B + 1] int64, as in weighted_sum.
        inputs: [B, I] float32, I below W.
        act: One of EXPERT_ACTS.

    Returns:
        [B, W - I] float32.

    Raises:
        ValueError: A tensor has another shape, dtype or device, an unknown act, or wrong offsets (on the CPU).
    """
    ids = check_bags(paged, ids, offsets)
    check_weights(gates, ids)
    input_dim = inputs.shape[1] if inputs.dim() == 2 else 0
    _check_split(paged, input_dim, act)
    check_matrix("inputs", inputs, (offsets.numel() - 1, input_dim), torch.float32, paged.rows.device)
    own = inputs.contiguous()
    return implementation_for(paged.rows.device).expert_sums(paged, ids, gates, offsets, own, act)


def expert_gradients(
    paged: Paged,
    ids: Tensor,
    gates: Tensor | None,
    offsets: Tensor,
    grads: Tensor,
    input_dim: int,
    *,
    act: str,
) -> ExpertGradients:
    """Gradients of ``expert_sums`` by inputs and gates, and what makes those of the rows.

    Args:
        paged, ids, gates, offsets, act: As of ``expert_sums``.
        grads: [B, W] float32: each bag's input, and beside it the gradient of its sum.
        input_dim: I.

    Raises:
        ValueError: As ``expert_sums``.
    """
    ids = check_bags(paged, ids, offsets)
    check_weights(gates, ids)
    _check_split(paged, input_dim, act)
    check_matrix("grads", grads, (offsets.numel() - 1, paged.width), torch.float32, paged.rows.device)
    own = grads.contiguous()
    found = implementation_for(paged.rows.device).expert_gradients(paged, ids, gates, offsets, own, input_dim, act)
    return ExpertGradients(*found)


def _check_split(paged: Paged, input_dim: int, act: str) -> None:
    if act not in EXPERT_ACTS:
        raise ValueError(f"act must be one of {', '.join(EXPERT_ACTS)}, got {act!r}")
    if not 1 <= input_dim < paged.width:
        raise ValueError(f"rows of {paged.width} columns are experts of 1 to {paged.width - 1} inputs, got {input_dim}")
