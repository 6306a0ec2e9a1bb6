"""Jobs of a shard and the order they are done in: events in, jobs out, without threads, clocks or sleeps.

Hosts are served fairly, by what their work weighs (weighted fair queueing), and so are the callers of a host: a small
call does not wait for what others have piled up, nor for all the connections that another host has opened. Jobs of one
caller keep their order; the controller's go first. Leaves running to ``thread``.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

from torch import Tensor

from mempool.errors import DeadlineExceeded, Overloaded, RequestTooLarge
from mempool.shard.steps.budget import Budget, numbers_bytes
from mempool.types import CommitPart, PreparePart, StepCountRequest, WriteRowsRequest
from mempool.types.caller import Caller

JOB_BYTES = 4096
"""What a job costs besides its tensors: objects of the call, from the connection to here."""
PIECE_BYTES = 16 * 2**20
"""Long work is cut into pieces of about so many bytes read or written, and no job is thought lighter or heavier."""
MAX_JOBS = 8192
"""Jobs of all callers together."""
MAX_CALLER_JOBS = 1024
MAX_CONTROL_JOBS = 256
BATCH_BYTES = PIECE_BYTES
"""What jobs that are done together read at most: whoever is first among them waits for no more."""
SMALL_BYTES = BATCH_BYTES // 4
"""A job that reads more gains nothing by company."""
MAX_BATCH_JOBS = 64
_BASE_WEIGHT = 16 * 1024
_BYTES_A_SECOND = 10**9  # what is thought to be read or written meanwhile, where a job took longer than its bytes say
_LONGEST_RETRY_S = 2.0
_MANY_LANES = 1024


class Answer(Protocol):
    """Where the result of a job goes, from the thread that runs it. Once."""

    def give(self, value: Any) -> None: ...

    def fail(self, error: BaseException) -> None: ...


class Begun:
    """What is begun of a job, and is to be ended together with others that are ``like`` it. Immutable."""

    __slots__ = ()

    @property
    def like(self) -> Hashable:
        """Equal for those that can be ended as one."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Shared:
    """How a job is done together with others.

    Attributes:
        num_bytes: What it reads, about; at most ``SMALL_BYTES``.
        least: From so many on it pays, 2 or more.
        begin: Does what is its own, given the request: what is begun, or the result as ``run`` has it.
        end: Does the rest of several that are alike: their results, in order. May be called again where it raised.
    """

    num_bytes: int
    least: int
    begin: Callable[[Any], Any]
    end: Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One request on its way through a shard.

    Attributes:
        stage: What it is called where time is counted.
        request: What was asked; None once it is answered.
        caller: Who asks, and until when.
        cost: Bytes that it makes the shard hold until it is answered.
        run: Does it: the result, or a generator that does it in pieces and returns the result.
        done: Where the result goes.
        control: It is the controller's.
        shared: How it is done where others like it wait; None: alone.
        leaves: It leaves the queue with its answer; of others those who ask say when.
        put_s: When it came, on a clock that measures.
        pieces: What is left of it, where it is done in pieces.
        known: It is in the queue, or on its way back to whoever asked.
        gone: Nobody waits for it any more.
        waiting: It lies in the queue.
        quiet: Whoever lined it up sees to its turn, so the shard's thread was not told of it.
    """

    stage: str
    request: Any
    caller: Caller
    cost: int
    run: Callable[[Any], Any]
    done: Answer
    control: bool = False
    shared: Shared | None = None
    leaves: bool = False
    put_s: float = 0.0
    asked_s: float = 0.0
    pieces: Any = None
    known: bool = False
    gone: bool = False
    waiting: bool = False
    quiet: bool = False
    weight: int = 0
    charge: int = 0

    def forget(self) -> None:
        """Keep nothing of the request alive."""
        self.request = self.run = self.pieces = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Answered:
    """A result that is to be sent at once, and what the thread does next, before any other job."""

    reply: Any
    then: Callable[[], None]


@dataclass(slots=True)
class _Lane:
    """One caller: jobs and bytes that the queue knows of, and the moment up to which its work is accounted for."""

    host: str
    jobs: int = 0
    num_bytes: int = 0
    waiting: int = 0
    ends: int = 0


@dataclass(slots=True, order=True)
class _Entry:
    ends: int
    number: int
    job: Job = field(compare=False)


class JobQueue:
    """Jobs that wait. Not thread-safe.

    Args:
        budget: Counts the bytes of jobs from ``add`` to ``leave``, and bounds them.
        name: Of the shard, for messages.
    """

    def __init__(self, budget: Budget, *, name: str = "the shard") -> None:
        self._budget = budget
        self._name = name
        self._control: deque[Job] = deque()
        self._heap: list[_Entry] = []
        self._lanes: dict[str, _Lane] = {}
        self._now = 0  # virtual: what each host that waits has got of the shard, in bytes
        self._busy: dict[str, int] = {}  # hosts with jobs that wait: of how many callers
        self._number = 0
        self._jobs = 0
        self._waiting = 0
        self._many_lanes = _MANY_LANES
        self._expired: list[Job] = []

    def __len__(self) -> int:
        """Jobs that wait."""
        return self._waiting + len(self._control)

    def __bool__(self) -> bool:
        """Whether any wait."""
        return self._waiting > 0 or len(self._control) > 0

    @property
    def num_jobs(self) -> int:
        """Jobs that wait, or are being answered."""
        return self._jobs

    @property
    def all_quiet(self) -> bool:
        """Whether nobody but those who see to it themselves waits for a turn."""
        return not self._control and all(entry.job.quiet or entry.job.gone for entry in self._heap)

    def add(self, job: Job, *, now_s: float) -> None:
        """Take a job in; ``leave`` must follow.

        Raises:
            DeadlineExceeded: Nobody waits for it any more.
            RequestTooLarge: It could never fit.
            Overloaded: Too much waits already, of this caller or of all.
        """
        deadline_s = job.caller.deadline_s
        if deadline_s is not None and deadline_s <= now_s:
            raise DeadlineExceeded(f"the call's time was over when it reached {self._name}; nothing was changed")
        lane = self._lanes.get(job.caller.name) or _Lane(_host_of(job.caller.name))
        self._refuse(job, lane)
        self._lanes[job.caller.name] = lane
        job.known = True
        lane.jobs += 1
        lane.num_bytes += job.cost
        self._jobs += 1
        self._budget.queued_bytes += job.cost
        if job.control:
            job.waiting = True
            self._control.append(job)
        else:
            self._line_up(job, lane, _BASE_WEIGHT + min(job.cost, PIECE_BYTES))

    def grow(self, job: Job, num_bytes: int) -> None:
        """The job is to hold so much more until it is answered.

        Raises:
            RequestTooLarge: It could never fit.
            Overloaded: There is no room for it now.
        """
        lane = self._lanes[job.caller.name]
        self._refuse_bytes(num_bytes, lane, f"the answer to {job.stage}", alone=lane.jobs == 1)
        job.cost += num_bytes
        lane.num_bytes += num_bytes
        self._budget.queued_bytes += num_bytes

    def again(self, job: Job) -> None:
        """Line a job up once more that is known: for its next piece, or because what it waited for has come."""
        if job.gone:
            return
        if job.control:
            job.waiting = True
            self._control.append(job)
        else:
            self._line_up(job, self._lanes[job.caller.name], _BASE_WEIGHT + min(job.cost, PIECE_BYTES))

    @property
    def first(self) -> Job | None:
        """The one that is ready next, but for the controller's."""
        while self._heap and self._heap[0].job.gone:
            heappop(self._heap)
        return self._heap[0].job if self._heap else None

    def is_first(self, caller: str, cost: int) -> bool:
        """Whether a job of this caller would be ready before all that wait."""
        if self._control or self.first is None:
            return not self._control
        lane = self._lanes.get(caller)
        return max(0 if lane is None else lane.ends, self._now) + self._charge(caller, cost) <= self._heap[0].ends

    def went_first(self, caller: str, cost: int, seconds: float) -> None:
        """It was done so, and took so long: its caller answers for it as for one that has waited."""
        charge = max(self._charge(caller, cost), int(seconds * _BYTES_A_SECOND))
        if self._waiting:
            lane = self._lanes.setdefault(caller, _Lane(_host_of(caller)))
            lane.ends = max(lane.ends, self._now) + charge
            self._now += charge // (len(self._busy) + (lane.host not in self._busy))
            self._clear(caller, lane)

    def _charge(self, caller: str, cost: int) -> int:
        lane = self._lanes.get(caller)
        callers = self._busy.get(_host_of(caller) if lane is None else lane.host, 0)
        return (_BASE_WEIGHT + min(cost, PIECE_BYTES)) * (callers + (lane is None or not lane.waiting))

    def hand_over(self) -> int:
        """None of those that wait is quiet any more. Returns how many were."""
        quiet = [entry.job for entry in self._heap if entry.job.quiet and entry.job.waiting]
        for job in quiet:
            job.quiet = False
        return len(quiet)

    def ready(self, *, now_s: float) -> Job | None:
        """The next job to run, None where none waits. Those nobody waits for are passed over."""
        while self._control:
            job = self._control.popleft()
            job.waiting = False
            if not job.gone and not self._is_late(job, now_s):
                return job
        while self._heap:
            job = heappop(self._heap).job
            if job.gone:  # counted out when it left
                continue
            self._out(job)
            if not self._is_late(job, now_s):
                self._served(job)
                return job
        return None

    def company(self, first: Job, *, now_s: float) -> list[Job]:
        """The jobs that would be ready next, one by one, as far as they may be done together with ``first``, which was
        ready just now. Nobody is passed over, so nobody's turn comes later, but by what is done together."""
        jobs: list[Job] = []
        num_bytes = _shared_bytes(first)
        if num_bytes is None or self._control or self._waiting + 1 < first.shared.least:  # type: ignore[union-attr]
            return jobs
        while self._heap and len(jobs) < MAX_BATCH_JOBS - 1:
            job = self._heap[0].job
            if job.gone:
                heappop(self._heap)
                continue
            further = _shared_bytes(job)
            if further is None or num_bytes + further > BATCH_BYTES:
                break
            heappop(self._heap)
            self._out(job)
            if not self._is_late(job, now_s):
                self._served(job)
                jobs.append(job)
                num_bytes += further
        return jobs

    def expire(self, *, now_s: float) -> list[Job]:
        """Jobs whose time was over before they were begun, each once: to be told so."""
        late = [entry for entry in self._heap if not entry.job.gone and _over(entry.job, now_s)]
        if late:
            for entry in late:
                self._out(entry.job)
                self._expired.append(entry.job)
            rest = [entry for entry in self._heap if entry.job.waiting]
            heapify(rest)
            self._heap = rest
        return self.take_expired()

    def take_expired(self) -> list[Job]:
        """Those found to be late so far, each once."""
        expired, self._expired = self._expired, []
        return expired

    def drain(self) -> list[Job]:
        """All that wait: none of them will be run."""
        jobs = [*self._control, *(entry.job for entry in self._heap if entry.job.waiting)]
        for job in jobs:
            if not job.control:
                self._out(job)
            job.waiting = False
        self._control.clear()
        self._heap.clear()
        return jobs

    def spent(self, job: Job, seconds: float) -> None:
        """How long a job, or a piece of one, took: a caller answers for work that weighed more than was thought."""
        excess = int(seconds * _BYTES_A_SECOND) - job.weight
        lane = self._lanes.get(job.caller.name)
        if excess > 0 and lane is not None and not job.control:
            lane.ends = max(lane.ends, self._now) + excess * self._busy.get(lane.host, 1)

    def leave(self, job: Job) -> None:
        """The job is answered, or nobody waits for it any more: nothing of it is kept. Repeatable."""
        job.gone = True
        if not job.known:
            return
        job.known = False
        if job.waiting:
            if job.control:
                self._control.remove(job)
                job.waiting = False
            else:
                self._out(job)
                self._lanes[job.caller.name].ends -= job.charge  # it was not done
            job.forget()
        lane = self._lanes[job.caller.name]
        lane.jobs -= 1
        lane.num_bytes -= job.cost
        self._jobs -= 1
        self._budget.queued_bytes -= job.cost
        self._clear(job.caller.name, lane)

    def _line_up(self, job: Job, lane: _Lane, weight: int) -> None:
        job.weight = weight
        job.waiting = True
        if not lane.waiting:
            self._busy[lane.host] = self._busy.get(lane.host, 0) + 1
        # Callers of a host share what it gets.
        job.charge = weight * self._busy[lane.host]
        lane.ends = max(lane.ends, self._now) + job.charge
        lane.waiting += 1
        self._waiting += 1
        self._number += 1
        heappush(self._heap, _Entry(lane.ends, self._number, job))
        if len(self._heap) > 2 * self._waiting + 64:  # most are of jobs that left
            self._heap = [entry for entry in self._heap if entry.job.waiting]
            heapify(self._heap)

    def _out(self, job: Job) -> None:
        """The job does not wait any more."""
        job.waiting = False
        lane = self._lanes[job.caller.name]
        lane.waiting -= 1
        if not lane.waiting:
            left = self._busy[lane.host] - 1
            if left:
                self._busy[lane.host] = left
            else:
                del self._busy[lane.host]
        self._waiting -= 1

    def _served(self, job: Job) -> None:
        """It is the job's turn, which is no longer in line: what each host that waits has got meanwhile."""
        host = self._lanes[job.caller.name].host
        self._now += job.weight // (len(self._busy) + (host not in self._busy))

    def _is_late(self, job: Job, now_s: float) -> bool:
        late = _over(job, now_s)
        if late:
            self._expired.append(job)
        return late

    def _clear(self, name: str, lane: _Lane) -> None:
        """Forget callers that are owed nothing and owe nothing."""
        if not self._jobs:
            self._lanes.clear()
            self._heap.clear()
            self._now = 0
        elif not lane.jobs and lane.ends <= self._now:
            del self._lanes[name]
        elif len(self._lanes) > self._many_lanes:
            self._lanes = {
                caller: known for caller, known in self._lanes.items() if known.jobs or known.ends > self._now
            }
            self._many_lanes = max(_MANY_LANES, 2 * len(self._lanes))

    def _refuse(self, job: Job, lane: _Lane) -> None:
        if job.control:
            if len(self._control) >= MAX_CONTROL_JOBS:
                raise Overloaded(
                    f"{len(self._control):,} calls about tables and pages wait at {self._name} already; try again "
                    "later. Nothing was changed.",
                    retry_after_s=self._wait_s(),
                )
            return
        # As with bytes: no caller has more than is left for others, so whoever has none yet is let in.
        if lane.jobs >= min(MAX_CALLER_JOBS, max(1, MAX_JOBS - self._jobs)) or self._jobs >= MAX_JOBS:
            raise Overloaded(
                f"{lane.jobs:,} calls of this caller and {self._jobs:,} of all wait at {self._name} already, of "
                f"{MAX_CALLER_JOBS:,} and {MAX_JOBS:,}; wait for answers before you ask more. Nothing was changed.",
                retry_after_s=self._wait_s(),
            )
        self._refuse_bytes(job.cost, lane, f"a {job.stage}", alone=lane.jobs == 0)

    def _refuse_bytes(self, num_bytes: int, lane: _Lane, what: str, *, alone: bool) -> None:
        """Refuse what does not fit, or would leave others less than this caller has. One call alone may have it all."""
        budget = self._budget
        room = budget.queue_room - num_bytes
        if room >= 0 and (alone or lane.num_bytes + num_bytes <= room):
            return
        if num_bytes > budget.queue_limit or (alone and lane.num_bytes + num_bytes > budget.queue_limit):
            raise RequestTooLarge(
                f"{what} of {lane.num_bytes * alone + num_bytes:,} bytes does not fit: {self._name} has "
                f"{budget.queue_limit:,} bytes for all calls that it is answering, of {budget.limit_bytes:,} for "
                f"clients{budget.limit_name}. Send fewer bags or rows at a time. Nothing was changed."
            )
        raise Overloaded(
            f"{what} of {num_bytes:,} bytes does not fit now: calls at {self._name} hold {budget.queued_bytes:,} "
            f"bytes, {lane.num_bytes:,} of them of this caller, and {max(0, budget.queue_room):,} are left; wait for "
            "answers before you ask more. Nothing was changed.",
            retry_after_s=self._wait_s(),
        )

    def _wait_s(self) -> float:
        """When it may be worth while to try again."""
        return min(_LONGEST_RETRY_S, 0.05 + self._budget.queued_bytes / _BYTES_A_SECOND)


