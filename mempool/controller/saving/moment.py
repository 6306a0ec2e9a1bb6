"""Takes one moment of tables: carries out what ``cut`` says, and has each owner do its part at it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from mempool.controller.calls import ShardCalls
from mempool.controller.roster import Roster
from mempool.controller.saving.cut import (
    LEASE_S,
    Answered,
    Call,
    Cut,
    Ended,
    Event,
    Failed,
    Freeze,
    Mark,
    Owner,
    Ticked,
)
from mempool.errors import ShardUnavailable
from mempool.types import ShardHost, TableView
from mempool.types.running import Clock

_FREEZE_MARGIN_S = 5.0
_LETTING_GO_S = 2.0
"""Tables whose moment is given up are waited for so long; else their freezes end by their lease."""

Marking = Callable[[ShardHost, Owner, int], Awaitable[None]]
"""What an owner does at the moment: its host, which owner, the table's version."""


@dataclass(kw_only=True)
class Moments:
    """Moments of one pool's tables.

    Args:
        roster, calls: Its shards, and the way to them.
        trainer_lease_s: How long a step may be prepared and not decided.
        clock: Seconds.
    """

    roster: Roster
    calls: ShardCalls
    trainer_lease_s: float
    clock: Clock

    async def take(self, views: Sequence[TableView], token: str, marking: Marking) -> Ended:
        """Have all tables stand still, each owner do its part, and all go on. Raises what was in the way."""
        cut = Cut({view.schema.table_id: view.placement.shards for view in views})
        events: asyncio.Queue[Event] = asyncio.Queue()
        calls: set[asyncio.Task[None]] = set()
        actions = cut.begin(self.clock())
        try:
            while True:
                for action in actions:
                    if isinstance(action, Ended):
                        if action.error is not None:
                            raise action.error
                        return action
                    task = asyncio.create_task(self._answered(action, token, marking, events))
                    calls.add(task)
                    task.add_done_callback(calls.discard)
                wait_s = None if cut.next_s == float("inf") else max(0.0, cut.next_s - self.clock())
                try:
                    async with asyncio.timeout(wait_s):
                        event = await events.get()
                except TimeoutError:
                    event = Ticked()
                actions = cut.handle(event, self.clock())
        except asyncio.CancelledError:
            left = [call for call in cut.abandon(self.clock()) if not isinstance(call, Ended)]
            thaws = [asyncio.create_task(self._answered(call, token, marking, events)) for call in left]
            calls.update(thaws)
            if thaws:
                await asyncio.wait(thaws, timeout=_LETTING_GO_S)
            raise
        finally:
            for task in calls:
                task.cancel()

    async def _answered(self, call: Call, token: str, marking: Marking, events: "asyncio.Queue[Event]") -> None:
        owner = call.owner
        info = self.roster.shards.get(owner.shard)
        version = 0
        try:
            if info is None:
                raise ShardUnavailable(f"shard {owner.shard} is gone", shard=owner.shard)
            if isinstance(call, Freeze):
                wait_s = self.trainer_lease_s + _FREEZE_MARGIN_S
                version = await self.calls.call(
                    info,
                    lambda host: host.freeze(owner.table_id, wait_s, token=token, lease_s=LEASE_S, renew=call.begun),
                    timeout_s=wait_s + _FREEZE_MARGIN_S,
                )
            elif isinstance(call, Mark):
                at = call.version
                await self.calls.call(info, lambda host: marking(host, owner, at), timeout_s=LEASE_S)
            else:
                await self.calls.call(info, lambda host: host.thaw(owner.table_id, token=token), timeout_s=LEASE_S)
        except Exception as error:
            events.put_nowait(Failed(call, error))
        else:
            events.put_nowait(Answered(call, version))
