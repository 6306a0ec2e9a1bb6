"""A checkpoint's handle says why it has ended."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from mempool.client.checkpoints import CheckpointHandle
from mempool.errors import Internal, InvalidRequest, StorageFailed
from mempool.types import CheckpointProgress

FIRST = CheckpointProgress(
    url="/place", name="", bytes_done=0, bytes_total=0, tables=(), held_s=0.0, doing="", done=False
)


@pytest.mark.parametrize(
    ("ends_with", "told", "words"),
    [
        (StorageFailed("the disk is full"), StorageFailed, "the disk is full"),
        (ValueError("a slip"), Internal, "/place failed with ValueError: a slip"),
        (asyncio.CancelledError(), InvalidRequest, "closed on this side"),
    ],
)
def test_a_handle_says_why_it_ended(ends_with: BaseException, told: type[Exception], words: str) -> None:
    async def reports() -> AsyncIterator[CheckpointProgress]:
        yield FIRST
        raise ends_with

    handle = CheckpointHandle(FIRST)
    ended = asyncio.run(_ended(handle, reports()))
    assert isinstance(ended, asyncio.CancelledError) == isinstance(ends_with, asyncio.CancelledError)
    assert handle.done
    with pytest.raises(told, match=words):
        handle.wait(0)


async def _ended(handle: CheckpointHandle, reports: AsyncIterator[CheckpointProgress]) -> BaseException | None:
    (ended,) = await asyncio.gather(handle.follow(reports), return_exceptions=True)
    return ended
