"""Checks of shapes, dtypes and devices before a kernel reads raw memory. The range of ids is the server's to check.

What must lie in a range is looked at on the CPU only: on a GPU that would wait for the device. Kernels of a GPU keep
offsets among the pairs themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.layout import num_blocks
from mempool.kernels.steps import BLOCK_STATE, LAST_STEP, MASTER, STATE_NAMES, DenseSchedule, OptimizerStep

OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32, torch.uint32)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {device}, where the other tensors are")


def _check_range(name: str, tensor: Tensor, below: int) -> None:
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    least, largest = (int(bound) for bound in tensor.aminmax())
    if least < 0 or largest >= below:
        raise ValueError(f"{name} must lie in 0..{below - 1}, got {least if least < 0 else largest}")


def check_matrix(name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """A matrix of exactly this shape, dtype and device."""
    _check(name, tensor, shape, dtype, device)


def check_ids(paged: Paged, ids: Tensor) -> Tensor:
    """Slot ids: [L] int64, int32 or uint32 beside the arena. Returns them as kernels read them, int64 or int32."""
    if ids.dtype not in ID_DTYPES or ids.dim() != 1:
        raise ValueError(f"ids must be [L] int64, int32 or uint32, got {ids.dtype} {list(ids.shape)}")
    if ids.device != paged.rows.device:
        raise ValueError(f"ids is on {ids.device}, but must be on {paged.rows.device}, where the other tensors are")
    if ids.dtype != torch.uint32:
        return ids
    # Where no page reaches that far, those from 2**31 on are not here, as little as those below 0 are.
    narrow = paged.page_table.numel() << paged.page_shift <= 2**31
    return ids.view(torch.int32) if narrow else ids.to(torch.int64)


def check_bags(paged: Paged, ids: Tensor, offsets: Tensor) -> Tensor:
    """Slot ids, returned as by ``check_ids``, and the offsets of their bags, which implementations look at."""
    _check("offsets", offsets, (max(1, offsets.numel()),), torch.int64, paged.rows.device)
    return check_ids(paged, ids)


def check_offsets(offsets: Tensor, num_ids: int) -> None:
    """Offsets on the CPU that are places among the pairs. They are compared: their differences can leave int64."""
    if offsets.device.type != "cpu":
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_ids:
        raise ValueError(
            f"offsets must run from 0 to the number of ids, {num_ids}; they run from {int(offsets[0])}"
            f" to {int(offsets[-1])}"
        )
    # Compared in pairs: differences of numbers that far apart would wrap.
    falls = offsets[1:] < offsets[:-1]
    if bool(falls.any()):
        raise ValueError(f"offsets must not fall; they do after bag {int(falls.nonzero()[0])}")


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
    _check_range("bags", bags, grads.shape[0])


def check_output(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Where a result is to be written, if that is given: contiguous, of just its shape, dtype and device."""
    if out is not None:
        _check("out", out, shape, dtype, device)
        if not out.is_contiguous():
            raise ValueError("out must be contiguous, it is written in place")


def check_output_dtype(dtype: torch.dtype) -> None:
    """A dtype that sums and rows can be asked for."""
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, OUTPUT_DTYPES))}, got {dtype}")


def check_segments(sums: Tensor, places: Tensor, pairs: SortedPairs, width: int) -> None:
    """Sums to add to, and the row of them for every distinct row of the pairs."""
    _check("sums", sums, (sums.shape[0], width), torch.float32, pairs.rows.device)
    _check("places", places, (pairs.rows.numel(),), torch.int64, pairs.rows.device)
    _check_range("places", places, sums.shape[0])
    if not sums.is_contiguous():
        raise ValueError("sums must be contiguous, they are written in place")


