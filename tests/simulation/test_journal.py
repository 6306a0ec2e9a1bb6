"""A journal on a simulated process's loop and a simulated disk: many wait at once, and lives end at any moment."""

import asyncio

import pytest
from fakefiles import FakeFiles

from mempool.journal import Journal, Owner
from tests.simulation.loop import InlineRunner, ProcessLoop, Scheduler


def _lives(seed: int) -> list[tuple[int, int]]:
    """Of each life, how many records it found and how many syncs it made; the last one of all is closed."""
    scheduler, files = Scheduler(seed), FakeFiles(seed)
    files.make_folder("j")
    random = scheduler.random("journal")
    acknowledged: set[int] = set()

    async def life(loop: ProcessLoop, *, whole: bool) -> tuple[int, int]:
        runner = InlineRunner(loop, scheduler.random(loop.name))
        journal = Journal(files, "j", owner=Owner("p", 0), runner=runner, segment_bytes=500)
        found = [record.number for record in journal.records()]
        assert acknowledged <= set(found)

        async def append(size: int) -> None:
            await asyncio.sleep(random.random() / 10)
            number = journal.append(1, [b"x" * size])
            await asyncio.wrap_future(journal.when_synced(number))
            acknowledged.add(number)

        appending = [asyncio.ensure_future(append(size)) for size in range(40)]
        await asyncio.wait(appending, timeout=None if whole else random.random() / 10)
        if whole:
            await journal.close()
        return len(found), journal.num_syncs

    try:
        told = []
        for number in range(5):
            loop = scheduler.loop(f"life {number}")
            told.append(scheduler.run(life(loop, whole=number == 4), loop=loop))
            loop.kill()
            files.power_cut() if random.random() < 0.5 else files.killed()
        return told
    finally:
        scheduler.close()


@pytest.mark.parametrize("seed", range(10))
def test_what_was_acknowledged_is_there_and_one_seed_is_one_history(seed: int) -> None:
    told = _lives(seed)
    assert told == _lives(seed)
    assert told[-1][1] < 40, "who waits at once shares a sync"
