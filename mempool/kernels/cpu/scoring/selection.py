"""The best of a row by (score descending, position ascending), exact and nearly without branches.

Scores are compared as integers that order like them. A threshold which at least k of the row reach is found by
bisection, counting 64 comparisons at a time; the few dozen scores that reach it are then put into order by counting,
for each, how many come before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from mempool.kernels.cpu.runtime import Array, serial
from mempool.kernels.cpu.scoring.scores import FLOAT, Code, types, vector_code

#: What NaN becomes: below every number.
NAN_ORDER = np.int32(-0x80000000)
# The order of infinity.
_GREATEST = np.int32(0x7F800000)
#: Comparisons made at once; arrays that are searched are padded to a multiple of it.
WORD = 64
_FAR = np.int64(0xFFFFFFFF)
_LOWEST_RANK = np.int64(-0x8000000000000000)
# Up to here counting who comes before beats sorting.
_MOST_COUNTED = 600
_ORDER = ir.IntType(32)


def _constant(kind: Any, value: int) -> Any:
    lanes = getattr(kind, "count", None)
    return ir.Constant(kind, value if lanes is None else [value] * lanes)


def _emit_order(builder: Any, scores: Any, kind: Any) -> Any:
    """The orders of a float32, or of a vector of them."""
    bits = builder.bitcast(scores, kind)
    turned = builder.sub(_constant(kind, int(NAN_ORDER)), bits)
    order = builder.select(builder.icmp_signed(">=", bits, _constant(kind, 0)), bits, turned)
    return builder.select(builder.fcmp_unordered("uno", scores, scores), _constant(kind, int(NAN_ORDER)), order)


@vector_code(lambda _score: types.int32(types.float32))
def order_of(code: Code) -> Any:
    """An int32 that orders like the float32: -0.0 and 0.0 are both 0, every NaN is NAN_ORDER."""
    return _emit_order(code.builder, code.args[0], _ORDER)


@vector_code(lambda _order: types.float32(types.int32))
def _score_of(code: Code) -> Any:
    """The float32 of an order; what follows the order of infinity is NaN."""
    builder, order = code.builder, code.args[0]
    turned = builder.sub(_constant(_ORDER, int(NAN_ORDER)), order)
    bits = builder.select(builder.icmp_signed(">=", order, _constant(_ORDER, 0)), order, turned)
    return builder.bitcast(bits, FLOAT)


@vector_code(
    lambda scores, _start, orders, _position, maxima, _group: types.void(
        scores, types.intp, orders, types.intp, maxima, types.intp
    )
)
def _order_word(code: Code) -> Any:
    """The orders of ``scores[start:start + 64]`` to ``orders[position:]``, joined with ``maxima[group:group + 64]``."""
    builder, scores, orders, maxima = code.builder, code.pointer(0, 1), code.pointer(2, 3), code.pointer(4, 5)
    order = _emit_order(builder, code.load(scores, FLOAT, WORD), ir.VectorType(_ORDER, WORD))
    greatest = code.load(maxima, _ORDER, WORD)
    code.store(order, orders)
    code.store(builder.select(builder.icmp_signed(">", order, greatest), order, greatest), maxima)
    return code.nothing


@vector_code(lambda values, _start, _least: types.uint64(values, types.intp, values.dtype))
def reaching(code: Code) -> Any:
    """Of ``values[start:start + 64]``, an array of integers, which are at least ``least``: a bit each, in uint64."""
    builder, least = code.builder, code.args[2]
    mask = builder.icmp_signed(">=", code.load(code.pointer(0, 1), least.type, WORD), code.splat(least, WORD))
    return builder.bitcast(mask, ir.IntType(WORD))


@vector_code(lambda _word: types.intp(types.uint64))
def count_bits(code: Code) -> Any:
    """How many bits of a uint64 are set."""
    return code.builder.ctpop(code.args[0])


@vector_code(lambda _word: types.intp(types.uint64))
def lowest_bit(code: Code) -> Any:
    """The number of the lowest bit that is set in a uint64 that is not 0."""
    return code.builder.cttz(code.args[0], ir.Constant(ir.IntType(1), 1))


@serial
def padded(count: int) -> int:
    """``count`` rounded up to whole words."""
    return (count + WORD - 1) // WORD * WORD


@serial
def rank_of(order: Any, position: Any) -> Any:
    """An int64, greater for a better score and then for a lower position; positions lie below 2**32."""
    return (np.int64(order) << np.int64(32)) | (_FAR - np.int64(position))


@serial
def _count_reaching(orders: Array, num_orders: int, least: Any) -> int:
    count = 0
    for start in range(0, num_orders, WORD):
        count += count_bits(reaching(orders, start, least))
    return count


@serial
def threshold(orders: Array, num_orders: int, k: int, slack: int, low: Any, high: Any) -> Any:
    """The greatest value found that at least k of the padded orders reach; the k-th best itself with no slack.

    Args:
        orders: int32, padded to whole words with NAN_ORDER.
        num_orders: How many, with the padding.
        k: At least so many reach the answer.
        slack: So many more may.
        low: A value that at least k reach.
        high: No value lies above.
    """
    least, most = np.int64(low), np.int64(high)
    while least < most:
        middle = (least + most + np.int64(1)) >> np.int64(1)
        count = _count_reaching(orders, num_orders, np.int32(middle))
        if count >= k:
            least = middle
            if count <= k + slack:
                break
        else:
            most = middle - np.int64(1)
    return np.int32(least)


@serial
def collect(orders: Array, num_orders: int, least: Any, found: Array) -> int:
    """Positions of the orders that reach ``least`` into ``found``, ascending; -1 if they are more than it holds."""
    count = 0
    for start in range(0, num_orders, WORD):
        word = reaching(orders, start, least)
        if count + count_bits(word) > found.shape[0]:
            return -1
        while word != np.uint64(0):
            found[count] = start + lowest_bit(word)
            count += 1
            word &= word - np.uint64(1)
    return count


@serial
def _collect_exactly(orders: Array, num_orders: int, k: int, least: Any, found: Array) -> None:
    """Positions of the k best, ascending, ``least`` being the order of the k-th: of equals the first."""
    ties = k
    if least < np.int32(0x7FFFFFFF):
        ties -= _count_reaching(orders, num_orders, least + np.int32(1))
    count = 0
    for position in range(num_orders):
        if count == k:
            break
        if orders[position] > least:
            found[count] = position
            count += 1
        elif orders[position] == least and ties > 0:
            found[count] = position
            count += 1
            ties -= 1


@serial
def count_places(ranks: Array, count: int, places: Array) -> None:
    """Where each of ``count`` different ranks stands in descending order; ``ranks`` has room for whole words."""
    end = padded(count)
    for position in range(count, end):
        ranks[position] = _LOWEST_RANK
    for position in range(count):
        place = -1  # a rank reaches itself
        for start in range(0, end, WORD):
            place += count_bits(reaching(ranks, start, ranks[position]))
        places[position] = place


@serial
def count_distinct(orders: Array, count: int, places: Array) -> bool:
    """Where each of ``count`` orders stands in descending order, if no two are equal and none is NaN's.

    It costs half of ``count_places``. Returns False, with ``places`` spoilt, where that takes the rest of a rank.

    Args:
        orders: int32, with room for whole words.
        count: How many.
        places: int64, the first ``count`` are written.
    """
    end = padded(count)
    for position in range(count, end):
        orders[position] = NAN_ORDER
    total = 0
    for position in range(count):
        place = -1
        for start in range(0, end, WORD):
            place += count_bits(reaching(orders, start, orders[position]))
        places[position] = place
        total += place
    # Of equals all stand where the last of them does: behind where they belong, so that the sum is greater.
    return 2 * total == count * (count - 1)


@serial
def _merge_sort(ranks: Array, other: Array, count: int) -> None:
    """Sort ``ranks[:count]``, descending; ``other`` is scratch as long."""
    length = 1
    while length < count:
        for first in range(0, count, 2 * length):
            left, right, end = first, min(first + length, count), min(first + 2 * length, count)
            left_end = right
            for place in range(first, end):
                if left < left_end and (right >= end or ranks[left] > ranks[right]):
                    other[place] = ranks[left]
                    left += 1
                else:
                    other[place] = ranks[right]
                    right += 1
        for place in range(count):
            ranks[place] = other[place]
        length *= 2


@serial
def scratch(num_scores: int, k: int) -> Any:
    """What ``select`` needs beside the scores: orders, maxima, found, ranks, places."""
    room = 2 * k + WORD
    return (
        np.empty(padded(num_scores), dtype=np.int32),
        np.empty(num_groups(num_scores, k), dtype=np.int32),
        np.empty(room, dtype=np.int64),
        np.empty(padded(room), dtype=np.int64),
        np.empty(room, dtype=np.int64),
    )


@serial
def keep_best(scores: Array, ids: Array, k: int, orders: Array, found: Array) -> np.float32:
    """Cut a full buffer, in whole words, to its k best, of equals the first; they keep their order.

    Args:
        scores: float32, none of them NaN.
        ids: int64, as long.
        k: How many are kept.
        orders: Scratch, int32, as long.
        found: Scratch, int64, at least k.

    Returns:
        The least score that would have been better than the worst of those kept; NaN if there is none.
    """
    count = scores.shape[0]
    for position in range(count):
        orders[position] = order_of(scores[position])
    least = threshold(orders, count, k, 0, NAN_ORDER, _GREATEST)
    _collect_exactly(orders, count, k, least, found)
    for place in range(k):
        scores[place], ids[place] = scores[found[place]], ids[found[place]]
    return _score_of(least + np.int32(1))  # type: ignore[no-any-return]


@serial
def num_groups(num_scores: int, k: int) -> int:
    """Groups whose maxima give the first threshold: enough that few have two winners, in whole words."""
    return min(padded(num_scores), padded(4 * k))


@serial
def select(
    scores: Array,
    start: int,
    num_scores: int,
    k: int,
    orders: Array,
    maxima: Array,
    found: Array,
    ranks: Array,
    places: Array,
    index: Array,
) -> None:
    """Positions of the k best of ``scores[start:start + num_scores]`` into ``index``, best first; NaN last.

    Args:
        scores: Flat float32.
        start: Where the row starts.
        num_scores: Its length, at least k.
        k: Winners.
        orders: Scratch, int32, num_scores in whole words.
        maxima: Scratch, int32, one a group (``num_groups``).
        found: Scratch, int64, at least k; more spares the search for the exact threshold.
        ranks: Scratch, int64, as long as ``found``, in whole words.
        places: Scratch, int64, as long as ``found``.
        index: int64, the first k are written.
    """
    groups = maxima.shape[0]
    for group in range(groups):
        maxima[group] = NAN_ORDER
    whole = num_scores - num_scores % WORD
    for position in range(0, whole, WORD):
        _order_word(scores, start + position, orders, position, maxima, position % groups)
    for position in range(whole, num_scores):
        order = order_of(scores[start + position])
        orders[position] = order
        maxima[position % groups] = max(maxima[position % groups], order)
    end = padded(num_scores)
    for position in range(num_scores, end):
        orders[position] = NAN_ORDER
    low, high = maxima[0], maxima[0]
    for group in range(groups):
        low, high = min(low, maxima[group]), max(high, maxima[group])
    least = threshold(maxima, groups, k, k >> 3, low, high)
    count = collect(orders, end, least, found) if least > NAN_ORDER else -1
    if count < 0:
        least = threshold(orders, end, k, 0, NAN_ORDER, high)
        _collect_exactly(orders, end, k, least, found)
        count = k
    for place in range(count):
        orders[place] = orders[found[place]]  # at or after it: what is overwritten was read
    if count > _MOST_COUNTED or not count_distinct(orders, count, places):
        for place in range(count):
            ranks[place] = rank_of(orders[place], found[place])
        if count > _MOST_COUNTED:
            _merge_sort(ranks, places, count)
            for place in range(k):
                index[place] = _FAR - (ranks[place] & _FAR)
            return
        count_places(ranks, count, places)
    for place in range(count):
        if places[place] < k:
            index[places[place]] = found[place]
