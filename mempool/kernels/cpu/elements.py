"""The innermost steps that kernels share: slot id to arena row, stored elements to float32 and back.

Stored elements are told apart by the type of their numpy array (``runtime.elements``): float32; uint16, bfloat16's
bits; int8; uint8, float8_e4m3fn's bits. What is rounded, how, and by which random bits is defined to the bit by
``mempool.kernels.reference``. All of it is inlined into callers' loops and follows vector units there.

A kernel that writes values rounds them block by block:

    low, high = row_random(key, slot)                     # once a row; unused if not randomly
    scale = store_block(values, rows[row, first:end], randomly, low, high, table_column)
    if is_packed: scales[row, first_scale + block] = scale
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from mempool.kernels.cpu.initial import GAMMA, mix
from mempool.kernels.cpu.runtime import Array, serial
from mempool.kernels.layout import LARGEST

_LARGEST_INT8 = np.float32(LARGEST["int8"])
_LARGEST_FLOAT8 = np.float32(LARGEST["float8_e4m3fn"])
# Added to and taken from a float32 below 2**22, this rounds it to a whole number, ties to even.
_TO_WHOLE = np.float32(1.5 * 2**23)


@serial
def locate(slot: int, page_table: Array, page_shift: int) -> int:
    """Arena row of a slot, -1 if its page is not here. Never reads outside the page table."""
    page = slot >> page_shift
    if page < 0 or page >= page_table.shape[0]:
        return -1
    arena_page: Any = np.int64(page_table[page])
    if arena_page < 0:
        return -1
    return (arena_page << page_shift) | (slot & ((1 << page_shift) - 1))  # type: ignore[no-any-return]


def load(element: Any) -> np.float32:
    """A stored element as float32; packed ones are yet to be multiplied with their block's scale."""
    raise NotImplementedError(f"compiled code only, called with {type(element)}")


@overload(load, strict=False)
def _load(element: Any) -> Any:
    if element == numba.float32:
        return lambda element: element
    if element == numba.uint16:
        return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    if element == numba.int8:
        return lambda element: np.float32(element)

    def from_float8(element):  # type: ignore[no-untyped-def]
        # Below 2**-6 numbers lie evenly, 2**-9 apart; above, exponent (bias 7, float32's is 127) and mantissa follow.
        magnitude = np.uint32(element & np.uint8(0x7F))
        normal = np.uint32(np.uint32(magnitude << np.uint32(20)) + np.uint32((127 - 7) << 23))
        even = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-9)).view(np.uint32)
        bits = even if magnitude < np.uint32(8) else normal
        bits = np.uint32(0x7FC00000) if magnitude == np.uint32(0x7F) else bits
        return np.uint32(bits | np.uint32(np.uint32(element & np.uint8(0x80)) << np.uint32(24))).view(np.float32)

    return from_float8


