"""Whose work the loop does next: hosts in turn, and of a host its connections."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.server.turns import Turns


def order_of(asked: list[tuple[str, str]], *, cancelled: frozenset[int] = frozenset()) -> list[int]:
    """Who works when all of these line up in this order."""
    done: list[int] = []

    async def work(turns: Turns, number: int) -> None:
        await turns.take(*asked[number])
        done.append(number)

    async def main() -> None:
        turns = Turns()
        tasks = [asyncio.ensure_future(work(turns, number)) for number in range(len(asked))]
        await asyncio.sleep(0)  # they have lined up
        for number in cancelled:
            tasks[number].cancel()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not turns._hosts

    asyncio.run(main())
    return done


def test_a_call_of_another_host_stands_behind_one_not_behind_all() -> None:
    flood = [("loud", f"loud:{port}") for port in range(64)]
    assert order_of([*flood, ("quiet", "quiet:1")]).index(64) <= 1


def test_a_connection_stands_behind_one_call_of_each_other() -> None:
    asked = [("host", "host:1")] * 9 + [("host", "host:2"), ("host", "host:3")]
    assert order_of(asked)[:3] == [0, 9, 10]


def test_one_piece_of_work_in_each_round_of_the_loop() -> None:
    """What came meanwhile (another's call, an answer of the engine) is heard between two of them."""
    heard: list[str] = []

    async def work(turns: Turns) -> None:
        await turns.take("host", "host:1")
        heard.append("work")

    async def main() -> None:
        turns = Turns()
        tasks = [asyncio.ensure_future(work(turns)) for _ in range(3)]
        for _ in range(12):
            await asyncio.sleep(0)
            heard.append("round")
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert "work work" not in " ".join(heard)
    assert heard.count("work") == 3


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("123")), max_size=30),
    st.frozensets(st.integers(0, 29), max_size=8),
)
def test_everyone_has_a_turn_and_a_connection_keeps_its_order(
    asked: list[tuple[str, str]], cancelled: frozenset[int]
) -> None:
    cancelled = frozenset(number for number in cancelled if number < len(asked))
    done = order_of(asked, cancelled=cancelled)
    assert sorted(done) == [number for number in range(len(asked)) if number not in cancelled]
    for connection in set(asked):
        of_it = [number for number in done if asked[number] == connection]
        assert of_it == sorted(of_it)
