"""What every kernel means: plain torch in float64, one pair and one row at a time, for tests and for reading.

Tensors come back in float64 where kernels return float32; initial_values, which is defined to the bit, is the
exception. Nothing here is fast.
"""

from __future__ import annotations

import itertools
from functools import cmp_to_key

import torch
from torch import Tensor

from mempool.kernels.arguments import OptimizerStep, Paged, SortedPairs, num_blocks

_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def arena_row(paged: Paged, slot: int) -> int:
    """Arena row of a slot, -1 if it is not here."""
    page = slot >> paged.page_shift
    if not 0 <= page < paged.page_table.numel() or int(paged.page_table[page]) < 0:
        return -1
    return int(paged.page_table[page]) << paged.page_shift | slot & ((1 << paged.page_shift) - 1)


def weighted_sum(paged: Paged, ids: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """out[b] = sum of weights[i] * V[ids[i]] over the bag's pairs that are here."""
    bounds = offsets.tolist()
    out = torch.zeros(len(bounds) - 1, paged.rows.shape[1], dtype=torch.float64)
    for bag, (first, end) in enumerate(itertools.pairwise(bounds)):
        for pair in range(first, end):
            row = arena_row(paged, int(ids[pair]))
            if row >= 0:
                weight = 1.0 if weights is None else float(weights[pair])
                out[bag] += weight * paged.rows[row].double().cpu()
    return out


def gather_rows(paged: Paged, ids: Tensor) -> Tensor:
    """out[i] = V[ids[i]] in the storage dtype, zeros where not here."""
    out = torch.zeros(ids.numel(), paged.rows.shape[1], dtype=paged.rows.dtype)
    for position, slot in enumerate(ids.tolist()):
        row = arena_row(paged, slot)
        if row >= 0:
            out[position] = paged.rows[row]
    return out


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """V[ids[i]] = values[i], one after the other, so the last of repeated ids wins."""
    for position, slot in enumerate(ids.tolist()):
        row = arena_row(paged, slot)
        if row >= 0:
            paged.rows[row] = values[position]


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor) -> Tensor:
    """out[i] = <grads[bag of i], V[ids[i]]>, 0 where not here."""
    bounds = offsets.tolist()
    out = torch.zeros(ids.numel(), dtype=torch.float64)
    for bag, (first, end) in enumerate(itertools.pairwise(bounds)):
        for pair in range(first, end):
            row = arena_row(paged, int(ids[pair]))
            if row >= 0:
                out[pair] = grads[bag].double().cpu() @ paged.rows[row].double().cpu()
    return out


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """Pairs that are here by (slot id, position)."""
    slots = ids.tolist()
    order = sorted((pair for pair in range(len(slots)) if arena_row(paged, slots[pair]) >= 0), key=slots.__getitem__)
    starts = [place for place, pair in enumerate(order) if place == 0 or slots[pair] != slots[order[place - 1]]]
    rows = [arena_row(paged, slots[order[place]]) for place in starts]
    return SortedPairs(
        order=torch.tensor(order, dtype=torch.int64),
        rows=torch.tensor(rows, dtype=torch.int64),
        starts=torch.tensor([*starts, len(order)], dtype=torch.int64),
    )


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """out[u] = sum of weights[i] * grads[bags[i]] over the pairs i of segment u."""
    bounds = pairs.starts.tolist()
    out = torch.zeros(len(bounds) - 1, grads.shape[1], dtype=torch.float64)
    for segment, (first, end) in enumerate(itertools.pairwise(bounds)):
        for pair in pairs.order[first:end].tolist():
            weight = 1.0 if weights is None else float(weights[pair])
            out[segment] += weight * grads[bags[pair]].double().cpu()
    return out


def optimizer_step(
    values: Tensor, state: dict[str, Tensor], sorted_rows: Tensor, sums: Tensor, step: OptimizerStep
) -> None:
    """The optimizer's formulas on float64 ``values`` [R, W] and float64 ``state``, in place."""
    rows, grads = sorted_rows.cpu(), sums.double().cpu() * step.grad_scale
    if step.algorithm == "sgd":
        values[rows] -= step.step_size * grads
    elif step.algorithm == "adagrad":
        state["sum"][rows] += grads**2
        values[rows] -= step.step_size * grads / (state["sum"][rows].sqrt() + step.eps)
    elif step.algorithm == "rowwise_adagrad":
        for block in range(num_blocks(grads.shape[1], step.block_dim)):
            columns = slice(block * step.block_dim, (block + 1) * step.block_dim)
            state["row_sum"][rows, block] += (grads[:, columns] ** 2).mean(dim=1)
            divisor = state["row_sum"][rows, block].sqrt()[:, None] + step.eps
            values[rows, columns] -= step.step_size * grads[:, columns] / divisor
    else:
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first[rows] = step.beta1 * first[rows] + (1 - step.beta1) * grads
        second[rows] = step.beta2 * second[rows] + (1 - step.beta2) * grads**2
        values[rows] -= step.step_size * first[rows] / (second[rows].sqrt() + step.eps)


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """Sum of squares in float64 and whether all elements are finite."""
    return float(sums.double().square().sum()), bool(torch.isfinite(sums).all())


