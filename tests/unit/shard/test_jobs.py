"""Which job comes next, who is refused, and that every byte counted is given back."""

from collections import deque
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import DeadlineExceeded, Overloaded, RequestTooLarge
from mempool.shard.steps.budget import Budget
from mempool.shard.work import jobs
from mempool.shard.work.jobs import JOB_BYTES, MAX_CALLER_JOBS, MAX_CONTROL_JOBS, Job, JobQueue
from mempool.types.caller import Caller

MIB = 2**20


class _Nowhere:
    future: Any = None

    def give(self, value: Any) -> None: ...

    def fail(self, error: BaseException) -> None: ...


def _job(caller: str = "a", cost: int = JOB_BYTES, *, deadline_s: float | None = None, control: bool = False) -> Job:
    return Job(
        stage="gather",
        request=object(),
        caller=Caller(name=caller, deadline_s=deadline_s),
        cost=cost,
        run=lambda _: None,
        done=_Nowhere(),
        control=control,
    )


def _queue(limit_bytes: int = 2**40) -> tuple[JobQueue, Budget]:
    budget = Budget(limit_bytes)
    return JobQueue(budget, name="shard 3"), budget


def _added(queue: JobQueue, job: Job) -> Job:
    queue.add(job, now_s=0.0)
    return job


def _next(queue: JobQueue) -> Job:
    job = queue.ready(now_s=0.0)
    assert job is not None
    return job


def test_jobs_of_one_caller_keep_their_order() -> None:
    queue, budget = _queue()
    waiting = [_added(queue, _job(cost=cost)) for cost in (MIB, 5000, 3 * MIB, 5000)]
    assert len(queue) == 4
    for job in waiting:
        assert _next(queue) is job
        queue.leave(job)
    assert queue.ready(now_s=0.0) is None
    assert (len(queue), queue.num_jobs, budget.queued_bytes) == (0, 0, 0)


def test_a_small_call_waits_for_no_more_than_the_job_that_runs() -> None:
    """64 callers with 16 MiB each, again and again, and one that asks little beside."""
    queue, _ = _queue()
    big = deque(_added(queue, _job(f"big {number}", 16 * MIB)) for number in range(64))
    for _ in range(200):
        running = _next(queue)
        assert running.caller.name.startswith("big")
        queue.spent(running, 0.02)
        queue.leave(running)
        big.append(_added(queue, _job(running.caller.name, 16 * MIB)))
        small = _added(queue, _job("small", 10_000))
        between = list(iter(lambda: _next(queue), small))
        assert len(between) <= 1
        for job in between:
            queue.leave(job)
            _added(queue, _job(job.caller.name, 16 * MIB))
        queue.spent(small, 0.0002)
        queue.leave(small)


def test_a_host_gets_no_more_by_opening_more_connections() -> None:
    """64 connections of one host ask as often as they are answered, and one of another host does."""
    queue, _ = _queue()
    for port in range(64):
        _added(queue, _job(f"ipv4:10.0.0.1:{port}"))
    mine = _added(queue, _job("ipv6:[::2]:7"))
    served = 0
    for _ in range(2_000):
        job = _next(queue)
        queue.leave(job)
        again = _added(queue, _job(job.caller.name))
        if job is mine:
            mine, served = again, served + 1
    assert 900 <= served <= 1_100


def test_nobody_waits_for_ever_beside_many_small_calls() -> None:
    queue, _ = _queue()
    big = _added(queue, _job("big", 16 * MIB))
    for _ in range(20_000):
        for caller in ("a", "b", "c"):
            _added(queue, _job(caller, 10_000))
        for _ in range(3):
            job = _next(queue)
            if job is big:
                return
            queue.leave(job)
    raise AssertionError("the big one never came")


def test_who_goes_before_others_gets_no_more_than_who_waits() -> None:
    """Three ask for much in turn; another one asks for little, as often as it may go first."""
    queue, _ = _queue()
    for number in range(3):
        _added(queue, _job(f"ipv4:10.0.0.{number}:1", MIB))
    served: dict[str, int] = {}
    for _ in range(1_000):
        while queue.is_first("ipv4:10.0.0.9:1", 50_000):
            queue.went_first("ipv4:10.0.0.9:1", 50_000, 0.0)
            served["first"] = served.get("first", 0) + 50_000
        job = _next(queue)
        served[job.caller.name] = served.get(job.caller.name, 0) + MIB
        _added(queue, _job(job.caller.name, MIB))
        queue.leave(job)
    assert 0.5 * min(served.values()) <= served["first"] <= min(served.values()), served


