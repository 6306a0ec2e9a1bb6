"""Jobs that wait together are ended as one, where they are alike: what the thread knows of them between their halves.

Which jobs those are is for ``jobs`` to say. Nobody waits for others to come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

from mempool.shard.work.jobs import Begun, Job
from mempool.shard.work.results import Outcome


@dataclass(frozen=True, slots=True)
class Half:
    """A job that is begun, and the seconds that took."""

    job: Job
    begun: Begun
    took_s: float


def begun(job: Job) -> Outcome:
    """Do what is its own of a job that is done together with others."""
    assert job.shared is not None, "those have company"
    result = job.shared.begin(job.request)
    if not isinstance(result, GeneratorType):
        return Outcome(result)
    job.pieces = result  # it is longer than it looked: the rest has turns of its own
    return Outcome(more=True)


def is_enough(halves: Sequence[Half]) -> bool:
    """Whether ending them as one pays."""
    shared = halves[0].job.shared
    return shared is not None and len(halves) >= max(2, shared.least)


def ended(halves: Sequence[Half]) -> Sequence[Any]:
    """The results of jobs that are alike, in order. Raises whatever the first one's ``end`` does."""
    shared = halves[0].job.shared
    assert shared is not None, "it was begun by that"
    return shared.end([half.begun for half in halves])


def ended_alone(half: Half) -> Outcome:
    """The result of one. Raises likewise."""
    return Outcome(ended([half])[0])


def name_of(number: int) -> str:
    """What so many jobs ended as one are called where time is counted: by powers of two, from 2 on."""
    most = 1 << (number - 1).bit_length()
    least = most // 2 + 1
    return f"batch of {most}" if least == most else f"batch of {least} to {most}"