def _before(score: float, other: float) -> int:
    """Negative if ``score`` comes before ``other``: descending, NaN last."""
    if score != score or other != other:
        return (score != score) - (other != other)
    return (score < other) - (score > other)


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions by (score descending, NaN last, position ascending), the first k."""
    index = torch.empty(scores.shape[0], k, dtype=torch.int64)
    for row, values in enumerate(scores.tolist()):
        key = cmp_to_key(lambda a, b, values=values: _before(values[a], values[b]))  # type: ignore[misc]
        index[row] = torch.tensor(sorted(range(len(values)), key=key)[:k])  # sorted is stable: ties by position
    return scores.cpu().gather(1, index), index


def product_select(scores1: Tensor, scores2: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """Two-stage selection of the paper: top-k of each half, their sums in float32, top-k of those by (score, id)."""
    half_k = min(k, scores1.shape[1])
    half1, index1 = select_topk(scores1, half_k)
    half2, index2 = select_topk(scores2, half_k)
    sums = (half1[:, :, None] + half2[:, None, :]).flatten(1)
    ids = (index1[:, :, None] * stride + index2[:, None, :]).flatten(1)
    by_id = ids.argsort(dim=1)
    _, position = select_topk(sums.gather(1, by_id), k)
    best = ids.gather(1, by_id).gather(1, position)
    return best // stride, best % stride


def product_topk(queries: Tensor, keys: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """product_select on float64 products of queries and half-keys. (Ties in float64 need not be ties in float32.)"""
    num_queries, num_heads, dim = queries.shape
    halves = queries.double().cpu().reshape(num_queries, num_heads, 2, dim // 2)
    scores = torch.einsum("bhcd,hcnd->cbhn", halves, keys.double().cpu())
    scores1, scores2 = scores.reshape(2, num_queries * num_heads, keys.shape[2])
    index1, index2 = product_select(scores1, scores2, k, stride)
    best = scores1.gather(1, index1) + scores2.gather(1, index2)
    shape = (num_queries, num_heads, k)
    return best.reshape(shape), (index1 * stride + index2).reshape(shape)


def flat_topk(queries: Tensor, keys: Paged, k: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """Brute force over the slots that are here; a slot whose score is NaN is no candidate."""
    slots = [slot for slot in range(num_slots) if arena_row(keys, slot) >= 0]
    table = keys.rows[[arena_row(keys, slot) for slot in slots]].double().cpu()
    scores = torch.full((queries.shape[0], k), -torch.inf, dtype=torch.float64)
    ids = torch.full((queries.shape[0], k), -1, dtype=torch.int64)
    for row in range(queries.shape[0]):
        found = [(s, i) for s, i in zip((table @ queries[row].double().cpu()).tolist(), slots, strict=True) if s == s]
        best = sorted(found, key=lambda pair: (-pair[0], pair[1]))[:k]
        for place, (score, slot) in enumerate(best):
            scores[row, place], ids[row, place] = score, slot
    return scores, ids


def _signed(bits: int) -> int:
    bits &= 0xFFFFFFFFFFFFFFFF
    return bits - (1 << 64) if bits >> 63 else bits


def _shift_right(bits: Tensor, count: int) -> Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX2)
    return bits ^ _shift_right(bits, 31)


def _log(uniform: Tensor) -> Tensor:
    bits = uniform.view(torch.int64)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    large = mantissa > 1.4142135623730951
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    exponent = torch.where(large, exponent + 1, exponent)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = torch.full_like(square, 1.0 / 15.0)
    for odd in (13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / odd
    return exponent.double() * 0.6931471805599453 + (ratio + ratio) * series


def _cos_of_turn(turn: Tensor) -> Tensor:
    quadrant = (turn + (1 << 29)) >> 30
    angle = (turn - (quadrant << 30)).double() * 1.4629180792671596e-09
    square = angle * angle
    cosine = torch.full_like(square, -1.0 / 87178291200.0)
    for coefficient in (479001600.0, -3628800.0, 40320.0, -720.0, 24.0, -2.0, 1.0):
        cosine = cosine * square + 1.0 / coefficient
    sine = torch.full_like(square, 1.0 / 6227020800.0)
    for coefficient in (-39916800.0, 362880.0, -5040.0, 120.0, -6.0, 1.0):
        sine = sine * square + 1.0 / coefficient
    quarter = quadrant & 3
    magnitude = torch.where(quarter & 1 == 1, sine * angle, cosine)
    return torch.where((quarter == 1) | (quarter == 2), -magnitude, magnitude)


def initial_values(
    seed: int, *, slots_start: int, num_slots: int, column_start: int, num_columns: int, std: float
) -> Tensor:
    """Normal numbers, each a function of (seed, slot, column) alone, defined to the bit by +, -, *, / and sqrt.

    A slot's columns are the outputs of the splitmix64 generator, started from a hash of seed and slot. The upper and
    lower 32 bits of an output are the two uniform numbers of the Box-Muller transform, computed in float64 with the
    logarithm and cosine written out as series, since libraries' own differ in the last bits.
    """
    gamma = _signed(_GAMMA)
    slots = torch.arange(slots_start, slots_start + num_slots)
    columns = torch.arange(column_start + 1, column_start + num_columns + 1)
    start = _mix(torch.tensor(_signed(seed + _GAMMA)))
    bits = _mix(_mix(start + slots * gamma)[:, None] + columns * gamma)
    uniform = (_shift_right(bits, 32) + 1).double() * 2.3283064365386963e-10
    radius = (-2.0 * _log(uniform)).sqrt()
    return (std * (radius * _cos_of_turn(bits & 0xFFFFFFFF))).float()
