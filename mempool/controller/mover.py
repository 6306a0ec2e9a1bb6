"""Moves the pages of tables to a new placement, in rounds, while clients go on.

The life of a round, for one table: [CONTROLLER] freeze every owner, the lowest first: new Prepares and writes wait,
prepared steps are let finish, lookups and updates go on. [DESTINATIONS] pull their pages from the owners, stage them.
[CONTROLLER] a view with the next epoch goes to every shard: staged pages come alive, moved ones are freed, held updates
are dropped (their clients still have them and send them again), the freeze ends. Between rounds writers get a turn as
long as the round was. Nothing is decided before the first shard has the new view; until then any failure thaws all.
From then on nobody is thawed, and no further round begins, until all owners have it: a thaw drops what is staged.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mempool.controller.pulls import pulls
from mempool.controller.roster import Roster
from mempool.controller.settling import Call
from mempool.errors import MempoolError
from mempool.placement import Assignment, Moves, Rounds, apply_moves, moves, plan, rounds
from mempool.types import Placement, PullPages, PullReport, RescaleProgress, TableSchema, TableView
from mempool.types.sizes import key_page_bytes, slot_bytes

T = TypeVar("T")

_FREEZE_TIMEOUT_S = 20.0
_ANSWER_TIMEOUT_S = 10.0
"""How late a freeze or a thaw may be answered: a shard that hangs does not hold up the others."""
_PULL_TIMEOUT_S = 600.0
_LONGEST_PAUSE_S = 2.0
"""Between two rounds writers get at most this long, so that a rescale ends."""
_MOST_PAGES = 2**16
"""Pages of a round, however small they are: they are named one by one."""
_NAMED = 10
"""How many tables a message names."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MovePlan:
    """The rounds that bring one table to its new placement.

    Attributes:
        schema: The table.
        epoch: Of the placement they begin with.
        present, target: Its owners before and after.
        page_bytes: Bytes of one page, about.
    """

    schema: TableSchema
    epoch: int
    present: Assignment
    target: Assignment
    rounds: Rounds
    page_bytes: int

    @property
    def name(self) -> str:
        return self.schema.name

    @property
    def pages(self) -> int:
        return self.rounds.moves.num_pages


