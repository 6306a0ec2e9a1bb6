"""Reading and writing an arena, one pair at a time in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.reference.elements import read_values, write_values


def arena_row(paged: Paged, slot: int) -> int:
    """Arena row of a slot, -1 if it is not here."""
    page = slot >> paged.page_shift
    if not 0 <= page < paged.page_table.numel() or int(paged.page_table[page]) < 0:
        return -1
    return int(paged.page_table[page]) << paged.page_shift | slot & ((1 << paged.page_shift) - 1)


def weighted_sum(paged: Paged, ids: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """out[b] = sum of weights[i] * V[ids[i]] over the bag's pairs that are here."""
    bounds, values = offsets.tolist(), read_values(paged)
    out = torch.zeros(len(bounds) - 1, paged.width, dtype=torch.float64)
    for bag, (first, end) in enumerate(itertools.pairwise(bounds)):
        for pair in range(first, end):
            row = arena_row(paged, int(ids[pair]))
            if row >= 0:
                weight = 1.0 if weights is None else float(weights[pair])
                out[bag] += weight * values[row]
    return out


def gather_rows(paged: Paged, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """out[i] = V[ids[i]], zeros where not here: the stored bits, or read as float32 and rounded to ``dtype``."""
    values = paged.rows.cpu() if paged.packed is None else read_values(paged).float()
    out = torch.zeros(ids.numel(), paged.width, dtype=dtype or paged.value_dtype)
    for position, slot in enumerate(ids.tolist()):
        row = arena_row(paged, slot)
        if row >= 0:
            out[position] = values[row].to(out.dtype)
    return out


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """V[ids[i]] = values[i], one after the other, so the last of repeated ids wins."""
    for position, slot in enumerate(ids.tolist()):
        row = arena_row(paged, slot)
        if row >= 0:
            write_values(paged, torch.tensor([row]), values[position : position + 1])


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor) -> Tensor:
    """out[i] = <grads[bag of i], V[ids[i]]>, 0 where not here."""
    bounds, values = offsets.tolist(), read_values(paged)
    out = torch.zeros(ids.numel(), dtype=torch.float64)
    for bag, (first, end) in enumerate(itertools.pairwise(bounds)):
        for pair in range(first, end):
            row = arena_row(paged, int(ids[pair]))
            if row >= 0:
                out[pair] = grads[bag].double().cpu() @ values[row]
    return out
