"""Jobs that are done together: which those are, and that each of them gets what it would get alone."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import DeadlineExceeded, InvalidRequest, Overloaded, ShardUnavailable
from mempool.observe import Stages
from mempool.shard.steps.budget import Budget
from mempool.shard.work.jobs import BATCH_BYTES, JOB_BYTES, MAX_BATCH_JOBS, SMALL_BYTES, Begun, Job, JobQueue, Shared
from mempool.shard.work.thread import EngineThread
from mempool.shard.work.together import name_of
from mempool.types.caller import Caller

BOUND_S = 20.0


class _Nowhere:
    def give(self, value: Any) -> None: ...

    def fail(self, error: BaseException) -> None: ...


def _job(
    caller: str = "a",
    num_bytes: int | None = 1000,
    *,
    least: int = 2,
    cost: int = JOB_BYTES,
    control: bool = False,
    deadline_s: float | None = None,
) -> Job:
    """num_bytes: What it reads beside others; None: it is done alone."""
    shared = (
        None if num_bytes is None else Shared(num_bytes=num_bytes, least=least, begin=lambda request: request, end=list)
    )
    return Job(
        stage="gather",
        request=object(),
        caller=Caller(name=caller, deadline_s=deadline_s),
        cost=cost,
        run=lambda _: None,
        done=_Nowhere(),
        control=control,
        shared=shared,
    )


def _queue(*jobs: Job) -> JobQueue:
    queue = JobQueue(Budget(2**40), name="shard 3")
    for job in jobs:
        queue.add(job, now_s=0.0)
    return queue


def _turn(queue: JobQueue, *, now_s: float = 0.0) -> list[Job]:
    first = queue.ready(now_s=now_s)
    return [] if first is None else [first, *queue.company(first, now_s=now_s)]


JOBS = st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, SMALL_BYTES)), st.integers(1, 2**24))
EVENTS = st.lists(
    st.one_of(st.tuples(st.just("add"), JOBS), st.just("turn"), st.tuples(st.just("leave"), st.integers(0, 50))),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_nobody_is_passed_over(events: list[Any]) -> None:
    """A turn's jobs are those that would be ready one by one; so nobody's comes later, but by what one turn does."""
    together, one_by_one = _queue(), _queue()
    pairs: list[tuple[Job, Job]] = []
    for event in [*events, *["turn"] * len(events)]:
        match event:
            case ("add", (caller, num_bytes, cost)):
                pair = _job(f"host {caller}:1", num_bytes, cost=cost), _job(f"host {caller}:1", num_bytes, cost=cost)
                together.add(pair[0], now_s=0.0)
                one_by_one.add(pair[1], now_s=0.0)
                pairs.append(pair)
            case ("leave", number) if pairs:
                pair = pairs.pop(number % len(pairs))
                together.leave(pair[0])
                one_by_one.leave(pair[1])
            case "turn":
                turn = _turn(together, now_s=2.0)
                assert len(turn) <= MAX_BATCH_JOBS
                if len(turn) > 1:
                    sizes = [job.shared.num_bytes for job in turn if job.shared is not None]
                    assert len(sizes) == len(turn)
                    assert sum(sizes) <= BATCH_BYTES
                twins = {id(one): other for one, other in pairs}
                assert [one_by_one.ready(now_s=2.0) for _ in turn] == [twins[id(job)] for job in turn]
                assert together._now == one_by_one._now
                for job in turn:
                    together.leave(job)
                    one_by_one.leave(twins[id(job)])
                pairs = [pair for pair in pairs if pair[0] not in turn]
    assert len(together) == 0


def test_jobs_of_another_kind_stand_between() -> None:
    """A caller's update comes before the gather that it asked for after it."""
    first, second, update, last = _job(), _job(), _job(num_bytes=None), _job()
    queue = _queue(first, second, update, last)
    assert [_turn(queue) for _ in range(4)] == [[first, second], [update], [last], []]


def test_there_is_an_end_to_what_is_done_together() -> None:
    small = [_job(num_bytes=0) for _ in range(MAX_BATCH_JOBS + 1)]
    assert [len(_turn(queue)) for queue in [_queue(*small)] * 2] == [MAX_BATCH_JOBS, 1]
    large = [_job(num_bytes=SMALL_BYTES) for _ in range(5)]
    assert [len(_turn(queue)) for queue in [_queue(*large)] * 2] == [4, 1]