def test_who_goes_before_others_answers_for_the_time_it_took() -> None:
    queue, _ = _queue()
    big = _added(queue, _job("big", 16 * MIB))
    assert queue.is_first("small", 10_000)
    queue.went_first("small", 10_000, 1.0)
    assert not queue.is_first("small", 10_000)
    _added(queue, _job("controller", control=True))
    assert not queue.is_first("another", 10_000), "the controller is"
    assert _next(queue).control
    queue.leave(big)
    assert queue.is_first("small", 10_000), "nobody waits"


def test_work_that_took_longer_than_its_bytes_say_is_counted() -> None:
    """A commit is a small message about a large step."""
    queue, _ = _queue()
    seen: dict[str, float] = {"slow": 0.0, "quick": 0.0}
    took = {"slow": 0.1, "quick": 0.001}
    for caller in seen:
        _added(queue, _job(caller))
    for _ in range(2000):
        job = _next(queue)
        seen[job.caller.name] += took[job.caller.name]
        queue.spent(job, took[job.caller.name])
        _added(queue, _job(job.caller.name))
        queue.leave(job)
    assert 0.5 < seen["slow"] / seen["quick"] < 2.0, seen


def test_what_the_controller_asks_goes_first() -> None:
    queue, _ = _queue()
    for number in range(10):
        _added(queue, _job(f"{number}"))
    control = _added(queue, _job("controller", control=True))
    assert _next(queue) is control
    queue.again(control)
    assert _next(queue) is control


def test_late_jobs_are_passed_over_and_told_once() -> None:
    queue, budget = _queue()
    late, kept = _added(queue, _job("a", deadline_s=5.0)), _added(queue, _job("b"))
    control = _added(queue, _job("c", deadline_s=4.0, control=True))
    assert queue.ready(now_s=6.0) is kept
    assert sorted(map(id, queue.take_expired())) == sorted(map(id, (late, control)))
    assert queue.take_expired() == []
    other = _added(queue, _job("a", deadline_s=7.0))
    assert queue.expire(now_s=6.5) == []
    assert queue.expire(now_s=7.5) == [other]
    assert queue.ready(now_s=7.5) is None
    for job in (late, kept, control, other):
        queue.leave(job)
    assert budget.queued_bytes == 0
    with pytest.raises(DeadlineExceeded, match="when it reached shard 3"):
        queue.add(_job(deadline_s=1.0), now_s=2.0)


def test_a_job_whose_caller_left_is_forgotten_at_once() -> None:
    queue, budget = _queue()
    first, second = _added(queue, _job(cost=MIB)), _added(queue, _job())
    queue.leave(first)
    assert (first.request, first.gone, budget.queued_bytes) == (None, True, JOB_BYTES)
    queue.leave(first)
    queue.again(first)
    assert _next(queue) is second
    assert queue.ready(now_s=0.0) is None


def test_callers_who_come_and_leave_leave_nothing_behind() -> None:
    queue, _ = _queue()
    _added(queue, _job("stays"))
    for number in range(10_000):
        queue.leave(_added(queue, _job(f"caller {number}", 16 * MIB)))
    assert len(queue._heap) <= 200
    assert len(queue._lanes) <= 1200


def test_a_caller_that_has_much_leaves_room_for_others() -> None:
    queue, budget = _queue(64 * MIB)
    for _ in range(24):  # half of three quarters of what clients have
        _added(queue, _job("greedy", MIB))
    with pytest.raises(Overloaded, match=r"shard 3 hold .* of this caller") as raised:
        _added(queue, _job("greedy", MIB))
    assert 0 < raised.value.retry_after_s <= 2.0
    _added(queue, _job("other", 8 * MIB))
    assert budget.queued_bytes <= budget.queue_limit


def test_one_call_alone_may_have_all_there_is_and_no_more() -> None:
    queue, budget = _queue(64 * MIB)
    job = _added(queue, _job(cost=48 * MIB))
    with pytest.raises(Overloaded, match="does not fit now"):
        _added(queue, _job("b", MIB))
    queue.leave(job)
    with pytest.raises(RequestTooLarge, match=r"a gather of 50,331,649 bytes does not fit: shard 3 has 50,331,648"):
        _added(queue, _job(cost=48 * MIB + 1))
    job = _added(queue, _job(cost=8 * MIB))
    queue.grow(job, 40 * MIB)
    assert budget.queued_bytes == 48 * MIB
    with pytest.raises(RequestTooLarge, match="the answer to gather of 50,331,649 bytes"):
        queue.grow(job, 1)
    other = _job("b", 1)
    with pytest.raises(Overloaded):
        _added(queue, other)
    queue.leave(other)  # what was refused has nothing to give back
    queue.leave(job)
    assert (budget.queued_bytes, queue.num_jobs) == (0, 0)


