"""Room for messages: a bound on all, turns by host, nothing lost when callers give up."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import Overloaded, ShardUnavailable
from mempool.server import admission as admission_module
from mempool.server.admission import Admission, Passage

MESSAGE = 100


def bounded(scenario: Callable[[], Awaitable[Any]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10.0):
            await scenario()

    asyncio.run(main())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_no_more_come_in_than_there_is_room_for() -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=3 * MESSAGE, message_bytes=MESSAGE)
        inside = [await admission.enter(host) for host in ("a", "b", "c")]
        late = asyncio.create_task(admission.enter("d"))
        await settle()
        assert not late.done()
        assert (admission.used_bytes, admission.active) == (3 * MESSAGE, 4)
        inside[0].resize(1)  # its message is here and small
        await settle()
        assert not late.done()
        inside[1].leave()
        (await late).leave()
        inside[0].leave()
        inside[2].leave()
        assert (admission.used_bytes, admission.active) == (0, 0)

    bounded(scenario)


def test_answers_that_are_not_taken_hold_up_their_own_connection_alone() -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=3 * MESSAGE, message_bytes=MESSAGE)
        first, second = await admission.enter("a", "a:1"), await admission.enter("a", "a:1")
        first.answer(2 * MESSAGE)
        second.answer(MESSAGE - 1)
        (await admission.enter("a", "a:1")).leave()
        third = await admission.enter("a", "a:1")
        third.answer(1)
        with pytest.raises(Overloaded, match="300 bytes of answers to this connection were not taken yet, of 300"):
            await admission.enter("a", "a:1")
        for other in (("b", "b:1"), ("a", "a:2")):
            (await admission.enter(*other)).leave()
        for passage in (first, second, third):
            passage.leave()
        (await admission.enter("a", "a:1")).leave()
        assert (admission.used_bytes, admission.active, admission._answers_of) == (0, 0, {})

    bounded(scenario)


def test_a_call_costs_something_however_small_its_message() -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=3 * MESSAGE, message_bytes=MESSAGE, call_bytes=MESSAGE // 2)
        inside = []
        for host in "abcde":
            inside.append(await admission.enter(host))
            inside[-1].resize(0)
        assert admission.used_bytes == 5 * MESSAGE // 2
        late = asyncio.create_task(admission.enter("f"))
        await settle()
        assert not late.done()
        inside[0].leave()
        (await late).leave()
        for passage in inside[1:]:
            passage.leave()
        assert (admission.used_bytes, admission.active) == (0, 0)

    bounded(scenario)


def test_one_call_is_let_in_whatever_the_budget() -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=1, message_bytes=MESSAGE)
        (await admission.enter("a")).leave()
        alone = await admission.enter("a")
        late = asyncio.create_task(admission.enter("a"))
        await settle()
        assert not late.done()
        alone.leave()
        (await late).leave()

    bounded(scenario)


def test_one_host_cannot_take_all_the_room() -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=4 * MESSAGE, message_bytes=MESSAGE)
        greedy = [asyncio.create_task(admission.enter("greedy")) for _ in range(20)]
        await settle()
        assert sum(task.done() for task in greedy) == 3
        other = asyncio.create_task(admission.enter("other"))
        await settle()
        assert other.done()
        another = asyncio.create_task(admission.enter("another"))
        await settle()
        assert not another.done()
        (await greedy[0]).leave()
        await settle()
        assert another.done(), "the host with the least goes first, though others wait longer"
        for task in (other, another):
            (await task).leave()
        for task in greedy[1:]:
            (await task).leave()
        assert (admission.used_bytes, admission.active) == (0, 0)

    bounded(scenario)


def test_of_a_hosts_connections_those_with_large_messages_wait_longest() -> None:
    async def scenario() -> None:
        size = 2**20
        admission = Admission(budget_bytes=size, message_bytes=size)
        inside = await admission.enter("a", "a:0")
        order: list[str] = []

        async def call(connection: str, num_bytes: int) -> None:
            passage = await admission.enter("a", connection)
            order.append(connection)
            passage.resize(num_bytes)
            await asyncio.sleep(0)
            passage.leave()

        first = [asyncio.create_task(call(f"a:{port}", size)) for port in range(1, 5)]
        await settle()
        later = [asyncio.create_task(call(f"a:{port}", size)) for port in range(1, 5)]
        await settle()
        small = asyncio.create_task(call("a:9", 10))
        await settle()
        inside.leave()
        await asyncio.gather(*first, *later, small)
        assert order.index("a:9") <= 4
        assert (admission.used_bytes, admission.active) == (0, 0)

    bounded(scenario)


def test_a_modest_connection_waits_for_no_large_answers() -> None:
    async def scenario() -> None:
        large = 2**20
        admission = Admission(budget_bytes=large, message_bytes=large)
        known = await admission.enter("a", "a:1")
        known.resize(100)
        known.leave()
        answering = await admission.enter("a", "a:2")
        answering.resize(5 * large)
        modest = await asyncio.wait_for(admission.enter("a", "a:1"), 1.0)
        strangers = asyncio.create_task(admission.enter("a", "a:3"))
        second = asyncio.create_task(admission.enter("a", "a:1"))
        await settle()
        assert not strangers.done(), "nothing is known of it"
        assert not second.done(), "there is one place"
        modest.resize(large)  # it was not modest: nobody else has the place until it is gone
        await settle()
        assert not second.done()
        assert admission.used_bytes == 6 * large
        modest.leave()
        await settle()
        assert second.done()
        third = asyncio.create_task(admission.enter("a", "a:1"))
        await settle()
        (await second).leave()
        await settle()
        assert not third.done(), "it was known for its large message by then"
        answering.leave()
        for task in (strangers, third):
            (await task).leave()
        assert (admission.used_bytes, admission.active) == (0, 0)

    bounded(scenario)


def test_one_that_gives_up_takes_no_place_of_the_modest() -> None:
    async def scenario() -> None:
        large = 2**20
        admission = Admission(budget_bytes=large, message_bytes=large)
        for name in ("a:1", "a:2", "a:3"):
            known = await admission.enter("a", name)
            known.resize(100)
            known.leave()
        answering = await admission.enter("a", "a:9")
        first = await admission.enter("a", "a:1")
        waiting = [asyncio.create_task(admission.enter("a", name)) for name in ("a:2", "a:3")]
        await settle()
        waiting[0].cancel()
        await settle()
        first.resize(1)  # its message is here, and small: the place is free
        await settle()
        assert waiting[1].done()
        (await waiting[1]).leave()
        first.leave()
        answering.leave()
        assert (admission.used_bytes, admission.active) == (0, 0)

    bounded(scenario)


def test_who_gives_up_waiting_takes_nothing_along() -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=MESSAGE, message_bytes=MESSAGE)
        first = await admission.enter("a")
        waiting = [asyncio.create_task(admission.enter("b")) for _ in range(3)]
        await settle()
        waiting[0].cancel()
        await settle()
        first.leave()
        waiting[1].cancel()  # let in this very moment
        await settle()
        (await waiting[2]).leave()
        assert (admission.used_bytes, admission.active) == (0, 0)

    bounded(scenario)


def test_too_many_that_wait_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_MAX_WAITING", 2)

    async def scenario() -> None:
        admission = Admission(budget_bytes=MESSAGE, message_bytes=MESSAGE)
        first = await admission.enter("a")
        waiting = [asyncio.create_task(admission.enter("a")) for _ in range(2)]
        await settle()
        with pytest.raises(ShardUnavailable, match="2 calls wait here already; try again"):
            await admission.enter("b")
        first.leave()
        for task in waiting:
            (await task).leave()

    bounded(scenario)


def test_empty_waits_for_the_last_and_for_no_longer_than_told() -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=MESSAGE, message_bytes=MESSAGE)
        await admission.empty(10.0)
        passage = await admission.enter("a")
        await admission.empty(0.01)
        assert admission.active == 1
        asyncio.get_running_loop().call_soon(passage.leave)
        await admission.empty(10.0)
        assert admission.active == 0

    bounded(scenario)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["enter", "resize", "leave", "cancel"]), st.integers(0, 50), st.integers(0, 150)),
        max_size=60,
    )
)
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_and_nobody_is_forgotten_in_any_order(steps: list[tuple[str, int, int]]) -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=5 * MESSAGE, message_bytes=MESSAGE)
        tasks: list[asyncio.Task[Passage]] = []
        held: dict[asyncio.Task[Passage], int] = {}
        for step, which, size in steps:
            if step == "enter":
                tasks.append(asyncio.create_task(admission.enter(f"host {which % 3}", f"connection {which % 5}")))
            elif tasks:
                task = tasks[which % len(tasks)]
                if step == "cancel" and not task.done():
                    task.cancel()
                elif task.done() and not task.cancelled() and task in held:
                    if step == "resize":
                        task.result().resize(size)
                        held[task] = size
                    elif step == "leave":
                        task.result().leave()
                        del held[task]
                        tasks.remove(task)
            await settle()
            tasks = [task for task in tasks if not task.cancelled()]
            for task in tasks:
                if task.done():
                    held.setdefault(task, 0 if task.result().aside else MESSAGE)
            assert admission.used_bytes == sum(held.values())
            assert admission.active == len(tasks)
            assert admission.used_bytes <= 5 * MESSAGE or any(size > MESSAGE for size in held.values())
        for task in tasks:
            (await task).leave()
        assert (admission.used_bytes, admission.active) == (0, 0)

    bounded(scenario)


@pytest.mark.parametrize("frees", [lambda passage: passage.resize(10), lambda passage: passage.leave()])
def test_room_is_freed_while_one_that_waited_has_hung_up_and_is_not_counted_out_yet(
    frees: Callable[[Passage], None],
) -> None:
    async def scenario() -> None:
        admission = Admission(budget_bytes=2 * MESSAGE, message_bytes=MESSAGE)
        first, second = await admission.enter("a", "a:1"), await admission.enter("b", "b:1")
        gone = asyncio.create_task(admission.enter("c", "c:1"))
        patient = asyncio.create_task(admission.enter("d", "d:1"))
        await settle()
        gone.cancel()  # its own task has not run yet
        frees(second)
        first.leave()
        (await patient).leave()
        await settle()
        assert gone.cancelled()
        assert admission._num_waiting == 0

    bounded(scenario)
