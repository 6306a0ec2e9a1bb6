"""Asks several shards of one plan together, and says which of them are still to answer. Knows no message.

Every call gets the envelope of its shard: table, epoch, incarnation.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from mempool.client.routing.plan import TablePlan
from mempool.errors import MempoolError, Replan
from mempool.types import Envelope, ShardHost, ShardInfo

T = TypeVar("T")
Call = Callable[[ShardHost, Envelope], Awaitable[T]]
Dial = Callable[[ShardInfo], ShardHost]


class Traffic:
    """Tensor bytes of a router's requests and replies, headers not counted. Any thread may add to them."""

    __slots__ = ("_lock", "bytes_received", "bytes_sent")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes_sent = 0
        self.bytes_received = 0

    def add(self, *, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self.bytes_sent += sent
            self.bytes_received += received


class Versions:
    """By table id, the highest version that is known to be: acknowledged, or seen in a reply. For any thread."""

    __slots__ = ("_known", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, int] = {}

    def get(self, table_id: int) -> int | None:
        """None where nothing is known yet."""
        return self._known.get(table_id)

    def saw(self, table_id: int, version: int) -> None:
        """There is such a version of the table: later requests are answered by it or a later one."""
        if version > self._known.get(table_id, 0):
            with self._lock:
                self._known[table_id] = max(version, self._known.get(table_id, 0))

    def forget(self, table_id: int) -> None:
        """The table was dropped."""
        with self._lock:
            self._known.pop(table_id, None)


class Fanout:
    """Calls to the shards of one plan.

    Args:
        plan: The plan.
        dial: Gives the host of a shard.
        traffic: For those that send to add to.
        versions: What is known to be.
    """

    def __init__(self, plan: TablePlan, *, dial: Dial, traffic: Traffic, versions: Versions) -> None:
        self.plan = plan
        self._versions = versions
        self.traffic = traffic
        self._dial = dial
        self._waiting: dict[int, str] = {}

    @property
    def waiting_for(self) -> tuple[tuple[int, str], ...]:
        """(shard, address) of those that were asked and have not answered, ascending; for whom a deadline cut off."""
        return tuple(sorted(self._waiting.items()))

    def saw(self, version: int) -> None:
        """As ``Versions.saw``."""
        self._versions.saw(self.plan.table_id, version)

    def envelope(self, info: ShardInfo) -> Envelope:
        """What a request to this shard says of the plan."""
        return envelope_of(self.plan, info, self._versions)

    async def each(self, calls: Sequence[tuple[ShardInfo, Call[T]]], *, to_the_end: bool = False) -> list[T]:
        """All calls together, replies in their order; the gravest error is raised.

        to_the_end: One that fails does not end the others.
        """
        if not calls:  # an empty batch on a table by rows needs nobody
            return []
        if len(calls) == 1:
            return [await self._one(*calls[0])]
        tasks = [asyncio.ensure_future(self._one(info, call)) for info, call in calls]
        try:
            await asyncio.wait(tasks, return_when=asyncio.ALL_COMPLETED if to_the_end else asyncio.FIRST_EXCEPTION)
        finally:
            if left := [task for task in tasks if not task.done()]:
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
            # Asked of all, also where this is cut off: an error that nobody asks for is logged as one.
            failed = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
        if failed:
            self._waiting.clear()
            raise min(failed, key=_leniency)
        return [task.result() for task in tasks]

    async def _one(self, info: ShardInfo, call: Call[T]) -> T:
        self._waiting[info.shard] = info.address
        try:
            reply = await call(self._dial(info), self.envelope(info))
        except MempoolError as error:
            self._waiting.pop(info.shard, None)
            if error.shard is None:
                error.shard = info.shard
            if error.address is None:
                error.address = info.address or None
            raise
        # A call that was cut off stays among those waited for: that is whom a timeout names.
        self._waiting.pop(info.shard, None)
        return reply


def envelope_of(plan: TablePlan, info: ShardInfo, versions: Versions) -> Envelope:
    """What a request to a shard says of the plan, and of what is known."""
    return Envelope(
        table_id=plan.table_id,
        epoch=plan.epoch,
        incarnation=info.incarnation,
        table_version=versions.get(plan.table_id) or 0,
    )


def _leniency(error: BaseException) -> int:
    """Errors that trying again cannot heal come first: a lost page is not hidden behind a slow shard."""
    if not isinstance(error, MempoolError):
        return 0
    if not error.retryable:
        return 1
    return 2 if isinstance(error, Replan) else 3