def plan_moves(view: TableView, shards: Sequence[int], round_bytes: int) -> MovePlan:
    """Plan one table's way to ``shards``. Takes a while where pages or shards are many: not for the event loop."""
    schema, placement = view.schema, view.placement
    present = Assignment(owners=placement.owners, key_owners=placement.key_owners)
    target = plan(
        present,
        shards,
        num_row_pages=schema.num_row_pages,
        num_blocks=schema.num_blocks,
        num_key_pages=schema.num_key_pages,
        layout=schema.layout,
    )
    width = min(schema.block_dim, schema.value_dim)
    page_bytes = schema.page_slots * slot_bytes(schema, width=width, blocks=1, first=0)
    return MovePlan(
        schema=schema,
        epoch=placement.epoch,
        present=present,
        target=target,
        rounds=rounds(
            moves(present, target),
            page_bytes=max(page_bytes, -(-round_bytes // _MOST_PAGES)),
            max_bytes=round_bytes,
            key_page_bytes=key_page_bytes(schema) or None,
        ),
        page_bytes=page_bytes,
    )


class Mover:
    """Carries out the plans of one rescale, table by table, round by round."""

    def __init__(
        self,
        *,
        shards_before: int,
        shards_after: int,
        plans: Sequence[MovePlan],
        roster: Roster,
        call: Call,
        push: Callable[[TableView, Collection[int]], Awaitable[None]],
    ) -> None:
        self._shards = (shards_before, shards_after)
        self._plans = plans
        self._roster = roster
        self._call = call
        self._push = push
        self._pages_total = sum(plan_.pages for plan_ in plans)
        self._bytes_total = sum(plan_.pages * plan_.page_bytes for plan_ in plans)
        self._pages_moved = 0
        self._bytes_moved = 0

    @property
    def begun(self) -> bool:
        """Whether any page has changed its owner."""
        return self._pages_moved > 0

    def moved_text(self) -> str:
        """What has moved and what has not, for people."""
        moved, parts = self._pages_moved, []
        for plan_ in self._plans:
            done = min(moved, plan_.pages)
            moved -= done
            if plan_.pages:
                parts.append(f"{done:,} of {plan_.pages:,} of table {plan_.name!r}")
        listed = ", ".join(parts[:_NAMED]) + (f" and of {len(parts) - _NAMED} tables more" if parts[_NAMED:] else "")
        return f"{self._pages_moved:,} of {self._pages_total:,} pages have moved ({listed})"

    def progress(self, *, table: str, done: bool = False) -> RescaleProgress:
        """Where the rescale stands; bytes_total is an estimate until the last round."""
        return RescaleProgress(
            shards_before=self._shards[0],
            shards_after=self._shards[1],
            pages_moved=self._pages_moved,
            pages_total=self._pages_total,
            bytes_moved=self._bytes_moved,
            bytes_total=self._bytes_moved if done else max(self._bytes_total, self._bytes_moved),
            table=table,
            done=done,
        )

    async def run(self) -> AsyncIterator[RescaleProgress]:
        """Raises what a failed round raised; the rounds before it stay done."""
        for plan_ in self._plans:
            assignment = plan_.present
            yield self.progress(table=plan_.name)
            for number, round_ in enumerate(plan_.rounds):
                started = time.monotonic()
                assignment = apply_moves(assignment, round_)
                await self._move(plan_.name, round_, assignment)
                yield self.progress(table=plan_.name)
                if number + 1 < len(plan_.rounds):
                    await asyncio.sleep(min(time.monotonic() - started, _LONGEST_PAUSE_S))

    async def _move(self, table: str, round_: Moves, assignment: Assignment) -> None:
        view = self._roster.view(table)
        table_id, placement = view.schema.table_id, view.placement
        owners = np.union1d(placement.shards, np.concatenate([round_.dests, round_.key_dests])).tolist()
        try:
            # Clients prepare a step at the lowest owner first: once that is at rest, no step is half prepared, and the
            # others come to rest too. All at once could leave a step prepared here and held off there.
            gate, *others = placement.shards
            await self._freeze(gate, table_id)
            await _all(self._freeze(shard, table_id) for shard in others)
            fetched = await asyncio.to_thread(pulls, view, round_)
            reports = await _all(self._pull(dest, request) for dest, requests in fetched for request in requests)
        except BaseException:
            await asyncio.gather(*(self._thaw(shard, table_id) for shard in owners))
            raise
        self._pages_moved += round_.num_pages
        self._bytes_moved += sum(report.num_bytes for report in reports)
        moved = Placement(
            table_id=table_id,
            epoch=placement.epoch + 1,
            owners=assignment.owners,
            key_owners=assignment.key_owners,
        )
        await self._push(self._roster.put(view.schema, moved), owners)

    async def _freeze(self, shard: int, table_id: int) -> int:
        return await self._call(
            self._roster.shards[shard],
            lambda host: host.freeze(table_id, _FREEZE_TIMEOUT_S),
            timeout_s=_FREEZE_TIMEOUT_S + _ANSWER_TIMEOUT_S,
        )

    async def _pull(self, dest: int, request: PullPages) -> PullReport:
        return await self._call(
            self._roster.shards[dest], lambda host: host.pull_pages(request), timeout_s=_PULL_TIMEOUT_S
        )

    async def _thaw(self, shard: int, table_id: int) -> None:
        try:
            await self._call(self._roster.shards[shard], lambda host: host.thaw(table_id), timeout_s=_ANSWER_TIMEOUT_S)
        except MempoolError:
            return  # it comes back without a freeze, or is thawed when it is settled


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """All results, or the first error once every call has ended: none is left running behind the next step."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
