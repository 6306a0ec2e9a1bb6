"""When memory is given back: after much has passed, in a pause, and not before."""

import asyncio

import pytest

from mempool.server import memory
from mempool.server.admission import Admission
from mempool.server.memory import Trimming, trim_heap


def test_it_is_trimmed_in_the_pause_after_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_LOOK_S", 0.01)
    monkeypatch.setattr(memory, "_MIN_BYTES", 100)

    async def main() -> None:
        admission = Admission(budget_bytes=1000, message_bytes=1000)
        trimmed = asyncio.Event()
        loop = asyncio.get_running_loop()
        trimming = Trimming(admission, trim=lambda: loop.call_soon_threadsafe(trimmed.set) and None)
        trimming.start()
        passage = await admission.enter("a")
        passage.resize(99)
        await asyncio.sleep(0.1)
        assert not trimmed.is_set()
        passage.resize(1)
        async with asyncio.timeout(10.0):
            await trimmed.wait()
        trimmed.clear()
        await asyncio.sleep(0.1)
        assert not trimmed.is_set(), "nothing has passed since"
        trimming.stop()
        trimming.stop()
        passage.resize(200)
        await asyncio.sleep(0.1)
        assert not trimmed.is_set()
        passage.leave()

    asyncio.run(main())


def test_trimming_does_no_harm_wherever_it_is_done() -> None:
    trim_heap()
