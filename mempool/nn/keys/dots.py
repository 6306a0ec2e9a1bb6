"""Products of queries with the keys that were chosen for them, as operators: what keys get a gradient of.

Shape legend: M queries, R keys, K keys of a query, D their width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mempool.nn.keys.product import alias

# Elements of chosen keys held at once.
_CHUNK_ELEMENTS = 1 << 22


def dots(queries_MD: Tensor, keys_RD: Tensor, index_MK: Tensor) -> Tensor:
    """``<queries[m], keys[index[m, k]]>``, [M, K] float32: differentiable once, the graph keeps none of the keys.

    Args:
        queries_MD, keys_RD: Float32.
        index_MK: int64, below R.
    """
    found: Tensor = torch.ops.mempool.dots(queries_MD, keys_RD, index_MK)
    return found


def parts_of(ids: Tensor, ways: int, size: int) -> tuple[Tensor, ...]:
    """Half-keys of slots: the digits of their ids, to the base ``size``, the first the highest."""
    found = []
    for _ in range(ways - 1):
        ids, digit = ids // size, ids % size
        found.append(digit)
    return ids, *reversed(found)


def product_scores(queries_BHD: Tensor, keys_HPNd: Tensor, ids_BHK: Tensor) -> Tensor:
    """Scores [B, H, K] float32 of any slots by product keys of P parts; differentiable in queries and keys."""
    heads, ways, size, width = keys_HPNd.shape
    index = torch.stack(parts_of(ids_BHK, ways, size), dim=2)
    codebooks = torch.arange(heads * ways, dtype=torch.int64, device=index.device).view(heads, ways, 1)
    places = (index + codebooks * size).flatten(0, 2)
    found = dots(queries_BHD.reshape(-1, width), keys_HPNd.reshape(-1, width), places)
    return found.view(index.shape).sum(2)


@torch.library.custom_op("mempool::dots", mutates_args=())
def _dots_op(queries: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    keys = alias(keys)
    found = queries.new_empty(index.shape)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, index.shape[1] * keys.shape[1]))
    for first in range(0, index.shape[0], chunk):
        part = slice(first, first + chunk)
        # A sum over the last dimension, not a matrix product: its order is the same in every batch.
        found[part] = (keys[index[part]] * queries[part, None, :]).sum(-1)
    return found


@_dots_op.register_fake
def _(queries: Tensor, keys: Tensor, index: Tensor) -> Tensor:  # noqa: ARG001
    return queries.new_empty(index.shape)


@torch.library.custom_op("mempool::dots_gradient", mutates_args=())
def dots_gradient(queries: Tensor, keys: Tensor, index: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sum of ``grads * dots``: [M, D] and [R, D], each summed in a fixed order."""
    keys, grads = alias(keys), grads.contiguous()
    key_grads = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device)
    if index.numel() == 0:
        return torch.zeros_like(queries), key_grads
    of_queries = F.embedding_bag(index, keys, mode="sum", per_sample_weights=grads)
    by_key, order = torch.sort(index.flatten(), stable=True)
    distinct, counts = torch.unique_consecutive(by_key, return_counts=True)
    key_grads[distinct] = F.embedding_bag(
        order // index.shape[1],
        queries,
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=grads.flatten()[order],
    )
    return of_queries, key_grads


@dots_gradient.register_fake
def _(queries: Tensor, keys: Tensor, index: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(queries), torch.empty_like(keys)


def _set_up(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grads: Tensor) -> tuple[Tensor, Tensor, None]:
    with torch.autocast(grads.device.type, enabled=False):
        of_queries, of_keys = dots_gradient(*ctx.saved_tensors, grads)
    return of_queries, of_keys, None


_dots_op.register_autograd(_backward, setup_context=_set_up)