def _shared_bytes(job: Job) -> int | None:
    """What it would read beside others; None where it is done alone: in pieces, say."""
    return None if job.shared is None or job.control or job.pieces is not None else job.shared.num_bytes


def _over(job: Job, now_s: float) -> bool:
    deadline_s = job.caller.deadline_s
    return deadline_s is not None and deadline_s <= now_s


def _host_of(caller: str) -> str:
    """Where a connection comes from, without its port; others are hosts of their own."""
    host, port, _ = caller.rpartition(":")
    return host if port else caller


def cost_of(*tensors: Tensor | None, numbers: int = 0) -> int:
    """Bytes that a request makes the shard hold until it is answered."""
    cost = JOB_BYTES + (numbers_bytes(numbers) if numbers else 0)
    for tensor in tensors:
        if tensor is not None:
            cost += tensor.nbytes
    return cost


def cost_of_parts(parts: Sequence[PreparePart | CommitPart]) -> int:
    """The same of a step."""
    return cost_of(numbers=sum(len(part.sequences) for part in parts)) + JOB_BYTES * max(0, len(parts) - 1)


def open_writes(request: WriteRowsRequest | StepCountRequest) -> int:
    """Numbers that a write brings along: of writes that are not over."""
    return 0 if request.write_id is None else len(request.write_id.open)
