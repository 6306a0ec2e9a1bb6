"""Carries out what ``retry`` decides: tries, waits, and a call's one deadline, which goes with it to the shards."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from math import inf
from typing import TypeVar

from mempool.client.routing.patience import LONGEST_WORK_S, Deadline, Patience, WaitingFor, Watchdog
from mempool.client.routing.retry import Again, Backoff, GiveUp, Retry
from mempool.client.routing.whereabouts import Whereabouts
from mempool.errors import MempoolError
from mempool.types.caller import Caller, calling, current_caller
from mempool.types.running import Clock

T = TypeVar("T")


class Tries:
    """Runs calls until they succeed, their deadline ends, or an error comes that no retry can heal.

    Args:
        where: The pool, for messages.
        timeout_s: Deadline of a call that names none, seconds.
        backoff: Waits between tries.
        jitter: Gives a number from 0 to 1 at each call.
        clock: Seconds, monotonic: what deadlines that go along with calls are told by.
    """

    def __init__(
        self,
        where: Whereabouts,
        *,
        timeout_s: float = 30.0,
        backoff: Backoff | None = None,
        jitter: Callable[[], float] = random.random,
        clock: Clock = time.monotonic,
    ) -> None:
        self._clock = clock
        self.where = where
        self._watchdog = Watchdog()
        self.timeout_s = timeout_s
        self._backoff = backoff or Backoff()
        self._jitter = jitter
        self._closed = False
        self._patience = Patience(where.pool, where.doing) if where.doing is not None else None

    @property
    def closed(self) -> bool:
        """Whether nothing is tried again any more."""
        return self._closed

    def close(self) -> None:
        """Try nothing again any more: calls under way end with their next failure."""
        self._closed = True

    def retry(
        self,
        what: str | Callable[[], str],
        *,
        timeout_s: float | None = None,
        refused_s: float | None = None,
        began_s: float | None = None,
    ) -> Retry:
        """The policy of one call that begins now, or began then; other arguments as of ``run``."""
        return Retry(
            table=what if isinstance(what, str) else what(),
            where=self.where,
            start_s=asyncio.get_running_loop().time() if began_s is None else began_s,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
            backoff=self._backoff,
            jitter=self._jitter,
            refused_s=refused_s,
        )

    async def run(
        self,
        what: str | Callable[[], str],
        once: Callable[[], Awaitable[T]],
        *,
        refresh: Callable[[], Awaitable[bool]] | None = None,
        waiting_for: WaitingFor = tuple,
        timeout_s: float | None = None,
        refused_s: float | None = None,
        again: bool = True,
        check: Callable[[], Awaitable[None]] | None = None,
        silence_s: float = inf,
    ) -> T:
        """The result of ``once``.

        Args:
            what: Name of the table it is about, or of the call, for messages.
            once: May be cut off anywhere and run again, so all it sends must bear repetition.
            refresh: Run before each further try; answers whether it found anything newer.
            waiting_for: (shard, address) of those that were asked and have not answered.
            refused_s: How long to go on where nobody listens at any address; None: until the deadline.
            again: False: one try, whatever error it ends with.
            check: Run after ``silence_s`` of a try, and again and again: what it raises ends the try.
        """
        clock = asyncio.get_running_loop()
        began_s = clock.time()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        bound_s = timeout_s if self._patience is None else max(timeout_s, LONGEST_WORK_S)
        retry: Retry | None = None  # most calls need none

        def policy() -> Retry:
            return retry or self.retry(what, timeout_s=timeout_s, refused_s=refused_s, began_s=began_s)

        deadline = Deadline(
            self._watchdog,
            timeout_s,
            began_s=began_s,
            waiting_for=waiting_for,
            patience=self._patience,
            check=check,
            silence_s=silence_s,
        )
        failure: MempoolError | None = None
        found: Exception | None = None
        action: Again | GiveUp | None = None
        delay_s = 0.0
        try:
            with calling(self._bounded(bound_s)), deadline:
                while True:
                    try:
                        if failure is not None:
                            await asyncio.sleep(delay_s)
                            if refresh is not None and await refresh() and retry is not None:
                                retry.replanned()
                            await deadline.begin()
                        return await once()
                    except MempoolError as error:
                        deadline.found()
                        failure = error
                    except asyncio.CancelledError:
                        if (found := deadline.found()) is None:
                            raise
                        if not isinstance(found, MempoolError):
                            raise found from None
                        failure = found
                    if self._closed:
                        raise MempoolError(f"{self.where.pool} was closed during the call.") from failure
                    if not again:
                        raise failure
                    retry = policy()
                    action = retry.failed(failure, now_s=clock.time())
                    if isinstance(action, GiveUp):
                        raise action.error from (None if action.error is failure else failure)
                    delay_s = action.delay_s
        except MempoolError:
            raise
        except TimeoutError:
            raise policy().out_of_time(waiting_for=waiting_for(), now_s=clock.time()) from None
        finally:
            failure = found = action = retry = None  # their errors' tracebacks know this frame, and it what was asked
            if deadline.is_checking:
                await deadline.rest()

    def _bounded(self, timeout_s: float) -> Caller:
        """Whoever asks now, with this deadline, or their own where it is earlier."""
        caller, deadline_s = current_caller(), self._clock() + timeout_s
        if caller.deadline_s is not None:
            deadline_s = min(deadline_s, caller.deadline_s)
        return Caller(name=caller.name, deadline_s=deadline_s)
