"""Requests that are to be run again once something has happened, for how long they wait for it, and what they are told.

What they wait for is ``hosted``'s.
"""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from types import GeneratorType
from typing import Any

from mempool.errors import DataLoss, ShardUnavailable
from mempool.types import DecidedStep, ShardInfo, TableView
from mempool.types.pool import lost_remedy

LONGEST_WAIT_S = 3.0
"""How long a request waits here for what others do. Then it is told whom it waits for: its caller asks again for as
long as it likes, and can say so if it gives up."""


class Parked:
    """Not an answer: the job is to be run again, from its start, when ``woken`` is done.

    since_s: When it was asked for.
    in_doubt: It waits for what another shard may have to be asked for.
    longest_s: Seconds after which it is run again in any case; None: not before.
    """

    def __init__(self, *, since_s: float = 0.0, in_doubt: bool = False, longest_s: float | None = None) -> None:
        self.woken: Future[None] = Future()
        self.since_s = since_s
        self.in_doubt = in_doubt
        self.longest_s = longest_s

    def wake(self) -> None:
        """Let the waiter go on; one that was cancelled is passed over."""
        if self.woken.set_running_or_notify_cancel():
            self.woken.set_result(None)

    async def wait(self) -> None:
        """Done when ``wake`` was called. Cancelling it says that nobody waits."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.longest_s):
                await asyncio.wrap_future(self.woken)


class Behind(Exception):
    """The request knows a newer placement, whose view is on its way here: ``park``, told when it was asked for, is what
    it waits for."""

    def __init__(self, park: Callable[[float], Parked]) -> None:
        super().__init__()
        self.park = park


def answered(answer: Callable[[Any], Any], request: object, *, asked_s: Callable[[], float]) -> Any:
    """The answer, or what the request, which was asked for then, waits for that is ahead of this shard."""
    try:
        result = answer(request)
    except Behind as behind:
        return behind.park(asked_s())
    return _in_pieces(result, asked_s) if isinstance(result, GeneratorType) else result


def _in_pieces(pieces: Generator[None, None, Any], asked_s: Callable[[], float]) -> Generator[None, None, Any]:
    try:
        return (yield from pieces)
    except Behind as behind:
        return behind.park(asked_s())


class Waiting:
    """Those who wait for one thing."""

    def __init__(self) -> None:
        self._parked: list[Parked] = []

    def __bool__(self) -> bool:
        """Whether anybody does who has not left."""
        return bool(self._parked) and any(not parked.woken.cancelled() for parked in self._parked)

    def park(self, *, since_s: float = 0.0, in_doubt: bool = False, longest_s: float | None = None) -> Parked:
        """One more waits."""
        parked = Parked(since_s=since_s, in_doubt=in_doubt, longest_s=longest_s)
        if len(self._parked).bit_count() == 1:  # at 1, 2, 4, ...: what is left out below costs little
            self._parked = [other for other in self._parked if not other.woken.cancelled()]
        self._parked.append(parked)
        return parked

    def wake(self) -> None:
        """It has happened, or may have: all look again."""
        if not self._parked:
            return
        woken, self._parked = self._parked, []
        for parked in woken:
            parked.wake()

    def wake_late(self, now_s: float) -> None:
        """Those who have waited for longer than anybody should look again."""
        late = [parked for parked in self._parked if is_late(parked.since_s, now_s)]
        self._parked = [parked for parked in self._parked if not is_late(parked.since_s, now_s)]
        for parked in late:
            parked.wake()


def is_late(since_s: float, now_s: float) -> bool:
    """Whether a request of that time has waited for long enough."""
    return now_s - since_s > LONGEST_WAIT_S


def no_word(of_what: str, *, here: ShardInfo, late: ShardInfo | None) -> ShardUnavailable:
    """What another shard does not say: that one is late (None: nobody knows which), not this."""
    late = late or here
    at = f" at {late.address}" if late.address else ""
    return ShardUnavailable(
        f"shard {here.shard} has waited {LONGEST_WAIT_S:g} s to hear {of_what}: shard {late.shard}{at} knows, and did "
        "not say. Nothing was changed",
        shard=late.shard,
        address=late.address,
    )


def no_updates(step: DecidedStep, *, table: str, here: ShardInfo) -> ShardUnavailable:
    """A decided step is not prepared here, and its trainer has not come for it."""
    who = step.step_id
    return ShardUnavailable(
        f"version {step.version} of table {table!r} is step {who.step} of rank {who.rank} of group {who.group!r}, "
        f"which is decided, and whose updates are not on shard {here.shard} any more: its trainer sends them again "
        "when it commits next. Where that trainer is gone they are lost here: drop the table, make it again and write "
        "back what you saved",
        shard=here.shard,
        address=here.address,
    )


def held_off(table: str, round_token: str | None, *, here: ShardInfo) -> ShardUnavailable:
    """A freeze has held a request off for long enough."""
    return ShardUnavailable(
        f"pages of table {table!r} are moving, or kept for a checkpoint that is slow to write (round {round_token!r}), "
        f"which has held this call off on shard {here.shard} for {LONGEST_WAIT_S:g} s: that is late, or its controller "
        "is. Nothing was changed",
        shard=here.shard,
        address=here.address,
    )


def commits_lost(view: TableView, version: int, *, seen: int, here: ShardInfo) -> DataLoss:
    """A client has seen a later version than anybody here knows of."""
    return DataLoss(
        f"shard {here.shard} has table {view.schema.name!r} at version {version}, and this client has seen version "
        f"{seen} acknowledged: commits were lost here, or that version was never given. {_remedy(view)}",
        shard=here.shard,
        address=here.address,
    )


def pages_lost(view: TableView, lost: int, *, here: ShardInfo) -> DataLoss:
    """Pages of a table are the shard's and not there."""
    return DataLoss(
        f"shard {here.shard} (incarnation {here.incarnation}) lost {lost} pages of table {view.schema.name!r}: it "
        "restarted without them, or a commit failed half way. They are not replaced by initial values. "
        f"{_remedy(view)}; other tables go on",
        shard=here.shard,
        address=here.address,
    )


def _remedy(view: TableView) -> str:
    return lost_remedy(view.schema.name, view.saved)
