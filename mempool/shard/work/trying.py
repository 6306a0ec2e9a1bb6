"""Jobs are tried: what whoever asked is told of a failure, and which ones nobody survives."""

import logging
from collections.abc import Callable

import torch

from mempool.errors import Internal, MempoolError, Overloaded
from mempool.shard.steps.budget import Budget, out_of_memory
from mempool.shard.work.jobs import Job
from mempool.shard.work.results import Outcome, bare

#: Of a read; others are those of a signal's handler, which are for whom it has interrupted.
OWN_ERRORS = (
    MempoolError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_LOG = logging.getLogger(__name__)


class Trying:
    """Runs what jobs do.

    Args:
        name: Of the shard, for messages.
        budget: Says whether limits come from a config file.
        probe: Raises where the device cannot be used any more; asked after a job failed for no reason of its own.
    """

    def __init__(self, name: str, *, budget: Budget, probe: Callable[[], None]) -> None:
        self._name = name
        self._budget = budget
        self._probe = probe

    def tried(self, job: Job, do: Callable[[], Outcome]) -> Outcome:
        """What comes of ``do``, which does the job or a piece of it."""
        try:
            return do()
        except MempoolError as error:
            return Outcome(failure=bare(error))
        except Exception as error:
            failure = bare(self._explained(job, error))
            bare(error)
            return Outcome(failure=failure)

    def _explained(self, job: Job, error: Exception) -> MempoolError:
        """What a caller is told of an error that is not ours."""
        if out_of_memory(error):
            _LOG.warning("%s: no memory for %s: %s", self._name, job.stage, error)
            more = ", or give shards more memory (shard.memory)" if self._budget.configured else ""
            return Overloaded(
                f"{self._name} has no memory for {job.stage} just now ({type(error).__name__}: {error}). Repeating it "
                f"is safe; ask for less at a time{more}",
                retry_after_s=1.0,
            )
        _LOG.exception("%s: %s failed", self._name, job.stage)
        try:
            self._probe()
        except Exception as broken:
            raise BrokenDevice(f"{job.stage} failed, and the device with it: {broken}") from error
        return Internal(f"{self._name}: {job.stage} failed with {type(error).__name__}: {error}. This is a bug.")


class BrokenDevice(BaseException):
    """The device takes no work any more. No Exception: nobody catches it but the end of the thread."""


def probe(device: torch.device) -> None:
    """Raises where a device takes no work any more: after an error that CUDA's context does not survive."""
    if device.type == "cuda":
        torch.zeros(1, device=device).add_(1).cpu()