def test_who_left_and_whose_time_is_over_is_not_among_them() -> None:
    first, gone, late, last = _job(), _job(), _job(deadline_s=1.0), _job()
    queue = _queue(first, gone, late, last)
    queue.leave(gone)
    assert _turn(queue, now_s=2.0) == [first, last]
    assert queue.take_expired() == [late]


def test_what_the_controller_asks_waits_for_nobody() -> None:
    first, second = _job(), _job()
    queue = _queue(first, second)
    job = queue.ready(now_s=0.0)
    assert job is first
    queue.add(control := _job(control=True), now_s=0.0)
    assert queue.company(first, now_s=0.0) == []
    assert [_turn(queue) for _ in range(2)] == [[control], [second]]


def test_few_are_not_held_up_for_each_other() -> None:
    queue = _queue(*(jobs := [_job(least=3) for _ in range(5)]))
    assert [_turn(queue) for _ in range(2)] == [jobs, []]
    queue = _queue(*(jobs := [_job(least=3) for _ in range(2)]))
    assert [_turn(queue) for _ in range(2)] == [jobs[:1], jobs[1:]]


def test_work_in_pieces_goes_on_alone() -> None:
    first, second = _job(), _job()
    queue = _queue(first, second)
    assert _turn(queue) == [first, second]
    second.pieces = iter(())
    for job in (first, second):
        queue.again(job)
    assert [_turn(queue) for _ in range(2)] == [[first], [second]]


def test_stages_say_how_many_were_done_together() -> None:
    assert [name_of(number) for number in (2, 3, 4, 5, 8, 9, 64)] == [
        "batch of 2",
        *["batch of 3 to 4"] * 2,
        *["batch of 5 to 8"] * 2,
        "batch of 9 to 16",
        "batch of 33 to 64",
    ]


# On the thread


@dataclass(frozen=True)
class _Half(Begun):
    number: int

    @property
    def like(self) -> str:
        return "odd" if self.number % 2 else "even"


class _Work:
    """Jobs that double a number, those of odd and of even ones together."""

    def __init__(
        self, *, least: int = 2, fails: Callable[[Sequence[_Half]], BaseException | None] = lambda _: None
    ) -> None:
        self.ended: list[list[int]] = []
        self._fails = fails
        self.shared = Shared(num_bytes=1, least=least, begin=self.begin, end=self.end)

    def begin(self, request: Any) -> Any:
        return _Half(request) if isinstance(request, int) else request()

    def end(self, halves: Sequence[_Half]) -> list[int]:
        error = self._fails(halves)
        if error is not None:
            raise error
        self.ended.append([half.number for half in halves])
        return [2 * half.number for half in halves]

    def run(self, _: Any) -> Any:
        raise AssertionError("it has company")


def _together(
    work: _Work,
    requests: Sequence[Any],
    *,
    meanwhile: Callable[[list[asyncio.Task[Any]]], Coroutine[Any, Any, None]] | None = None,
    callers: Sequence[Caller] | None = None,
    **options: Any,
) -> tuple[list[Any], Stages]:
    """What each request is answered, all of them waiting when the thread is free; ``meanwhile``: before it is."""
    stages = Stages()

    async def body() -> list[Any]:
        thread = EngineThread(name="shard 3", stages=stages, **options)
        begun, go_on = threading.Event(), threading.Event()

        def gate(_: Any) -> None:
            begun.set()
            assert go_on.wait(BOUND_S)

        try:
            async with asyncio.timeout(BOUND_S):
                gated = asyncio.create_task(thread.run("gate", gate))
                await asyncio.to_thread(begun.wait, BOUND_S)
                tasks = []
                for number, request in enumerate(requests):
                    caller = Caller(f"host {number}:1") if callers is None else callers[number]
                    run = thread.run("job", work.run, request, caller=caller, shared=work.shared)
                    tasks.append(asyncio.create_task(run))
                    await asyncio.sleep(0)
                if meanwhile is not None:
                    await meanwhile(tasks)
                go_on.set()
                await gated
                return await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            go_on.set()
            await thread.close()

    return asyncio.run(body()), stages


