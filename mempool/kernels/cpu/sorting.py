"""Pairs in the order of a commit, on the CPU: a stable radix sort by slot id, in as many parts as there are threads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mempool.kernels import torch_ops
from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.cpu.elements import locate
from mempool.kernels.cpu.runtime import Array, kernel, serial, spread, use_threads, view

_DIGIT_BITS = 11
# Threads meet several times in a sort, for which each of them must have much to do, in pairs as use_threads counts.
_PAIRS_OF_AN_ELEMENT = 2


@serial
def _first_of(part: int, num_parts: int, num: int) -> int:
    return num * part // num_parts


@serial
def _count_task(
    part: int, ids: Array, page_table: Array, page_shift: int, num_parts: int, ends: Array, largest: Array
) -> None:
    found, most = 0, np.int64(0)
    for pair in range(_first_of(part, num_parts, ids.shape[0]), _first_of(part + 1, num_parts, ids.shape[0])):
        if locate(ids[pair], page_table, page_shift) >= 0:
            found += 1
            most = max(most, np.int64(ids[pair]))
    ends[part], largest[part] = found, most


@serial
def _key_task(
    part: int,
    ids: Array,
    page_table: Array,
    page_shift: int,
    pair_bits: int,
    num_parts: int,
    ends: Array,
    keys: Array,
) -> None:
    place = ends[part - 1] if part > 0 else 0
    for pair in range(_first_of(part, num_parts, ids.shape[0]), _first_of(part + 1, num_parts, ids.shape[0])):
        if locate(ids[pair], page_table, page_shift) >= 0:
            keys[place] = (np.int64(ids[pair]) << pair_bits) | pair
            place += 1


@serial
def _digit_task(part: int, keys: Array, shift: int, num_parts: int, places: Array) -> None:
    mask = places.shape[1] - 1
    places[part, :] = 0
    for place in range(_first_of(part, num_parts, keys.shape[0]), _first_of(part + 1, num_parts, keys.shape[0])):
        places[part, (keys[place] >> shift) & mask] += 1


@serial
def _move_task(part: int, keys: Array, shift: int, num_parts: int, places: Array, moved: Array) -> None:
    mask = places.shape[1] - 1
    for place in range(_first_of(part, num_parts, keys.shape[0]), _first_of(part + 1, num_parts, keys.shape[0])):
        digit = (keys[place] >> shift) & mask
        target = places[part, digit]
        places[part, digit] = target + 1
        moved[target] = keys[place]


@kernel
def _sorted_keys(ids: Array, page_table: Array, page_shift: int, pair_bits: int, num_parts: int) -> Array:
    """The pairs that are here, each as ``slot << pair_bits | pair``, ascending. Every task is one thread's share; what
    comes out does not depend on how many there are."""
    ends, largest = np.zeros(num_parts, dtype=np.int64), np.zeros(num_parts, dtype=np.int64)
    spread(num_parts, _count_task, (ids, page_table, page_shift, num_parts, ends, largest))
    most = np.int64(0)
    for part in range(num_parts):
        most = max(most, largest[part])
        if part > 0:
            ends[part] += ends[part - 1]
    num_pairs = ends[num_parts - 1]
    keys, other_keys = np.empty(num_pairs, dtype=np.int64), np.empty(num_pairs, dtype=np.int64)
    spread(num_parts, _key_task, (ids, page_table, page_shift, pair_bits, num_parts, ends, keys))
    slot_bits = 0
    while most >> slot_bits > 0:
        slot_bits += 1
    num_digits = -(-slot_bits // _DIGIT_BITS)
    digit_bits = -(-slot_bits // max(1, num_digits))
    places = np.empty((num_parts, 1 << digit_bits), dtype=np.int64)
    for digit_number in range(num_digits):
        shift = pair_bits + digit_number * digit_bits
        spread(num_parts, _digit_task, (keys, shift, num_parts, places))
        total = 0
        for digit in range(1 << digit_bits):
            for part in range(num_parts):
                count = places[part, digit]
                places[part, digit] = total
                total += count
        spread(num_parts, _move_task, (keys, shift, num_parts, places, other_keys))
        keys, other_keys = other_keys, keys
    return keys


@serial
def _end_task(part: int, keys: Array, pair_bits: int, num_parts: int, ends: Array) -> None:
    found = 0
    for place in range(_first_of(part, num_parts, keys.shape[0]), _first_of(part + 1, num_parts, keys.shape[0])):
        found += place == 0 or keys[place] >> pair_bits != keys[place - 1] >> pair_bits
    ends[part] = found


@serial
def _run_task(
    part: int,
    keys: Array,
    pair_bits: int,
    page_table: Array,
    page_shift: int,
    num_parts: int,
    ends: Array,
    order: Array,
    rows: Array,
    slots: Array,
    starts: Array,
) -> None:
    run = ends[part - 1] if part > 0 else 0
    for place in range(_first_of(part, num_parts, keys.shape[0]), _first_of(part + 1, num_parts, keys.shape[0])):
        slot = keys[place] >> pair_bits
        order[place] = keys[place] & ((1 << pair_bits) - 1)
        if place == 0 or slot != keys[place - 1] >> pair_bits:
            rows[run], slots[run], starts[run] = locate(slot, page_table, page_shift), slot, place
            run += 1


@kernel
def _runs(
    keys: Array, pair_bits: int, page_table: Array, page_shift: int, order: Array, num_parts: int
) -> tuple[Array, Array, Array]:
    ends = np.zeros(num_parts, dtype=np.int64)
    spread(num_parts, _end_task, (keys, pair_bits, num_parts, ends))
    for part in range(1, num_parts):
        ends[part] += ends[part - 1]
    num_rows = ends[num_parts - 1]
    rows, slots = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    starts = np.empty(num_rows + 1, dtype=np.int64)
    starts[num_rows] = keys.shape[0]
    args = keys, pair_bits, page_table, page_shift, num_parts, ends, order, rows, slots, starts
    spread(num_parts, _run_task, args)
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
