"""Moves the pages of tables to a new placement, in rounds, while clients go on.

What a round is, and when it is decided, is ``agreement.rounds``'; ``docs/agreement.md`` tells why. Between rounds
writers get a turn as long as the round was. What has moved stays moved, whatever fails later.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mempool.agreement import rounds as agreed
from mempool.agreement.rounds import Ended, Freeze, Pull, Renew, Round, Tell, Thaw
from mempool.controller.moves.carrying import carry_out
from mempool.controller.moves.pace import Pace
from mempool.controller.pulls import pull_of_decisions, pulls
from mempool.controller.roster import Roster
from mempool.controller.settling import Call
from mempool.errors import ShardUnavailable, StalePlacement
from mempool.placement import Assignment, Moves, apply_moves, assignment_of, moves, plan_table, rounds
from mempool.placement.heat import FloatArray
from mempool.types import (
    Placement,
    PullPages,
    PullReport,
    RescaleProgress,
    ShardHost,
    ShardLoad,
    TableSchema,
    TableView,
)
from mempool.types.running import THREADS, TRAINER_LEASE_S, Clock, Runner
from mempool.types.sizes import key_page_bytes, slot_bytes

_REST_S = 5.0
"""Beyond the trainers' lease: how long a freeze waits for prepared steps at most."""
_ANSWER_TIMEOUT_S = 10.0
"""How late a freeze, a view or a thaw may be answered: a shard that hangs does not hold up the others."""
_PULL_TIMEOUT_S = 600.0
_LONGEST_PAUSE_S = 2.0
"""Between two rounds writers get at most this long, so that a rescale ends."""
_MOST_PAGES = 2**16
"""Pages of a round, however small they are: they are named one by one."""
_ROUND_TRIES = 3
"""A round that was undone because its leases ended is tried so often: a controller that was paused has not failed."""
_NAMED = 10
"""How many tables a message names."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MovePlan:
    """The way of one table to its new placement.

    Attributes:
        schema: The table.
        epoch: Of the placement they begin with.
        present, target: Its owners before and after.
        moves: From one to the other.
        page_bytes: Bytes of one page, about.
        counted_bytes: Bytes that a page counts for in a round: more than it has, where pages are very small.
        heat: [row pages] that they were planned by; None: by the number of pages alone.
    """

    schema: TableSchema
    epoch: int
    present: Assignment
    target: Assignment
    moves: Moves
    page_bytes: int
    counted_bytes: int
    heat: FloatArray | None = None

    @property
    def name(self) -> str:
        return self.schema.name

    @property
    def pages(self) -> int:
        return self.moves.num_pages

    def rounds(self, round_bytes: int | Callable[[], int]) -> Iterator[Moves]:
        """Its moves in rounds of at most so many bytes; a function is asked before each."""
        return rounds(
            self.moves,
            page_bytes=self.counted_bytes,
            max_bytes=round_bytes,
            key_page_bytes=key_page_bytes(self.schema) or None,
        )


def plan_moves(view: TableView, shards: Sequence[int], round_bytes: int, heat: FloatArray | None = None) -> MovePlan:
    """Plan one table's way to ``shards``. Takes a while where pages or shards are many: not for the event loop."""
    schema, placement = view.schema, view.placement
    present = assignment_of(placement)
    target = plan_table(schema, present, shards, heat)
    width = min(schema.block_dim, schema.value_dim)
    page_bytes = schema.page_slots * slot_bytes(schema, width=width, blocks=1, first=0)
    return MovePlan(
        schema=schema,
        epoch=placement.epoch,
        present=present,
        target=target,
        moves=moves(present, target),
        page_bytes=page_bytes,
        counted_bytes=max(page_bytes, -(-round_bytes // _MOST_PAGES)),
        heat=heat,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """A round as it is carried out: before and after, and what is pulled by whom. All of it made before the freeze."""

    view: TableView
    moved: TableView
    pulls: tuple[tuple[int, PullPages], ...]


class Mover:
    """Carries out the plans of one rescale, table by table, round by round.

    Args:
        shards_before, shards_after: How many, for reports.
        plans: Of all tables.
        loads: What they make of the shards' load, for reports.
        roster: The pool's shards and tables.
        call: Reaches a shard.
        untold: Called where a shard that has no part in a round did not take its view.
        round_bytes: Bytes that a round carries at most.
        lease_s: Of a freeze.
        trainer_lease_s: How long a step may be prepared and not decided: a dead trainer's is given up then.
        clock: Seconds.
        runner: Works out what a round pulls.
        new_token: Names rounds.
    """

    def __init__(
        self,
        *,
        shards_before: int,
        shards_after: int,
        plans: Sequence[MovePlan],
        loads: tuple[ShardLoad, ...] = (),
        roster: Roster,
        call: Call,
        untold: Callable[[], None],
        round_bytes: int = 64 * 2**20,
        lease_s: float = agreed.LEASE_S,
        trainer_lease_s: float = TRAINER_LEASE_S,
        clock: Clock = time.monotonic,
        runner: Runner = THREADS,
        new_token: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self._shards = (shards_before, shards_after)
        self._plans = plans
        self._loads = loads
        self._roster = roster
        self._call = call
        self._untold = untold
        self._pace = Pace(round_bytes)
        self._lease_s = lease_s
        self._rest_s = trainer_lease_s + _REST_S
        self._clock = clock
        self._runner = runner
        self._new_token = new_token
        self._round: tuple[str, Round] | None = None
        self._pages_total = sum(plan_.pages for plan_ in plans)
        self._bytes_total = sum(plan_.pages * plan_.page_bytes for plan_ in plans)
        self._pages_moved = 0
        self._bytes_moved = 0
        self._in_doubt = False

    @property
    def begun(self) -> bool:
        """Whether any page has changed its owner, or may have."""
        return self._pages_moved > 0 or self._in_doubt

    @property
    def waiting_for(self) -> str:
        """What the round under way waits for, for people; "" if for nothing."""
        if self._round is None or not self._round[1].waits_long(self._clock()):
            return ""
        table, round_ = self._round
        shards = ", ".join(str(shard) for shard in round_.waits_for)
        return (
            f"a step of table {table!r} that is prepared on shard {shards} and not decided: by its trainer, or, if "
            f"that is gone, by the end of its lease (at most {self._rest_s:g} s)"
        )

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
            loads=self._loads,
        )

    async def run(self) -> AsyncIterator[RescaleProgress]:
        """Raises what a failed round raised; the rounds before it stay done."""
        for plan_ in self._plans:
            assignment, pause_s = plan_.present, 0.0
            yield self.progress(table=plan_.name)
            for round_ in plan_.rounds(lambda: self._pace.round_bytes):
                await asyncio.sleep(min(pause_s, _LONGEST_PAUSE_S))
                began_s = self._clock()
                assignment = await self._move(plan_.name, round_, assignment)
                pause_s = self._clock() - began_s
                yield self.progress(table=plan_.name)

    async def _move(self, table: str, round_: Moves, assignment: Assignment) -> Assignment:
        """One round; tried again where it was undone only because its leases ended."""
        view = self._roster.view(table)
        before = assignment
        assignment, prepared = await self._runner.run(lambda: _prepared(view, round_, before))
        for _ in range(_ROUND_TRIES):
            ended = await self._carry_out(prepared)
            if not (ended.outcome == "undone" and isinstance(ended.error, StalePlacement)):
                break
        if ended.outcome == "undone":
            assert ended.error is not None
            raise ended.error
        if ended.outcome == "unknown":
            self._in_doubt = True
            gate, epoch = view.placement.shards[0], prepared.moved.placement.epoch
            raise ShardUnavailable(
                f"shard {gate} did not say whether it took epoch {epoch} of table {table!r} ({ended.error}); the "
                "rescale stops here. Ask for it again once all shards are ready: mempool status",
                shard=gate,
            )
        self._pages_moved += round_.num_pages
        self._require_told(prepared, ended)
        return assignment

    async def _carry_out(self, prepared: _Prepared) -> Ended:
        view, moved = prepared.view, prepared.moved
        owners = {*view.placement.shards, *(dest for dest, _ in prepared.pulls)}
        gate = view.placement.shards[0]
        round_ = Round(
            gate=gate,
            others=owners,
            bystanders=self._roster.shards.keys(),
            pulls=len(prepared.pulls),
            lease_s=self._lease_s,
        )
        self._round = (view.schema.name, round_)
        calls = _RoundCalls(
            prepared,
            token=self._new_token(),
            call=self._call,
            roster=self._roster,
            lease_s=self._lease_s,
            rest_s=self._rest_s,
        )
        try:
            ended = await carry_out(
                round_,
                calls.make,
                on_decided=lambda: self._decided(moved),
                clock=self._clock,
            )
        finally:
            self._round = None
        if ended.outcome == "moved":
            self._bytes_moved += calls.num_bytes
            held_s, pulls_s = self._clock() - round_.held_s, round_.pulled_s - round_.at_rest_s
            self._pace.took(calls.num_bytes, held_s=held_s, pulls_s=pulls_s)
        return ended

    def _decided(self, moved: TableView) -> None:
        self._roster.put(moved.schema, moved.placement)

    def _require_told(self, prepared: _Prepared, ended: Ended) -> None:
        """No further page may move before every owner has the view: what it has staged is nowhere else any more."""
        view = prepared.moved
        owners = {*prepared.view.placement.shards, *(dest for dest, _ in prepared.pulls)}
        for shard, error in ended.untold:
            self._untold()
            if shard in owners:
                raise ShardUnavailable(
                    f"shard {shard} did not take epoch {view.placement.epoch} of table {view.schema.name!r} "
                    f"({error}); the rescale stops here. Ask for it again once all shards are ready: mempool status",
                    shard=shard,
                )


class _RoundCalls:
    """The calls of one try of a round, all with its token."""

    def __init__(
        self, prepared: _Prepared, *, token: str, call: Call, roster: Roster, lease_s: float, rest_s: float
    ) -> None:
        self._prepared = prepared
        self._call = call
        self._roster = roster
        self._lease_s = lease_s
        self._rest_s = rest_s
        self._table_id = prepared.view.schema.table_id
        self._token = token
        self.num_bytes = 0

    async def make(self, call: agreed.Call) -> None:
        """One call, with a bound on its time."""
        if isinstance(call, Pull):
            await self._pull(*self._prepared.pulls[call.number])
            return
        timeout_s = _ANSWER_TIMEOUT_S + (self._rest_s if isinstance(call, Freeze | Renew) else 0)
        await self._call(self._roster.shards[call.shard], lambda host: self._asked(call, host), timeout_s=timeout_s)

    async def _asked(self, call: Freeze | Renew | Tell | Thaw, host: ShardHost) -> None:
        if isinstance(call, Tell):
            await host.set_view(self._prepared.moved, token=self._token if call.token else "")
        elif isinstance(call, Thaw):
            await host.thaw(self._table_id, token=self._token)
        else:
            renew = isinstance(call, Renew) and call.begun
            await host.freeze(self._table_id, self._rest_s, token=self._token, lease_s=self._lease_s, renew=renew)

    async def _pull(self, dest: int, request: PullPages) -> None:
        asked = replace(request, token=self._token)
        report: PullReport = await self._call(
            self._roster.shards[dest], lambda host: host.pull_pages(asked), timeout_s=_PULL_TIMEOUT_S
        )
        self.num_bytes += report.num_bytes


def _prepared(view: TableView, round_: Moves, assignment: Assignment) -> tuple[Assignment, _Prepared]:
    """A round, and the assignment after it. Takes a while where pages are many."""
    following = apply_moves(assignment, round_)
    moved = Placement(
        table_id=view.schema.table_id,
        epoch=view.placement.epoch + 1,
        owners=following.owners,
        key_owners=following.key_owners,
    )
    fetched = [(dest, request) for dest, requests in pulls(view, round_) for request in requests]
    if moved.shards[0] != view.placement.shards[0]:
        fetched.append((moved.shards[0], pull_of_decisions(view)))
    return following, _Prepared(view=view, moved=replace(view, placement=moved), pulls=tuple(fetched))