def check_state(paged: Paged, state: dict[str, Tensor], step: OptimizerStep) -> None:
    """The state tensors that the algorithm keeps, beside the arena, and the rounding's columns."""
    _check_state(paged, state, STATE_NAMES[step.algorithm], step.block_dim, step.algorithm)
    if not math.isinf(step.max_norm) and step.block_dim < paged.width:
        raise ValueError(
            f"max_norm is of whole rows, of one block: the step has blocks of {step.block_dim}, the arena has"
            f" {paged.width} columns"
        )
    if paged.packed is not None and paged.packed.block_dim != step.block_dim:
        raise ValueError(
            f"the arena has one scale per {paged.packed.block_dim} columns, the step has blocks of {step.block_dim}"
        )
    if step.rounding is not None:
        columns = (num_blocks(paged.width, step.block_dim),)
        _check("rounding.columns", step.rounding.columns, columns, torch.int64, paged.rows.device)


def check_catch_up(
    paged: Paged, state: dict[str, Tensor], rows: Tensor, schedule: DenseSchedule, to: int, block_dim: int
) -> None:
    """The state of a dense AdamW, and a step that the schedule knows."""
    _check("rows", rows, (rows.numel(),), torch.int64, paged.rows.device)
    _check_range("rows", rows, paged.rows.shape[0])
    _check_state(paged, state, (*STATE_NAMES["adamw"], LAST_STEP), block_dim, "dense adamw")
    if paged.rows.dtype != torch.float32 and MASTER not in state:
        raise ValueError(f"dense adamw needs float32 values or a master of them; the arena is {paged.element}")
    if not schedule.first_step - 1 <= to <= schedule.last_step:
        raise ValueError(
            f"cannot catch up to step {to}: steps {schedule.first_step} to {schedule.last_step} are recorded"
        )


def _check_state(
    paged: Paged, state: dict[str, Tensor], names: tuple[str, ...], block_dim: int, algorithm: str
) -> None:
    for name in (*names, *((MASTER,) if MASTER in state else ())):
        if name not in state:
            raise ValueError(f"{algorithm} needs the state {name!r}; got {sorted(state)}")
        columns = num_blocks(paged.width, block_dim) if name in BLOCK_STATE else paged.width
        dtype = torch.int32 if name == LAST_STEP else torch.float32
        _check(f"state[{name!r}]", state[name], (paged.rows.shape[0], columns), dtype, paged.rows.device)
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


def check_parts(queries: Tensor, keys: Tensor, k: int, ranges: tuple[tuple[int, int], ...]) -> None:
    """[B, H, P * d] queries against some of [H, P, n, d] half-keys."""
    if queries.dim() != 3 or keys.dim() != 4:
        raise ValueError(
            f"queries must be [B, H, P * d] and keys [H, P, n, d], got {list(queries.shape)} and {list(keys.shape)}"
        )
    num_queries, num_heads, _ = queries.shape
    _, parts, num_keys, width = keys.shape
    _check("queries", queries, (num_queries, num_heads, parts * width), torch.float32, queries.device)
    _check("keys", keys, (num_heads, parts, num_keys, width), torch.float32, queries.device)
    if len(ranges) != parts or not all(0 <= first < end <= num_keys for first, end in ranges):
        raise ValueError(f"ranges must be (first, end) of each of {parts} parts, within {num_keys}; got {ranges}")
    if not 1 <= k <= math.prod(end - first for first, end in ranges):
        raise ValueError(f"k must lie in 1..products of ranges {ranges}, got {k}")


def check_product_selection(num_keys: int, k: int, stride: int) -> None:
    """k winners among n * n products, ids that do not collide."""
    if not 1 <= k <= num_keys * num_keys:
        raise ValueError(f"k must lie in 1..{num_keys * num_keys} (n * n), got {k}")
    if stride < num_keys:
        raise ValueError(f"stride must be at least the {num_keys} half-keys of a codebook, got {stride}")


def check_product_gradient(queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor) -> None:
    """Chosen half-keys of every query and head, and a gradient for each score."""
    check_product_keys(queries, keys, 1, keys.shape[2])
    shape = (*queries.shape[:2], grads.shape[-1])
    _check("index1", index1, shape, torch.int64, queries.device)
    _check("index2", index2, shape, torch.int64, queries.device)
    _check_range("index1", index1, keys.shape[2])
    _check_range("index2", index2, keys.shape[2])
    _check("grads", grads, shape, torch.float32, queries.device)