def test_those_that_are_alike_are_ended_as_one() -> None:
    work = _Work()
    found, stages = _together(work, [1, 2, 3, 5, 4])
    assert found == [2, 4, 6, 10, 8]
    assert work.ended == [[1, 3, 5], [2, 4]]
    counts = {stage.stage: stage.count for stage in stages.snapshot()}
    assert counts == {"gate": 1, "job": 5, "queue": 6, "batch of 2": 1, "batch of 3 to 4": 1}


def test_where_too_few_are_alike_each_is_ended_by_itself() -> None:
    work = _Work(least=3)
    found, _ = _together(work, [1, 2, 3, 5, 4])
    assert found == [2, 4, 6, 10, 8]
    assert work.ended == [[1, 3, 5], [2], [4]]


def test_an_error_of_one_is_its_own() -> None:
    def wrong() -> None:
        raise InvalidRequest("wrong")

    def long() -> Generator[None, None, str]:
        yield
        return "long"

    work = _Work()
    found, _ = _together(work, [1, wrong, 3, lambda: "at once", long])
    assert [str(answer) for answer in found] == ["2", "wrong", "6", "at once", "long"]
    assert work.ended == [[1, 3]]


def test_what_cannot_be_ended_as_one_is_ended_one_by_one() -> None:
    """Each is told of its own error, where it has one."""

    def fails(halves: Sequence[_Half]) -> BaseException | None:
        return MemoryError("x") if len(halves) > 1 or halves[0].number == 3 else None

    work = _Work(fails=fails)
    found, _ = _together(work, [1, 3, 5])
    assert (found[0], found[2]) == (2, 10)
    assert isinstance(found[1], Overloaded)
    assert work.ended == [[1], [5]]


def test_who_leaves_or_is_late_is_left_out() -> None:
    async def leaves(tasks: list[asyncio.Task[Any]]) -> None:
        tasks[1].cancel()
        await asyncio.wait(tasks[1:2])
        now.append(2.0)

    now = [0.0]
    work = _Work()
    callers = [Caller("a"), Caller("b"), Caller("c", deadline_s=1.0), Caller("d")]
    found, _ = _together(work, [1, 3, 5, 7], meanwhile=leaves, callers=callers, clock=lambda: now[-1])
    assert (found[0], found[3]) == (2, 14)
    assert isinstance(found[1], asyncio.CancelledError)
    assert isinstance(found[2], DeadlineExceeded)
    assert work.ended == [[1, 7]]


def test_who_leaves_while_others_are_begun_is_left_out() -> None:
    left = threading.Event()
    leave: list[Callable[[], None]] = []

    def first() -> str:
        leave[0]()
        assert left.wait(BOUND_S)
        return "at once"

    async def ready(tasks: list[asyncio.Task[Any]]) -> None:
        tasks[1].add_done_callback(lambda _: left.set())
        leave.append(partial(asyncio.get_running_loop().call_soon_threadsafe, tasks[1].cancel))

    work = _Work()
    found, _ = _together(work, [first, 1, 3, 5], meanwhile=ready)
    assert (found[0], found[2], found[3]) == ("at once", 6, 10)
    assert work.ended == [[3, 5]]


def test_all_of_them_are_told_when_the_thread_ends() -> None:
    class Broken(BaseException):
        pass

    logging.disable(logging.CRITICAL)
    try:
        found, _ = _together(_Work(fails=lambda _: Broken("no more")), [1, 2, 3, lambda: "at once"])
    finally:
        logging.disable(logging.NOTSET)
    assert found[3] == "at once"
    for error in found[:3]:
        assert isinstance(error, ShardUnavailable)
        assert "no more" in str(error)


def test_all_of_them_are_counted_until_they_are_answered() -> None:
    budget = Budget(10**6)
    held: list[int] = []

    def note(_: Sequence[_Half]) -> None:
        held.append(budget.queued_bytes)

    _together(_Work(fails=note), [1, 3, 5], budget=budget)
    assert held[0] >= 3 * JOB_BYTES
    assert budget.queued_bytes == 0