@serial
def nearest_bfloat16(value: np.float32) -> np.uint16:
    """bfloat16's bits of a float32, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)


@serial
def round_bfloat16(value: np.float32, random: np.uint32) -> np.uint16:
    """bfloat16's bits of a float32, rounded up in magnitude with the probability of what is cut off.

    Args:
        value: What to round; inf and NaN stay what they are.
        random: 32 random bits, of which the upper 16 are used.
    """
    bits = np.float32(value).view(np.uint32)
    finite = np.uint32(bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    added = np.uint32(bits + np.uint32(random >> np.uint32(16))) if finite else bits
    return np.uint16(added >> np.uint32(16)) if value == value else np.uint16(0x7FC0)


def stored(value: Any, like: Any) -> Any:
    """A float32 as an element of the arena ``like``, float32 or bfloat16, rounded to nearest, ties to even."""
    raise NotImplementedError(f"compiled code only, called with {type(value)} and {type(like)}")


@overload(stored, strict=False)
def _stored(value: Any, like: Any) -> Any:  # noqa: ARG001 - Numba matches arguments by name
    if like.dtype == numba.float32:
        return lambda value, like: value  # noqa: ARG005
    return lambda value, like: nearest_bfloat16(value)  # noqa: ARG005


@serial
def row_random(key: int, slot: int) -> tuple[np.uint32, np.uint32]:
    """The two halves of a row's 64 random bits, from which ``random_of`` makes those of its columns.

    Args:
        key: ``RandomRounding.key``, int64.
        slot: Slot id.
    """
    row = mix(np.uint64(key) + np.uint64(slot) * GAMMA)
    return np.uint32(row & np.uint64(0xFFFFFFFF)), np.uint32(row >> np.uint64(32))


@serial
def random_of(low: np.uint32, high: np.uint32, column: int) -> np.uint32:
    """32 random bits of a row's table column, bit for bit ``reference.random_bits``."""
    bits = np.uint32(low + np.uint32(np.uint32(column) * np.uint32(0x9E3779B9)))
    bits = np.uint32(np.uint32(bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    bits = np.uint32(np.uint32(bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(np.uint32(bits ^ (bits >> np.uint32(16))) ^ high)


@serial
def _fraction(random: np.uint32) -> np.float32:
    return np.float32(np.float32(np.int32(random >> np.uint32(8))) * np.float32(2.0**-24))


@serial
def _nearest_int8(ratio: np.float32) -> np.int8:
    whole = np.float32(np.float32(ratio + _TO_WHOLE) - _TO_WHOLE)
    return np.int8(np.int32(min(max(whole, -_LARGEST_INT8), _LARGEST_INT8)))


@serial
def _round_int8(ratio: np.float32, random: np.uint32) -> np.int8:
    raised = np.float32(ratio + _fraction(random))
    raised = min(max(raised, -_LARGEST_INT8), _LARGEST_INT8)
    towards_zero = np.int32(raised)
    return np.int8(towards_zero - np.int32(np.float32(towards_zero) > raised))


@serial
def _float8(ratio: np.float32, normal: np.uint32, even: np.int32) -> np.uint8:
    # Which of the two ways to round holds, at most 448 (0x7F would be NaN), and the sign.
    small = np.float32(abs(ratio)) < np.float32(2.0**-6)
    code = even if small else np.int32(np.int32(normal) - np.int32((127 - 7) << 3))
    code = np.int32(min(code, np.int32(0x7E)))
    sign = np.uint32(np.float32(ratio).view(np.uint32) >> np.uint32(31))
    return np.uint8(np.uint32(code) | np.uint32(sign << np.uint32(7)))


@serial
def _nearest_float8(ratio: np.float32) -> np.uint8:
    magnitude = np.float32(abs(ratio))
    bits = np.float32(magnitude).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(20)) & np.uint32(1))
    normal = np.uint32(np.uint32(bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20))
    even = np.float32(np.float32(magnitude * np.float32(512)) + _TO_WHOLE) - _TO_WHOLE
    return _float8(ratio, normal, np.int32(even))


@serial
def _round_float8(ratio: np.float32, random: np.uint32) -> np.uint8:
    magnitude = np.float32(abs(ratio))
    normal = np.uint32(
        np.uint32(np.float32(magnitude).view(np.uint32) + np.uint32(random >> np.uint32(12))) >> np.uint32(20)
    )
    even = np.float32(np.float32(magnitude * np.float32(512)) + _fraction(random))
    return _float8(ratio, normal, np.int32(even))


def _nearest(ratio: Any, like: Any) -> Any:
    """The packed element closest to value divided by scale."""
    raise NotImplementedError(f"compiled code only, called with {type(ratio)} and {type(like)}")


@overload(_nearest, strict=False)
def _nearest_packed(ratio: Any, like: Any) -> Any:  # noqa: ARG001
    if like.dtype == numba.int8:
        return lambda ratio, like: _nearest_int8(ratio)  # noqa: ARG005
    return lambda ratio, like: _nearest_float8(ratio)  # noqa: ARG005


def _rounded(ratio: Any, random: Any, like: Any) -> Any:
    """One of the two packed elements around value divided by scale."""
    raise NotImplementedError(f"compiled code only, called with {type(ratio)}, {type(random)} and {type(like)}")


@overload(_rounded, strict=False)
def _rounded_packed(ratio: Any, random: Any, like: Any) -> Any:  # noqa: ARG001
    if like.dtype == numba.int8:
        return lambda ratio, random, like: _round_int8(ratio, random)  # noqa: ARG005
    return lambda ratio, random, like: _round_float8(ratio, random)  # noqa: ARG005


@serial
def largest_bits(values: Array) -> Any:
    """The bits, as uint32, of the largest magnitude among float32 values; from 0x7F800000 on, one is not finite."""
    largest = np.uint32(0)
    for column in range(values.shape[0]):
        largest = max(largest, np.uint32(np.float32(values[column]).view(np.uint32) & np.uint32(0x7FFFFFFF)))
    return largest


@serial
def _pack(values: Array, codes: Array, largest: Any, randomly: bool, low: Any, high: Any, column: int) -> Any:
    bits = largest_bits(values)
    scale = np.float32(np.uint32(bits).view(np.float32) / largest)
    if bits >= np.uint32(0x7F800000):
        scale = np.float32(np.nan)
    if not scale > np.float32(0):  # zeros alone, or something that is not finite
        for place in range(codes.shape[0]):
            codes[place] = 0
    elif randomly:
        for place in range(codes.shape[0]):
            random = random_of(low, high, column + place)
            codes[place] = _rounded(np.float32(values[place] / scale), random, codes)
    else:
        for place in range(codes.shape[0]):
            codes[place] = _nearest(np.float32(values[place] / scale), codes)
    return scale


def store_block(values: Any, block: Any, randomly: Any, low: Any, high: Any, column: Any) -> Any:
    """Round a block's float32 values to stored elements, and return the scale of packed ones (1 of others).

    Args:
        values: [n] float32.
        block: [n] stored elements, written in place.
        randomly: Stochastic rounding; False for nearest, ties to even. float32 is never rounded.
        low: First half of ``row_random``.
        high: Second half of it.
        column: The table's column of the block's first value.
    """
    raise NotImplementedError(f"compiled code only, called with {type(values)} and {type(block)}")


@overload(store_block, strict=False)
def _store_block(values: Any, block: Any, randomly: Any, low: Any, high: Any, column: Any) -> Any:  # noqa: ARG001
    if block.dtype == numba.float32:

        def keep(values, block, randomly, low, high, column):  # type: ignore[no-untyped-def]  # noqa: ARG001
            for place in range(block.shape[0]):
                block[place] = values[place]
            return np.float32(1)

        return keep
    if block.dtype == numba.uint16:

        def as_bfloat16(values, block, randomly, low, high, column):  # type: ignore[no-untyped-def]
            if randomly:
                for place in range(block.shape[0]):
                    block[place] = round_bfloat16(values[place], random_of(low, high, column + place))
            else:
                for place in range(block.shape[0]):
                    block[place] = nearest_bfloat16(values[place])
            return np.float32(1)

        return as_bfloat16
    largest = _LARGEST_INT8 if block.dtype == numba.int8 else _LARGEST_FLOAT8
    return lambda values, block, randomly, low, high, column: _pack(values, block, largest, randomly, low, high, column)
