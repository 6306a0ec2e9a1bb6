"""Pairs in the order of a commit, on the CPU: a stable radix sort by slot id, in as many parts as there are threads."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mempool.kernels import torch_ops
from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.cpu.elements import locate
from mempool.kernels.cpu.runtime import Array, parallel, serial, use_threads, view

_DIGIT_BITS = 11
# Threads meet several times in a sort, for which each of them must have much to do, in pairs as use_threads counts.
_PAIRS_OF_AN_ELEMENT = 2


@serial
def _first_of(part: int, num_parts: int, num: int) -> int:
    return num * part // num_parts


@parallel
def _sorted_keys(ids: Array, page_table: Array, page_shift: int, pair_bits: int, num_parts: int) -> Array:
    """The pairs that are here, each as ``slot << pair_bits | pair``, ascending. Every loop over parts is one thread's
    share; what comes out does not depend on how many there are."""
    num_ids = ids.shape[0]
    ends, largest = np.zeros(num_parts, dtype=np.int64), np.zeros(num_parts, dtype=np.int64)
    for part in prange(num_parts):
        found, most = 0, np.int64(0)
        for pair in range(_first_of(part, num_parts, num_ids), _first_of(part + 1, num_parts, num_ids)):
            if locate(ids[pair], page_table, page_shift) >= 0:
                found += 1
                most = max(most, ids[pair])
        ends[part], largest[part] = found, most
    for part in range(1, num_parts):
        ends[part] += ends[part - 1]
    num_pairs = ends[num_parts - 1]
    keys, other_keys = np.empty(num_pairs, dtype=np.int64), np.empty(num_pairs, dtype=np.int64)
    for part in prange(num_parts):
        place = ends[part - 1] if part > 0 else 0
        for pair in range(_first_of(part, num_parts, num_ids), _first_of(part + 1, num_parts, num_ids)):
            if locate(ids[pair], page_table, page_shift) >= 0:
                keys[place] = (ids[pair] << pair_bits) | pair
                place += 1
    slot_bits = 0
    while largest.max() >> slot_bits > 0:
        slot_bits += 1
    num_digits = -(-slot_bits // _DIGIT_BITS)
    digit_bits = -(-slot_bits // max(1, num_digits))
    mask = (1 << digit_bits) - 1
    places = np.empty((num_parts, 1 << digit_bits), dtype=np.int64)
    for digit_number in range(num_digits):
        shift = pair_bits + digit_number * digit_bits
        for part in prange(num_parts):
            places[part, :] = 0
            for place in range(_first_of(part, num_parts, num_pairs), _first_of(part + 1, num_parts, num_pairs)):
                places[part, (keys[place] >> shift) & mask] += 1
        total = 0
        for digit in range(1 << digit_bits):
            for part in range(num_parts):
                count = places[part, digit]
                places[part, digit] = total
                total += count
        for part in prange(num_parts):
            for place in range(_first_of(part, num_parts, num_pairs), _first_of(part + 1, num_parts, num_pairs)):
                digit = (keys[place] >> shift) & mask
                target = places[part, digit]
                places[part, digit] = target + 1
                other_keys[target] = keys[place]
        keys, other_keys = other_keys, keys
    return keys


@parallel
def _runs(
    keys: Array, pair_bits: int, page_table: Array, page_shift: int, order: Array, num_parts: int
) -> tuple[Array, Array, Array]:
    num_pairs = keys.shape[0]
    ends = np.zeros(num_parts, dtype=np.int64)
    for part in prange(num_parts):
        found = 0
        for place in range(_first_of(part, num_parts, num_pairs), _first_of(part + 1, num_parts, num_pairs)):
            found += place == 0 or keys[place] >> pair_bits != keys[place - 1] >> pair_bits
        ends[part] = found
    for part in range(1, num_parts):
        ends[part] += ends[part - 1]
    num_rows = ends[num_parts - 1]
    rows, slots = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    starts = np.empty(num_rows + 1, dtype=np.int64)
    starts[num_rows] = num_pairs
    for part in prange(num_parts):
        run = ends[part - 1] if part > 0 else 0
        for place in range(_first_of(part, num_parts, num_pairs), _first_of(part + 1, num_parts, num_pairs)):
            slot = keys[place] >> pair_bits
            order[place] = keys[place] & ((1 << pair_bits) - 1)
            if place == 0 or slot != keys[place - 1] >> pair_bits:
                rows[run], slots[run], starts[run] = locate(slot, page_table, page_shift), slot, place
                run += 1
    return rows, slots, starts


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """See mempool.kernels.sort_pairs."""
    pair_bits = ids.numel().bit_length()
    if (paged.page_table.numel() << paged.page_shift).bit_length() + pair_bits > 63:
        return torch_ops.sort_pairs(paged, ids)  # more slots than keys have room for, beside the pair
    num_parts = use_threads(ids.numel() // _PAIRS_OF_AN_ELEMENT)
    page_table = view(paged.page_table)
    keys = _sorted_keys(view(ids), page_table, paged.page_shift, pair_bits, num_parts)
    order = torch.empty(keys.shape[0], dtype=torch.int64, device="cpu")
    rows, slots, starts = _runs(keys, pair_bits, page_table, paged.page_shift, order.numpy(), num_parts)
    return SortedPairs(
        order=order, rows=torch.from_numpy(rows), slots=torch.from_numpy(slots), starts=torch.from_numpy(starts)
    )
