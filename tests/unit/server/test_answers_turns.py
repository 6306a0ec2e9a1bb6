"""Large answers to one host: a few on their way, and beside others' calls one at a time, with rests."""

import asyncio
import time

import pytest

from mempool.server import turns as turns_module
from mempool.server.turns import LARGE_BYTES, ON_THE_WAY_BYTES, Turns

from .waits import is_let_through, wait


async def is_let_in(turns: Turns, num_bytes: int, *, host: str = "loud") -> bool:
    return await is_let_through(turns.room(host, num_bytes))


def test_so_much_is_on_its_way_to_a_host_and_the_next_waits_until_it_is_taken() -> None:
    async def main() -> None:
        turns = Turns()
        await turns.room("loud", ON_THE_WAY_BYTES)
        taken = turns.answers("loud", ON_THE_WAY_BYTES, since_s=time.perf_counter())
        assert not await is_let_in(turns, LARGE_BYTES)
        assert await is_let_in(turns, LARGE_BYTES - 1)  # small ones never wait
        assert await is_let_in(turns, LARGE_BYTES, host="quiet")
        waiting = asyncio.ensure_future(turns.room("loud", LARGE_BYTES))
        await asyncio.sleep(0)
        taken()
        taken()  # its call's end, and its being stalled, may both say so
        await waiting
        assert not turns._to_send
        assert not turns._on_the_way

    wait(main())


def test_an_answer_that_nobody_takes_holds_up_the_next_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_STALLED_S", 0.01)

    async def main() -> None:
        turns = Turns()
        turns.answers("loud", ON_THE_WAY_BYTES, since_s=time.perf_counter())
        await turns.room("loud", LARGE_BYTES)

    wait(main())


def test_where_others_have_calls_a_host_rests_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_REST", 1e6)

    async def main() -> None:
        turns = Turns()
        turns.saw("loud")
        turns.answers("loud", LARGE_BYTES, since_s=time.perf_counter() - 0.01)
        await asyncio.sleep(0.01)
        assert await is_let_in(turns, LARGE_BYTES)  # nobody else is there
        turns.saw("quiet")
        turns.saw("loud")
        assert not await is_let_in(turns, LARGE_BYTES)
        assert await is_let_in(turns, LARGE_BYTES, host="quiet")

    wait(main())


def test_hosts_that_have_large_answers_do_not_rest_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_REST", 1e6)

    async def main() -> None:
        turns = Turns()
        for host in ("one", "other"):
            turns.saw(host)
            turns.answers(host, LARGE_BYTES, since_s=time.perf_counter() - 0.01)
        await asyncio.sleep(0.01)
        assert await is_let_in(turns, LARGE_BYTES, host="one")
        assert await is_let_in(turns, LARGE_BYTES, host="other")

    wait(main())


def test_one_at_a_time_is_made_beside_others_and_all_in_the_end() -> None:
    made: list[int] = []

    async def answer(turns: Turns, number: int) -> None:
        await turns.room("loud", LARGE_BYTES)
        made.append(number)
        turns.answers("loud", LARGE_BYTES, since_s=time.perf_counter())()

    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        tasks = [asyncio.ensure_future(answer(turns, number)) for number in range(20)]
        await asyncio.sleep(0)
        assert made == [0]
        for task in tasks[5:8]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert made == [0, 1, 2, 3, 4, *range(8, 20)]
        await asyncio.sleep(0.01)
        assert not turns._to_send
        assert not turns._alarms

    wait(main())


def test_whoever_was_let_in_and_gave_up_lets_the_next_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_STALLED_S", 0.01)

    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        await turns.room("loud", LARGE_BYTES)  # and then its encoding fails: no answer comes of it
        await turns.room("loud", LARGE_BYTES)

    wait(main())


def test_hosts_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_MAX_HOSTS", 8)

    async def main() -> None:
        turns = Turns()
        for number in range(100):
            turns.saw(f"host{number}")
            turns.answers(f"host{number}", LARGE_BYTES, since_s=time.perf_counter())()
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert len(turns._seen) <= 8
        assert len(turns._rests_until) <= 8
        for number in range(100):  # and no answer comes of it
            await turns.room(f"other{number}", LARGE_BYTES)
        assert len(turns._rests_until) <= 8

    wait(main())
