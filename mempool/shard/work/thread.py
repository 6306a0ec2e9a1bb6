"""The engine's one thread: runs jobs in the order that ``jobs`` says, their results for asyncio.

All state behind an engine is touched by this thread, or by a reader while it stands still or reads (``beside``):
nothing there needs a lock. A failure after which nothing can be trusted (of CUDA's context, of the interpreter) ends
it; those who wait are told, and whoever asked to be.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import torch

from mempool.errors import DeadlineExceeded, MempoolError, ShardUnavailable
from mempool.observe import Stages
from mempool.shard.steps.budget import Budget
from mempool.shard.work.beside import Beside
from mempool.shard.work.doing import Doing
from mempool.shard.work.jobs import JOB_BYTES, Job, JobQueue, Shared
from mempool.shard.work.pace import READS, Pace
from mempool.shard.work.results import Awaited, Handed, Outcome, Tell, Told, bare
from mempool.shard.work.trying import OWN_ERRORS, Trying
from mempool.types.caller import Caller, current_caller
from mempool.types.running import ONLY_WHEN_RUNG, THREADS, Clock, Runner, holds_others_up

T = TypeVar("T")
RequestT = TypeVar("RequestT")

_LOG = logging.getLogger(__name__)


class EngineThread:
    """Runs jobs one after another.

    Args:
        name: Is said in messages, and names the thread.
        stages: Where time is counted.
        budget: Bounds the bytes of what waits.
        upkeep: Run on the thread now and then, also when nothing else is to do, while there is something to keep up.
        upkeep_s: Seconds between two of them.
        probe: Raises where the device cannot be used any more; asked after a job failed for no reason of its own.
        on_fatal: Told, on the thread, why it ends, where that is for a failure after which nothing can be trusted.
        clock: Seconds, monotonic: what deadlines of callers are told by.
        runner: Gives it its thread.

    Attributes:
        pace: How long its work may be before others have their turn.
        beside: Lets those who ask for little read while a job does.
    """

    def __init__(
        self,
        *,
        name: str,
        stages: Stages,
        budget: Budget | None = None,
        upkeep: Callable[[], bool] = lambda: False,
        upkeep_s: float = 15.0,
        probe: Callable[[], None] = lambda: None,
        on_fatal: Callable[[BaseException], None] | None = None,
        clock: Clock = time.monotonic,
        runner: Runner = THREADS,
    ) -> None:
        self._name = name
        self._clock = clock
        self.pace = Pace(clock, others_wait=self.others_wait)
        self.beside = Beside()
        self._stages = stages
        self._upkeep = upkeep
        self._upkeep_s = upkeep_s
        self._on_fatal = on_fatal
        self._budget = budget or Budget(2**62)
        self._jobs = JobQueue(self._budget, name=name)
        self._doing = Doing(
            name, stages=stages, trying=Trying(name, budget=self._budget, probe=probe), clock=clock, ended=self._ended
        )
        self._asked: deque[Job] = deque()  # on their way to the queue: who asks so may be interrupted anywhere
        self._lock = threading.Lock()  # of the queue and of what says whether it is open
        self._at_work = threading.Lock()  # held by whoever touches the state: the thread, or a reader on its own
        self._reader = 0  # the thread that read last, where signals' handlers may run
        self._closed: str | None = None
        self._keeping_up, self._next_upkeep_s, self._busy_s = False, 0.0, 0.0
        self._worker = runner.worker(self._turn, name=name, within=torch.no_grad)  # rung once for each job in line

    @property
    def num_jobs(self) -> int:
        """Jobs that wait or are being answered."""
        return self._jobs.num_jobs + len(self._asked)

    @property
    def busy_s(self) -> float:
        """Seconds that it has worked, all jobs together."""
        return self._busy_s

    def others_wait(self) -> bool:
        """Whether jobs wait for the one that runs."""
        return bool(self._asked or self._jobs)

    @property
    def first(self) -> Job | None:
        """Of those that wait the one whose turn is next, but for the controller's."""
        with self._lock:
            self._take_in()
            return self._jobs.first

    @property
    def doing(self) -> str:
        """What it is at just now, for messages: "it is at 'gather', and 3 more calls wait"; "" for nothing."""
        return self._doing.said(self.num_jobs - 1)

    async def run(
        self,
        stage: str,
        job: Callable[[Any], Any],
        request: Any = None,
        *,
        cost: int = JOB_BYTES,
        control: bool = False,
        caller: Caller | None = None,
        again: Callable[[Any], Awaitable[None] | None] | None = None,
        shared: Shared | None = None,
    ) -> Any:
        """Run a job when its turn comes. Cancelling skips it, or the rest of it, and harms no other.

        Args:
            stage: What it is called.
            job: Is given the request. A generator is run piece by piece, others in between; what it returns counts.
            request: What was asked.
            cost: Bytes that it makes the shard hold.
            control: It is the controller's, and goes first.
            caller: Who asks; None: whoever the call is served for.
            again: Where given, looks at a result: what it answers is awaited, and the job run once more; None: it is
                the answer.
            shared: How it is done where others like it wait; None: alone.

        Raises:
            ShardUnavailable: The thread was closed.
            Overloaded: Too much waits already.
            DeadlineExceeded: Nobody waits for it any more.
            MempoolError: What the job raised; anything else it raised comes as Internal.
        """
        loop = asyncio.get_running_loop()
        answer = Awaited(loop)
        asked = Job(
            stage=stage,
            request=request,
            caller=current_caller() if caller is None else caller,
            cost=cost,
            run=job,
            done=answer,
            control=control,
            shared=shared,
        )
        del request, job
        result = waits = None
        answered = False
        try:
            self._enter(asked)
            while True:
                result = await answer.future
                waits = None if again is None else again(result)
                if waits is None:
                    answered = True
                    return result
                await waits
                asked.done = answer = Awaited(loop)
                self._line_up_again(asked)
        finally:
            at_end = asked.caller.at_end if answered else None
            if at_end is None:
                self._leave(asked)
            else:  # who does not take its answers is asked for no more of them than it may have here
                asked.forget()
                asked.done = None  # type: ignore[assignment]  # which holds the answer
                at_end(partial(self._leave, asked))
            # An error that is raised here knows this frame: what it holds would live as long as the error.
            del asked, answer, result, waits

    def at_once(
        self,
        stage: str,
        read: Callable[[RequestT], T | None],
        request: RequestT,
        *,
        wait: bool,
        caller: str = "",
        cost: int = 0,
        beside: bool = False,
    ) -> T | None:
        """Run what only reads on the caller's own thread, where nothing else is to be done before.

        Args:
            read: Is given the request. It may be cut off anywhere, by a signal's handler.
            wait: For whoever is at work to end; False: they are not waited for.
            cost: As of ``run``, where it may go before those whose turn is later than its caller's; 0: it never does.
            beside: Where nobody is waited for, it may be done while a job reads.

        Returns:
            Its result. None where others are to be served before, or it failed in any way: ``run`` it then.
        """
        if self._closed is not None or (not cost and self.others_wait()):
            return None
        if not wait:  # nobody interrupts these threads
            if not self._at_work.acquire(blocking=False):
                own = partial(self._at_once, stage, read, request, caller, cost)
                return self.beside.read(own) if beside else None
            try:
                return self._at_once(stage, read, request, caller, cost)
            finally:
                self._at_work.release()
        if self._reader == (me := threading.get_ident()) and self._at_work.locked():
            return None  # to a signal's handler: what it has interrupted holds the shard, and would be waited for
        with self._at_work:
            self._reader = me  # no call in between, after which a handler may come: it would not know itself
            return self._at_once(stage, read, request, caller, cost)

    @holds_others_up
    def _at_once(
        self, stage: str, read: Callable[[RequestT], T | None], request: RequestT, caller: str, cost: int
    ) -> T | None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._read(stage, read, request, caller, cost)
        return self._read(stage, read, request, caller, cost)

    def _read(
        self, stage: str, read: Callable[[RequestT], T | None], request: RequestT, caller: str, cost: int
    ) -> T | None:
        passes = self.others_wait()
        if self._closed is not None or (passes and not (cost and self._is_first(caller, cost))):
            return None
        self.pace.serves(caller)
        started_s = self._clock()
        try:
            result = read(request)
        except OWN_ERRORS:  # whatever it is, ``run`` finds it again, and knows what to do
            return None
        if result is None:
            return None
        took_s = self._clock() - started_s
        self._busy_s += took_s
        if passes:
            with self._lock:
                self._jobs.went_first(caller, cost, took_s)
        if not self._keeping_up:  # there may be something to keep up from now on
            self._keeping_up, self._next_upkeep_s = True, started_s + self._upkeep_s
            self._worker.ring()
        self._stages.record(stage, took_s)
        return result

    def _is_first(self, caller: str, cost: int) -> bool:
        with self._lock:
            self._take_in()
            return self._jobs.is_first(caller, cost)

    def begin(
        self, stage: str, job: Callable[[RequestT], T], request: RequestT, *, cost: int, timeout_s: float
    ) -> Callable[[], T | None]:
        """As ``run``, for a thread that waits itself, by calling what is returned; None after ``timeout_s``.

        A signal's handler may cut it off anywhere: the queue is the shard's own thread's to touch, and so it is to say
        there that nobody waits any more. A job that waits for none is done all the same, or is late.
        """
        handed: Handed = Handed()
        self.check_open()  # nobody would take it out any more
        caller = Caller("", (now_s := self._clock()) + timeout_s)
        asked = Job(
            stage=stage, request=request, caller=caller, cost=cost, run=job, done=handed, leaves=True, put_s=now_s,
            asked_s=now_s)  # fmt: skip
        try:
            self._asked.append(asked)
        finally:
            self._worker.ring()
        self.check_open()  # again: the thread looks once more after it was closed
        return lambda: handed.wait(timeout_s)

    def line_up(
        self,
        stage: str,
        job: Callable[[RequestT], Any],
        request: RequestT,
        *,
        tell: Tell,
        cost: int,
        timeout_s: float,
        caller: str,
        shared: Shared | None = None,
        quiet: bool = False,
    ) -> Callable[[], None]:
        """As ``begin``, for a thread that goes on meanwhile, and that nobody interrupts.

        Args:
            tell: Given what came of it, once at most, on any thread: perhaps on the caller's, before this returns.
            quiet: The caller sees to its turn, by ``take_turn`` or ``hand_over``.

        Returns:
            Takes it back: its turn, if it is still to come, is passed over.

        Raises:
            ShardUnavailable: The thread was closed.
            Overloaded, RequestTooLarge, DeadlineExceeded: As of ``run``.
        """
        asked = Job(
            stage=stage,
            request=request,
            caller=Caller(caller, self._clock() + timeout_s),
            cost=cost,
            run=job,
            done=Told(tell),
            shared=shared,
            leaves=True,
            quiet=quiet,
        )
        self._enter(asked)
        return partial(self._leave, asked)

    def take_turn(self) -> bool:
        """Run the next job, or a piece of one, on the caller's own thread, where all that wait are quiet. False: they
        are not, or another thread is at it, or nothing waits."""
        if not self._at_work.acquire(blocking=False):
            return False
        try:
            return self._serve(here=True)
        except BaseException as error:
            self._end_for_good(error)
            return False
        finally:
            self._at_work.release()
            if self._closed is not None:
                self._worker.ring()  # it ends when nothing waits any more

    def hand_over(self) -> None:
        """The shard's own thread sees to those that were lined up quietly."""
        with self._lock:
            for job in tuple(self._doing.taken):
                job.quiet = False  # another thread is at it, and puts it back when it is done in pieces
            num_jobs = self._jobs.hand_over()
        for _ in range(num_jobs):
            self._worker.ring()

    def _leave(self, job: Job) -> None:
        with self._lock:
            self._jobs.leave(job)

    def reserve(self, num_bytes: int) -> None:
        """The job that is running is to hold so much more until it is answered. On the thread alone.

        Raises:
            RequestTooLarge: It could never fit.
            Overloaded: There is no room for it now.
        """
        job = self._doing.job
        if job is not None:
            with self._lock:
                if job.known:
                    self._jobs.grow(job, num_bytes)

    def asked_s(self) -> float:
        """When the job that is running was asked for, on the clock. On the thread alone."""
        job = self._doing.job
        return 0.0 if job is None else job.asked_s

    async def close(self) -> None:
        """Let the jobs that are waiting finish, then end the thread. Repeatable."""
        with self._lock:
            if self._closed is None:
                self._closed = f"{self._name} is closed"
                self._worker.ring()
        await self._worker.join()

    def check_open(self) -> None:
        """Raises ShardUnavailable where the thread takes no jobs any more."""
        if self._closed is not None:
            raise ShardUnavailable(self._closed)

    def _enter(self, job: Job) -> None:
        with self._lock:
            # Under the lock, so that no job can come after the end and wait forever.
            self.check_open()
            self._take_in()
            if job.stage in READS:
                self.pace.asks(job.caller.name, job.cost)
            job.put_s = job.asked_s = self._clock()
            self._jobs.add(job, now_s=self._clock())
        if not job.quiet:
            self._worker.ring()

    def _take_in(self) -> None:
        """Line up those that were asked for. Under the lock."""
        while self._asked:
            job = self._asked.popleft()
            try:
                self._jobs.add(job, now_s=self._clock())
            except MempoolError as error:
                job.done.fail(bare(error))

    def _line_up_again(self, job: Job) -> None:
        job.put_s = self._clock()
        with self._lock:
            self.check_open()
            self._jobs.again(job)
        self._worker.ring()

    # On the thread

    def _turn(self) -> float | None:
        """Run the next job, or a piece of one; answers how long there is nothing to do unasked, None at the end."""
        with self._at_work:
            try:
                more = self._serve()
            except BaseException as error:
                self._end_for_good(error)
                return None
        if not more:
            return None
        return max(0.0, self._next_upkeep_s - self._clock()) if self._keeping_up else ONLY_WHEN_RUNG

    def _serve(self, *, here: bool = False) -> bool:
        """Run the next job with those that go with it, or a piece of one. here: on a thread that sees to quiet ones.
        Returns whether there may be more."""
        now_s = self._clock()
        with self._lock:
            self._take_in()
            if here and not self._jobs.all_quiet:
                return False
            job = self._jobs.ready(now_s=now_s)
            company = [] if job is None else self._jobs.company(job, now_s=now_s)
            late = self._jobs.take_expired()
            instead = not here and job is not None and job.quiet
            if job is not None:  # ``hand_over`` finds it in line, or here
                self._doing.take([job, *company])
        if instead:  # it took the turn of one that was rung for
            self._worker.ring()
        self._tell_late(late)
        if not here and self._keeping_up and now_s >= self._next_upkeep_s:  # which may wait for a disk
            self._keep_up()
        if job is None:
            return not here and (self._closed is None or self.others_wait())
        self.pace.serves(job.caller.name)
        self.beside.turn(self._doing.turn)
        if not self._keeping_up:
            self._keeping_up, self._next_upkeep_s = True, now_s + self._upkeep_s
            if here:  # the thread rests, and would not look
                self._worker.ring()
        return True

    def _keep_up(self) -> None:
        with self._lock:
            late = self._jobs.expire(now_s=self._clock())
        self._tell_late(late)
        self._keeping_up = self._upkeep() or len(self._jobs) > 0
        self._next_upkeep_s = self._clock() + self._upkeep_s

    def _tell_late(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.leaves:
                self._leave(job)
            text = f"{job.stage}: the call's time was over before its turn came at {self._name}"
            job.done.fail(DeadlineExceeded(text))
            job.forget()

    def _ended(self, job: Job, outcome: Outcome, took_s: float) -> None:
        """A job, or a piece of it, took so long."""
        self._stages.record(job.stage, took_s)
        self._busy_s += took_s
        with self._lock:
            self._doing.taken.remove(job)
            self._jobs.spent(job, took_s)
            if outcome.more:
                job.put_s = self._clock()
                self._jobs.again(job)
        if outcome.more:
            if not job.quiet:
                self._worker.ring()
            return
        if job.leaves:
            self._leave(job)
        self._doing.tell(job, outcome)

    def _end_for_good(self, error: BaseException) -> None:
        """Nothing can be trusted any more: tell all who wait, and whoever wants to know."""
        _LOG.critical("%s cannot go on", self._name, exc_info=error)
        text = f"{self._name} has ended: {type(error).__name__}: {error}. Its pages are gone with it"
        with self._lock:
            self._closed = text
            waiting = [*self._jobs.drain(), *self._asked]
            self._asked.clear()
            self._keeping_up = False
        for job in (*self._doing.taken, *waiting):
            job.done.fail(ShardUnavailable(text))
            job.forget()
        self._doing.nothing()
        if self._on_fatal is not None:
            self._on_fatal(error)
