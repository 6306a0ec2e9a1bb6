"""Several tables on shards that are a few sets, and do as the test says: what the coordinator is tested against.

They count and order; values are nobody's concern here.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mempool.client.routing.attempt import LookupRecord, Seen
from mempool.client.routing.retry import Backoff
from mempool.client.routing.router import Router
from mempool.client.training.coordinator import Coordinator
from mempool.client.training.session import Session
from mempool.errors import DataLoss, MempoolError, NotFound, StalePlacement, StepConflict
from mempool.types import (
    CommitPart,
    CommitReply,
    CommitRequest,
    CommittedPart,
    DiscardReply,
    DiscardRequest,
    Envelope,
    HeartbeatReply,
    HeartbeatRequest,
    Placement,
    PreparedPart,
    PreparePart,
    PrepareReply,
    PrepareRequest,
    ShardInfo,
    ShardStatus,
    Stamp,
    TableStatus,
    TableView,
    UpdateReply,
    UpdateRequest,
)
from mempool.types.bags import Bags
from tests.support.faulty import make_schema

Hook = Callable[[Any], Awaitable[None]]

# Owners of three column blocks.
THREE = (0, 1, 2)
BAGS = Bags(ids=torch.tensor([0, 9]), weights=torch.ones(2), offsets=torch.tensor([0, 2]))


@dataclass
class ScriptedShard:
    """One shard.

    Attributes:
        before, after: What happens to the next calls of a method, before and after they take effect.
        held: (table, step, sequence).
        prepared: By table: the step, and the decider's (table, step).
        applied: By table: (step, sequences, lr, version), in order.
        frozen: Tables whose pages move.
        lost: Tables whose pages are gone here.
    """

    info: ShardInfo
    pool: "ScriptedPool"
    lease_s: float = 10.0
    before: dict[str, list[Hook | MempoolError | None]] = field(default_factory=lambda: defaultdict(list))
    after: dict[str, list[Hook | MempoolError | None]] = field(default_factory=lambda: defaultdict(list))
    calls: list[tuple[str, Any]] = field(default_factory=list)
    held: set[tuple[int, int, int]] = field(default_factory=set)
    prepared: dict[int, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    over: dict[int, int] = field(default_factory=dict)
    applied: dict[int, list[tuple[int, tuple[int, ...], float, int]]] = field(default_factory=lambda: defaultdict(list))
    frozen: dict[int, asyncio.Event] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)

    async def update(self, request: UpdateRequest) -> UpdateReply:
        return await self._served("update", request, self._update)

    async def prepare(self, request: PrepareRequest) -> PrepareReply:
        if request.wait:
            for part in request.parts:
                if (event := self.frozen.get(part.envelope.table_id)) is not None:
                    self.calls.append(("wait", request))
                    await event.wait()
        return await self._served("prepare", request, self._prepare)

    async def commit(self, request: CommitRequest) -> CommitReply:
        return await self._served("apply" if request.decided else "commit", request, self._commit)

    async def discard(self, request: DiscardRequest) -> DiscardReply:
        return await self._served("discard", request, self._discard)

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply:
        self.calls.append(("heartbeat", request))
        return HeartbeatReply(lease_s=self.lease_s, updates_held=len(self.held))

    async def status(self) -> ShardStatus:
        tables = (
            TableStatus(
                table_id=table_id,
                name=f"table-{table_id}",
                epoch=self.pool.epoch,
                version=len(self.applied[table_id]),
                pages=0 if table_id in self.lost else 1,
                lost_pages=int(table_id in self.lost),
                num_bytes=0,
                updates_held=0,
                updates_applied=0,
                lookups=0,
                frozen=table_id in self.frozen,
            )
            for table_id in self.pool.owners
        )
        return ShardStatus(info=self.info, state="ready", tables=tuple(tables))

    def names(self) -> list[str]:
        return [name for name, _ in self.calls if name != "heartbeat"]

    def requests(self, name: str) -> list[Any]:
        return [request for called, request in self.calls if called == name]

    def forget(self) -> None:
        self.held.clear()
        self.prepared.clear()

    async def _served(self, name: str, request: Any, serve: Callable[[Any], Any]) -> Any:
        self.calls.append((name, request))
        await self._happen(self.before[name], request)
        reply = serve(request)
        await self._happen(self.after[name], request)
        return reply

    async def _happen(self, hooks: list[Hook | MempoolError | None], request: Any) -> None:
        hook = hooks.pop(0) if hooks else None
        if isinstance(hook, MempoolError):
            raise hook
        if hook is not None:
            await hook(request)

    def _update(self, request: UpdateRequest) -> UpdateReply:
        self._fence(request.envelope)
        if request.hold:
            if request.step_id.step <= self.over.get(request.envelope.table_id, 0):
                raise StepConflict(f"step {request.step_id.step} was dropped", shard=self.info.shard)
            self.held.add((request.envelope.table_id, request.step_id.step, request.sequence))
        grad = torch.zeros(2) if request.want_weight_grad else None
        return UpdateReply(stamp=self._stamp(request.envelope.table_id), weight_grad=grad)

    def _prepare(self, request: PrepareRequest) -> PrepareReply:
        answers = []
        for part in request.parts:
            self._fence(part.envelope)
            table_id, step = part.envelope.table_id, part.step_id.step
            if step <= self.over.get(table_id, 0):
                raise StepConflict(f"step {step} was dropped", shard=self.info.shard)
            answers.append(
                PreparedPart(
                    stamp=self._stamp(table_id),
                    missing=self._missing(part),
                    squared_norm=float(len(part.sequences)) if request.want_norm else 0.0,
                    applied=self._has(table_id, step),
                    held_off=table_id in self.frozen,
                )
            )
        if not any(answer.missing or answer.held_off for answer in answers):
            for part in request.parts:
                decider = request.decider_table, request.decider_step
                self.prepared[part.envelope.table_id] = part.step_id.step, decider
        return PrepareReply(parts=tuple(answers))

    def _commit(self, request: CommitRequest) -> CommitReply:
        if request.one_phase:
            missing = [self._missing(part) for part in request.parts]
            if any(missing):
                parts = zip(request.parts, missing, strict=True)
                return CommitReply(
                    parts=tuple(
                        CommittedPart(stamp=self._stamp(part.envelope.table_id), missing=each) for part, each in parts
                    )
                )
        elif not request.decided:
            for part in request.parts:
                self._fence(part.envelope)
            first = request.parts[0]
            table_id, step = first.envelope.table_id, first.step_id.step
            if not self._has(table_id, step) and self.prepared.get(table_id, (0, (0, 0)))[0] != step:
                self.over[table_id] = step
                raise StepConflict(f"step {step} is not prepared here", shard=self.info.shard)
        return CommitReply(parts=tuple(self._commit_part(part, request) for part in request.parts))

    def _commit_part(self, part: CommitPart, request: CommitRequest) -> CommittedPart:
        self._fence(part.envelope)
        table_id, step = part.envelope.table_id, part.step_id.step
        gate = self.pool.owners[table_id][0] == self.info.shard
        mine = self.applied[table_id]
        if not request.decided and not gate:
            return CommittedPart(stamp=self._stamp(table_id))
        if not self._has(table_id, step):
            if request.decided and self.prepared.get(table_id, (0, (0, 0)))[0] != step:
                raise StepConflict(f"step {step} is not prepared here", shard=self.info.shard)
            assert gate == (part.version == 0), "the gate gives the version, and others are told it"
            mine.append((step, part.sequences, part.lr, part.version or len(mine) + 1))
            self.held = {each for each in self.held if each[0] != table_id or each[1] > step}
            self.prepared.pop(table_id, None)
        version = next(done[3] for done in mine if done[0] == step)
        return CommittedPart(stamp=self._stamp(table_id), version=version)

    def _discard(self, request: DiscardRequest) -> DiscardReply:
        for part in request.parts:
            self._fence(part.envelope, whole=False)
            table_id, step = part.envelope.table_id, part.step_id.step
            if self.prepared.get(table_id, (0, (0, 0)))[0] == step:
                del self.prepared[table_id]
            if not request.keep_updates:
                self.held = {each for each in self.held if each[:2] != (table_id, step)}
        return DiscardReply(discarded=0)

    def _missing(self, part: PreparePart | CommitPart) -> tuple[int, ...]:
        table_id, step = part.envelope.table_id, part.step_id.step
        if self._has(table_id, step):
            return ()
        return tuple(each for each in part.sequences if (table_id, step, each) not in self.held)

    def _has(self, table_id: int, step: int) -> bool:
        return any(done[0] == step for done in self.applied[table_id])

    def _fence(self, envelope: Envelope, *, whole: bool = True) -> None:
        if envelope.table_id not in self.pool.owners:
            raise NotFound("no such table", shard=self.info.shard)
        if envelope.epoch != self.pool.epoch or envelope.incarnation != self.info.incarnation:
            raise StalePlacement("the plan is old", shard=self.info.shard)
        if whole and envelope.table_id in self.lost:
            raise DataLoss("lost pages", shard=self.info.shard)

    def _stamp(self, table_id: int) -> Stamp:
        version = len(self.applied[table_id])
        return Stamp(
            shard=self.info.shard, incarnation=self.info.incarnation, epoch=self.pool.epoch, table_version=version
        )


class ScriptedPool:
    """A controller and its shards.

    Args:
        owners: By table id, the owners of its three column blocks.
    """

    def __init__(self, owners: dict[int, tuple[int, int, int]], *, num_shards: int = 4) -> None:
        self.epoch = 1
        self.owners = {table_id: tuple(sorted(blocks)) for table_id, blocks in owners.items()}
        self.shards = [
            ScriptedShard(ShardInfo(shard=number, address=f"host-{number}:1", incarnation=1), self)
            for number in range(num_shards)
        ]

    def dial(self, info: ShardInfo) -> Any:
        return self.shards[info.shard]

    async def table(self, name: str) -> TableView:
        for view in await self.tables():
            if view.schema.name == name:
                return view
        raise NotFound(name)

    async def tables(self) -> tuple[TableView, ...]:
        return tuple(
            TableView(
                schema=replace(make_schema(), table_id=table_id, name=f"table-{table_id}"),
                placement=Placement(
                    table_id=table_id,
                    epoch=self.epoch,
                    owners=np.tile(np.array(blocks, dtype=np.int32), (8, 1)),
                    key_owners=np.zeros(0, dtype=np.int32),
                ),
                shards=tuple(shard.info for shard in self.shards),
            )
            for table_id, blocks in self.owners.items()
        )

    async def close(self) -> None:
        """Nothing to give back."""

    def move(self) -> None:
        """All tables have a new epoch; what was held and prepared is dropped."""
        self.epoch += 1
        for shard in self.shards:
            shard.forget()

    def names(self) -> list[list[str]]:
        return [shard.names() for shard in self.shards]

    def clear(self) -> None:
        for shard in self.shards:
            shard.calls.clear()


async def push(session: Session, *, want_weight_grad: bool = False) -> None:
    """One update, of a lookup that no shard remembers."""
    seen = Seen(epoch=0, oldest_version=0, newest_version=0)
    record = LookupRecord(
        table_id=session.table_id, lookup_id=1, lookups=1, bags=BAGS, seen=seen, remembered_by=frozenset()
    )
    await session.update(record, torch.ones(1, 12), hold=True, want_weight_grad=want_weight_grad)


class Client:
    """One process that trains tables of a pool."""

    def __init__(self, pool: ScriptedPool, *, timeout_s: float = 20.0) -> None:
        self.pool = pool
        self.router = Router(
            pool,  # type: ignore[arg-type]
            dial=pool.dial,
            pool="run-7",
            timeout_s=timeout_s,
            backoff=Backoff(first_s=0.001, longest_s=0.002),
        )
        self.coordinator = Coordinator(self.router)
        self.sessions = [
            Session(self.router, table_id=table_id, group="g", coordinator=self.coordinator) for table_id in pool.owners
        ]

    async def push(self, *sessions: Session, want_weight_grad: bool = False) -> None:
        """One update of each."""
        for session in sessions or self.sessions:
            await push(session, want_weight_grad=want_weight_grad)

    async def arrived(self) -> None:
        for session in self.sessions:
            await session.pushes.settled()

    def assert_agreed(self) -> None:
        """All owners of a table have applied the same steps, in one order, at the same versions."""
        for table_id, owners in self.pool.owners.items():
            first, *others = (
                [
                    (step, sequences, version)
                    for step, sequences, _, version in self.pool.shards[shard].applied[table_id]
                ]
                for shard in sorted(set(owners))
            )
            assert all(history == first for history in others)
            assert [version for *_, version in first] == list(range(1, len(first) + 1))