def test_what_is_held_takes_room_from_calls() -> None:
    queue, budget = _queue(64 * MIB)
    budget.hold("trainer", 56 * MIB)
    with pytest.raises(Overloaded, match="does not fit now"):
        _added(queue, _job(cost=9 * MIB))
    _added(queue, _job(cost=8 * MIB))


def test_jobs_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, _ = _queue()
    waiting = [_added(queue, _job()) for _ in range(MAX_CALLER_JOBS)]
    with pytest.raises(Overloaded, match="1,024 calls of this caller"):
        _added(queue, _job())
    monkeypatch.setattr(jobs, "MAX_JOBS", MAX_CALLER_JOBS)
    with pytest.raises(Overloaded, match="of all wait at shard 3"):
        _added(queue, _job("b"))
    queue.leave(waiting[0])
    _added(queue, _job("b"))
    for _ in range(MAX_CONTROL_JOBS):
        _added(queue, _job(control=True))
    with pytest.raises(Overloaded, match="256 calls about tables and pages"):
        _added(queue, _job(control=True))


def test_draining_takes_all_that_wait() -> None:
    queue, budget = _queue()
    waiting = [_added(queue, _job(control=control)) for control in (False, True, False)]
    assert sorted(map(id, queue.drain())) == sorted(map(id, waiting))
    assert len(queue) == 0
    for job in waiting:
        queue.leave(job)
    assert (budget.queued_bytes, queue.num_jobs) == (0, 0)


CALLERS = ("a", "b", "c")
EVENTS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(CALLERS), st.integers(1, 20 * MIB), st.booleans()),
    st.tuples(st.just("next"), st.booleans()),
    st.tuples(st.just("leave"), st.integers(0, 50)),
    st.tuples(st.just("spent"), st.floats(0, 1)),
    st.tuples(st.just("expire"), st.floats(0, 10)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_every_byte_and_job_is_given_back(events: list[tuple[Any, ...]]) -> None:
    queue, budget = _queue(128 * MIB)
    known: list[Job] = []
    waiting: list[Job] = []
    now_s = 0.0
    for event in events:
        match event:
            case ("add", caller, cost, control):
                job = _job(caller, cost, control=control, deadline_s=now_s + 3.0 if cost % 3 == 0 else None)
                try:
                    queue.add(job, now_s=now_s)
                except (Overloaded, RequestTooLarge):
                    queue.leave(job)
                else:
                    known.append(job)
                    waiting.append(job)
            case ("next", again):
                job = queue.ready(now_s=now_s)  # type: ignore[assignment]
                if job is not None:
                    first = next(
                        other
                        for other in waiting
                        if (other.caller.name, other.control) == (job.caller.name, job.control)
                        and (other.caller.deadline_s is None or other.caller.deadline_s > now_s)
                    )
                    assert job is first, "jobs of one caller in order"
                    waiting.remove(job)
                    if again:
                        queue.again(job)
                        waiting.append(job)
            case ("leave", number) if known:
                job = known.pop(number % len(known))
                queue.leave(job)
                waiting = [other for other in waiting if other is not job]
            case ("spent", seconds) if known:
                queue.spent(known[0], seconds)
            case ("expire", seconds):
                now_s += seconds
                queue.expire(now_s=now_s)
        gone = [job for job in waiting if job.caller.deadline_s is not None and job.caller.deadline_s <= now_s]
        waiting = [job for job in waiting if job not in gone or (job.control and job.waiting)]
        assert budget.queued_bytes == sum(job.cost for job in known) <= budget.queue_limit
        assert queue.num_jobs == len(known)
    for job in known:
        queue.leave(job)
    assert (budget.queued_bytes, queue.num_jobs, len(queue)) == (0, 0, 0)
    assert queue.ready(now_s=now_s) is None


def test_callers_with_many_jobs_leave_room_for_one_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_JOBS", 100)
    queue, _ = _queue()
    let_in = dict.fromkeys("abcdefgh", 0)
    for _ in range(100):
        for caller in let_in:
            with suppress(Overloaded):
                _added(queue, _job(caller))
                let_in[caller] += 1
    assert set(let_in.values()) == {11, 12}  # of a hundred, shared with one who is not there yet
    for newcomer in ("i", "j", "k"):
        _added(queue, _job(newcomer))
