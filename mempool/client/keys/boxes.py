"""Slots of product keys as boxes of half-keys, and which parts of a box are summed first: the same for keys in the pool
and for those in the model, so that both find the same bits. Pure.
"""

Range = tuple[int, int]
"""First half-key (or slot), and the one after the last."""
Box = tuple[Range, ...]
"""Of each part its half-keys."""


def boxes(first: int, end: int, size: int, ways: int) -> list[Box]:
    """The slots from ``first`` to before ``end`` as boxes of half-keys, by rising ids.

    Those with a whole first half-key make one; what is left in the row before them and in the one after is cut in the
    same way, by the next half-key. At most ``2 * ways - 1``, and one where all is there.
    """
    if first >= end:
        return []
    if ways == 0:
        return [()]
    worth = size ** (ways - 1)
    (row, before), (last_row, after) = divmod(first, worth), divmod(end, worth)
    if row == last_row:
        return _with(row, boxes(before, after, size, ways - 1))
    found = _with(row, boxes(before, worth, size, ways - 1)) if before else []
    whole = row + 1 if before else row
    if whole < last_row:
        found.append(((whole, last_row), *[(0, size)] * (ways - 1)))
    return found + _with(last_row, boxes(0, after, size, ways - 1))


def pairs_of(box: Box, size: int, topk: int) -> list[slice]:
    """The parts whose scores are summed before others are: two each, but for those that are left alone.

    A part stays alone before one that is cut, or if it has fewer half-keys than are taken of a whole one.
    """
    found, first = [], 0
    while first < len(box):
        start, end = box[first]
        paired = box[first + 1 : first + 2] == ((0, size),) and end - start >= min(topk, size)
        found.append(slice(first, first + 1 + paired))
        first = found[-1].stop
    return found


def first_slot(box: Box, size: int) -> int:
    """The lowest id of a box."""
    slot = 0
    for start, _ in box:
        slot = slot * size + start
    return slot


def _with(row: int, inner: list[Box]) -> list[Box]:
    return [((row, row + 1), *box) for box in inner]
