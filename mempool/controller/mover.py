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
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mempool.controller.roster import Roster
from mempool.controller.settling import Call
from mempool.errors import MempoolError
from mempool.placement import Assignment, Round, apply_round, moves, plan, rounds
from mempool.types import (
    ELEMENT_BYTES,
    Placement,
    ProductKeySpec,
    PullPages,
    PullReport,
    RescaleProgress,
    TableSchema,
    TableView,
)

T = TypeVar("T")

_STATES_PER_ELEMENT = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 0, "adam": 2, "adamw": 2, "rowwise_adam": 1}

_FREEZE_TIMEOUT_S = 20.0
_ANSWER_TIMEOUT_S = 10.0
"""How late a freeze or a thaw may be answered: a shard that hangs does not hold up the others."""
_PULL_TIMEOUT_S = 600.0
_LONGEST_PAUSE_S = 2.0
"""Between two rounds writers get at most this long, so that a rescale ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePlan:
    """The rounds that bring one table to its new placement."""

    name: str
    present: Assignment
    rounds: tuple[Round, ...]
    page_bytes: int

    @property
    def pages(self) -> int:
        return sum(round_.num_pages for round_ in self.rounds)


def plan_moves(view: TableView, shards: Sequence[int], round_bytes: int) -> MovePlan:
    """Plan one table's way to ``shards``."""
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
    page_bytes = _page_bytes(schema)
    return MovePlan(
        name=schema.name,
        present=present,
        rounds=tuple(
            rounds(
                moves(present, target),
                page_bytes=page_bytes,
                max_bytes=round_bytes,
                key_page_bytes=_key_page_bytes(view),
            )
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
        self._pages_moved = 0
        self._bytes_moved = 0

    def progress(self, *, table: str, done: bool = False) -> RescaleProgress:
        """Where the rescale stands; bytes_total is an estimate until the last round."""
        bytes_total = sum(plan_.pages * plan_.page_bytes for plan_ in self._plans)
        return RescaleProgress(
            shards_before=self._shards[0],
            shards_after=self._shards[1],
            pages_moved=self._pages_moved,
            pages_total=sum(plan_.pages for plan_ in self._plans),
            bytes_moved=self._bytes_moved,
            bytes_total=self._bytes_moved if done else max(bytes_total, self._bytes_moved),
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
                assignment = apply_round(assignment, round_)
                await self._move(plan_.name, round_, assignment)
                yield self.progress(table=plan_.name)
                if number + 1 < len(plan_.rounds):
                    await asyncio.sleep(min(time.monotonic() - started, _LONGEST_PAUSE_S))

    async def _move(self, table: str, round_: Round, assignment: Assignment) -> None:
        view = self._roster.view(table)
        table_id, placement = view.schema.table_id, view.placement
        dests = {move.dest for move in round_.moves} | {move.dest for move in round_.key_moves}
        owners = sorted({*placement.shards, *dests})
        try:
            # Clients prepare a step at the lowest owner first: once that is at rest, no step is half prepared, and the
            # others come to rest too. All at once could leave a step prepared here and held off there.
            gate, *others = placement.shards
            await self._freeze(gate, table_id)
            await _all(self._freeze(shard, table_id) for shard in others)
            reports = await _all(
                self._pull(dest, request) for dest, requests in _pulls(view, round_) for request in requests
            )
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


def _pulls(view: TableView, round_: Round) -> list[tuple[int, list[PullPages]]]:
    """The pulls of a round by destination: row pages that move in the same blocks from the same source go together."""
    blocks_of: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for move in round_.moves:
        blocks_of[move.dest, move.source, move.row_page].append(move.block)
    row_pages_of: dict[tuple[int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    for (dest, source, row_page), blocks in blocks_of.items():
        row_pages_of[dest, source, tuple(sorted(blocks))].append(row_page)
    heads_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for key_move in round_.key_moves:
        heads_of[key_move.dest, key_move.source].append(key_move.head)

    pulls: dict[int, list[PullPages]] = defaultdict(list)
    for (dest, source, blocks_), row_pages in sorted(row_pages_of.items()):
        pulls[dest].append(
            PullPages(
                table_id=view.schema.table_id,
                source=view.shard_info(source),
                row_pages=np.array(sorted(row_pages), dtype=np.int64),
                blocks=blocks_,
            )
        )
    for (dest, source), heads in sorted(heads_of.items()):
        pulls[dest].append(
            PullPages(
                table_id=view.schema.table_id,
                source=view.shard_info(source),
                row_pages=np.empty(0, dtype=np.int64),
                blocks=(),
                key_pages=tuple(sorted(heads)),
            )
        )
    return sorted(pulls.items())


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """All results, or the first error once every call has ended: none is left running behind the next step."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def _key_page_bytes(view: TableView) -> int | None:
    keys = view.schema.keys
    return 4 * view.schema.stride * keys.key_dim if isinstance(keys, ProductKeySpec) else None


def _page_bytes(schema: TableSchema) -> int:
    """Bytes of a page of values with its optimizer's state."""
    optimizer = schema.optimizer
    per_element = ELEMENT_BYTES[schema.dtype] + 4 * (_STATES_PER_ELEMENT[optimizer.algorithm] + schema.master)
    per_block = optimizer.algorithm.startswith("rowwise_") + optimizer.dense + (ELEMENT_BYTES[schema.dtype] == 1)
    return schema.page_slots * (min(schema.block_dim, schema.value_dim) * per_element + 4 * per_block)
