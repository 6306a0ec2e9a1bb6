"""Calls of any size as messages of a bounded one: how many bags or queries go in each, and a few of them at a time.

A message is copied as a whole, at both of its ends, while all else there stands still: so none is large.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mempool.errors import Overloaded

MESSAGE_BYTES = 2 * 2**20
"""About so much is in a message, and asked for by it. Small shards, with room for small messages only, take it too."""
WINDOW = 4
"""So many are under way at a time: shards work on one while another is on the wire, and no caller fills their queue."""
_TRIES = 6
"""Of a message that finds no room, before the whole call is tried again."""
_LONGEST_PAUSE_S = 1.0

T = TypeVar("T")


def slices(count: int, item_bytes: int) -> list[tuple[int, int]]:
    """First and end of each message's items, one message at least; of about equal size.

    Args:
        count: Items of the whole call.
        item_bytes: Of each, or of the answer to it where that is more.
    """
    messages = max(1, -(-count * item_bytes // MESSAGE_BYTES))
    size = max(1, -(-count // messages))
    return [(first, min(first + size, count)) for first in range(0, max(1, count), size)]


def windows(pieces: Sequence[T]) -> Iterator[Sequence[T]]:
    """Pieces, as many as may be under way at a time."""
    return (pieces[start : start + WINDOW] for start in range(0, len(pieces), WINDOW))


def as_one(matrices: Sequence[Tensor]) -> Tensor:
    """What some messages answered, as if it had been one."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


async def together(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """All of them side by side, answers in their order; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(call()) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        tasks.clear()  # they know their errors, and those this frame: they would end with a collection only


async def some_at_a_time(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """As ``together``, a window after the other; a single call is only awaited.

    One of many that finds no room is asked again by itself: with the answers of all others thrown away for it, a large
    call would ask a busy shard for much more, and beside enough others never end.
    """
    if len(calls) == 1:
        return [await calls[0]()]
    answers: list[T] = []
    for window in windows(calls):
        answers += await together([partial(_patiently, call) for call in window])
    return answers


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    for _ in range(_TRIES - 1):
        try:
            return await call()
        except Overloaded as error:
            after_s = error.retry_after_s
        pause_s = after_s if 0.0 < after_s < _LONGEST_PAUSE_S else _LONGEST_PAUSE_S
        await asyncio.sleep(pause_s * (1.0 + random.random() / 2.0))  # spread out, as others were told the same
    return await call()
