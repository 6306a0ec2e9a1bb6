"""What a shard's thread does in one turn: a job, or a piece of one, or several that are ended as one."""

import logging
from collections.abc import Callable, Hashable
from functools import partial
from types import GeneratorType

from mempool.errors import MempoolError
from mempool.observe import Stages
from mempool.shard.steps.budget import out_of_memory
from mempool.shard.work.jobs import Answered, Begun, Job
from mempool.shard.work.results import Outcome
from mempool.shard.work.together import Half, begun, ended, ended_alone, is_enough, name_of
from mempool.shard.work.trying import Trying
from mempool.types.running import Clock

_LOG = logging.getLogger(__name__)


class Doing:
    """Does jobs; who they are for is told by ``tell``.

    Args:
        name: Of the thread, for messages.
        stages: Where time is counted.
        trying: What jobs are tried by.
        clock: Seconds.
        ended: Told of each job, or piece of one: what came of it, and the seconds it took.

    Attributes:
        job: The one that is done just now.
        taken: Out of the queue in this turn, and not answered yet; ``ended`` removes them.
    """

    def __init__(
        self,
        name: str,
        *,
        stages: Stages,
        trying: Trying,
        clock: Clock,
        ended: Callable[[Job, Outcome, float], None],
    ) -> None:
        self._name = name
        self._stages = stages
        self._trying = trying
        self._clock = clock
        self._ended = ended
        self.job: Job | None = None
        self.taken: list[Job] = []

    def said(self, waiting: int) -> str:
        """What it is at just now, for messages, while so many wait: "it is at 'gather', and 3 more calls wait"; "" for
        nothing."""
        if self.job is None:
            return ""
        return f"it is at {self.job.stage!r}" + (f", and {waiting} more calls wait" if waiting > 0 else "")

    def take(self, jobs: list[Job]) -> None:
        """These are out of the queue; ``turn`` follows."""
        self.taken = jobs

    def turn(self) -> None:
        """Do what was taken: one, or a piece of it; or several, of which those that are alike are ended as one."""
        jobs = [*self.taken]
        self.job = jobs[0]
        if len(jobs) > 1:
            self._do_together(jobs)
        else:
            self._do(jobs[0])
        self.nothing()

    def nothing(self) -> None:
        """Nothing is done just now."""
        self.job, self.taken = None, []

    def tell(self, job: Job, outcome: Outcome) -> None:
        """Whoever asked for a job what came of it; and do what its answer has promised."""
        if outcome.failure is not None:
            job.pieces = None
            job.done.fail(outcome.failure)
        elif isinstance(outcome.result, Answered):
            job.done.give(outcome.result.reply)
            self._go_on(outcome.result)
        else:
            job.done.give(outcome.result)

    def _do(self, job: Job) -> None:
        began_s = self._clock()
        self._stages.record("queue", began_s - job.put_s)
        outcome = self._trying.tried(job, partial(self._do_some, job))
        self._ended(job, outcome, self._clock() - began_s)

    def _do_together(self, jobs: list[Job]) -> None:
        """Begin each by itself, and end those that are alike as one."""
        alike: dict[Hashable, list[Half]] = {}
        for job in jobs:
            if job.gone:
                self.taken.remove(job)
                continue
            self.job = job
            began_s = self._clock()
            self._stages.record("queue", began_s - job.put_s)
            outcome = self._trying.tried(job, partial(begun, job))
            took_s = self._clock() - began_s
            if isinstance(outcome.result, Begun):
                alike.setdefault(outcome.result.like, []).append(Half(job, outcome.result, took_s))
            else:
                self._ended(job, outcome, took_s)
        for halves in alike.values():
            if is_enough(halves) and self._end_as_one(halves):
                continue
            for half in halves:
                self.job = half.job
                began_s = self._clock()
                outcome = self._trying.tried(half.job, partial(ended_alone, half))
                self._ended(half.job, outcome, half.took_s + self._clock() - began_s)

    def _end_as_one(self, halves: list[Half]) -> bool:
        """Whether that went well. Nothing is done else: each is to be ended by itself."""
        self.job = halves[0].job
        began_s = self._clock()
        try:
            results = ended(halves)
        except Exception:  # there is less memory for all of them than for one, say
            return False
        took_s = self._clock() - began_s
        self._stages.record(name_of(len(halves)), took_s)
        for half, result in zip(halves, results, strict=True):
            self._ended(half.job, Outcome(result), half.took_s + took_s / len(halves))
        return True

    def _go_on(self, answered: Answered) -> None:
        """Do what an answer has promised. What fails stays promised: whoever answered sees to it."""
        started_s = self._clock()
        try:
            answered.then()
        except MempoolError as error:
            _LOG.warning("%s: what an answer has promised could not be done: %s", self._name, error)
        except Exception as error:
            if not out_of_memory(error):
                _LOG.exception("%s: what an answer has promised could not be done", self._name)
        self._stages.record("after the answer", self._clock() - started_s)

    def _do_some(self, job: Job) -> Outcome:
        """Run a job, or its next piece."""
        if job.pieces is None:
            result = job.run(job.request)
            if not isinstance(result, GeneratorType):
                return Outcome(result)
            job.pieces = result
        try:
            next(job.pieces)
        except StopIteration as end:
            job.pieces = None
            return Outcome(end.value)
        return Outcome(more=True)
