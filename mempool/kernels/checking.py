"""Checks of shapes, dtypes and devices before a kernel reads raw memory. The range of ids is the server's to check."""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import STATE_NAMES, OptimizerStep, Paged, SortedPairs, num_blocks


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {device}, where the other tensors are")


def check_matrix(name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """A matrix of exactly this shape, dtype and device."""
    _check(name, tensor, shape, dtype, device)


def check_ids(paged: Paged, ids: Tensor) -> None:
    """Slot ids: [L] int64 beside the arena."""
    _check("ids", ids, (ids.numel(),), torch.int64, paged.rows.device)


def check_bags(paged: Paged, ids: Tensor, offsets: Tensor) -> None:
    """Slot ids and the offsets of their bags. Offsets' values are read on the CPU only: on a GPU that would wait."""
    check_ids(paged, ids)
    _check("offsets", offsets, (max(1, offsets.numel()),), torch.int64, paged.rows.device)
    if offsets.device.type != "cpu":
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != ids.numel():
        raise ValueError(
            f"offsets must run from 0 to the number of ids, {ids.numel()}; they run from {int(offsets[0])}"
            f" to {int(offsets[-1])}"
        )
    if not bool((offsets[1:] >= offsets[:-1]).all()):
        raise ValueError(f"offsets must not fall; they do after bag {int((offsets.diff() < 0).nonzero()[0])}")


def check_weights(weights: Tensor | None, ids: Tensor) -> None:
    """Weights, if given: one float32 for each id."""
    if weights is not None:
        _check("weights", weights, (ids.numel(),), torch.float32, ids.device)


def check_sorted(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> None:
    """Sorted pairs, the bag of every pair, and a gradient for every bag."""
    device = pairs.rows.device
    _check("bags", bags, (bags.numel(),), torch.int64, device)
    _check("grads", grads, (grads.shape[0], grads.numel() // max(1, grads.shape[0])), torch.float32, device)
    check_weights(weights, bags)
    if bags.numel() < pairs.order.numel():
        raise ValueError(
            f"bags must name the bag of every sorted pair: {bags.numel()} bags, {pairs.order.numel()} pairs"
        )


def check_state(paged: Paged, state: dict[str, Tensor], step: OptimizerStep) -> None:
    """The state tensors that the algorithm keeps, beside the arena."""
    num_rows, width = paged.rows.shape
    for name in STATE_NAMES[step.algorithm]:
        if name not in state:
            raise ValueError(f"{step.algorithm} needs the state {name!r}; got {sorted(state)}")
        columns = num_blocks(width, step.block_dim) if name == "row_sum" else width
        _check(f"state[{name!r}]", state[name], (num_rows, columns), torch.float32, paged.rows.device)
        if not state[name].is_contiguous():
            raise ValueError(f"state[{name!r}] must be contiguous, it is written in place")


def check_topk(name: str, scores: Tensor, k: int, most: int) -> None:
    """A float32 matrix and a number of winners that exists in it."""
    if scores.dim() != 2 or scores.dtype != torch.float32:
        raise ValueError(f"{name} must be float32 [M, n], got {scores.dtype} {list(scores.shape)}")
    if not 1 <= k <= most:
        raise ValueError(f"k must lie in 1..{most}, got {k}")


def check_product_keys(queries: Tensor, keys: Tensor, k: int, stride: int) -> None:
    """[B, H, D] queries against [H, 2, n, D // 2] half-keys."""
    if queries.dim() != 3 or keys.dim() != 4:
        raise ValueError(
            f"queries must be [B, H, D] and keys [H, 2, n, D // 2], got {list(queries.shape)} and {list(keys.shape)}"
        )
    num_queries, num_heads, dim = queries.shape
    num_keys = keys.shape[2]
    _check("queries", queries, (num_queries, num_heads, dim), torch.float32, queries.device)
    _check("keys", keys, (num_heads, 2, num_keys, dim // 2), torch.float32, queries.device)
    if dim % 2:
        raise ValueError(f"the key dim must be even, it is cut in two halves; got {dim}")
    check_product_selection(num_keys, k, stride)


def check_product_selection(num_keys: int, k: int, stride: int) -> None:
    """k winners among n * n products, ids that do not collide."""
    if not 1 <= k <= num_keys * num_keys:
        raise ValueError(f"k must lie in 1..{num_keys * num_keys} (n * n), got {k}")
    if stride < num_keys:
        raise ValueError(f"stride must be at least the {num_keys} half-keys of a codebook, got {stride}")
