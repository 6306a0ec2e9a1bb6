"""Shards and a controller in memory, float64, plain SGD, with faults on demand: what the client is tested against.

A shard here follows decisions of the real one that the client relies on: envelopes are fenced, contexts and held
updates can vanish, a step is applied once. Pages survive a restart; what was held or remembered does not.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import replace
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor

from mempool.errors import (
    AlreadyExists,
    ContextMissing,
    DataLoss,
    InvalidRequest,
    NotFound,
    PoolUnreachable,
    ShardUnavailable,
    StalePlacement,
    StepConflict,
)
from mempool.types import (
    CommitReply,
    CommitRequest,
    DiscardReply,
    DiscardRequest,
    Envelope,
    FlatKeySpec,
    GatherReply,
    GatherRequest,
    OptimizerSpec,
    Placement,
    PoolStatus,
    PrepareReply,
    PrepareRequest,
    ReadRowsReply,
    ReadRowsRequest,
    RescaleProgress,
    ScoreReply,
    ScoreRequest,
    ShardInfo,
    ShardStatus,
    Stamp,
    StepCountReply,
    StepCountRequest,
    StepId,
    TableSchema,
    TableView,
    UpdateReply,
    UpdateRequest,
    WriteRowsReply,
    WriteRowsRequest,
)


class Fault(Enum):
    """What happens to one call of one method."""

    ERROR_BEFORE = auto()  # the request never arrives
    ERROR_AFTER = auto()  # it takes effect, the reply is lost
    SILENT = auto()  # it takes effect, and no answer ever comes
    STALE = auto()  # the shard says that the plan is old, though it is not
    FORGET = auto()  # contexts and held updates are gone before the call
    RESTART = auto()  # the shard restarts under the call: a new incarnation, contexts and held updates gone
    DATA_LOSS = auto()


HEALING = (Fault.ERROR_BEFORE, Fault.ERROR_AFTER, Fault.STALE, Fault.FORGET, Fault.RESTART)


def make_schema(
    *, num_slots: int = 64, value_dim: int = 12, block_dim: int = 4, page_slots: int = 8, **changes: object
) -> TableSchema:
    """A small table."""
    schema = TableSchema(
        table_id=1,
        name="facts",
        num_slots=num_slots,
        value_dim=value_dim,
        block_dim=block_dim,
        page_slots=page_slots,
        dtype="float32",
        seed=0,
        init_std=1.0,
        stride=0,
        layout="auto",
        optimizer=OptimizerSpec(algorithm="sgd", lr=0.5),
    )
    return replace(schema, **changes)  # type: ignore[arg-type]


def initial_values(schema: TableSchema) -> Tensor:
    """[num_slots, value_dim] float32."""
    generator = torch.Generator().manual_seed(schema.seed)
    return torch.randn(schema.num_slots, schema.value_dim, generator=generator)


class FakePool:
    """A controller and its shards, of one table.

    Args:
        owners: [row pages, blocks], shard ids.
        key_owners: [heads], shard ids.
        keys: Flat keys [num_slots, D], or product keys [heads, 2, n, D / 2].

    Attributes:
        asked: How often the view was asked for.
        away: The controller does not answer.
    """

    def __init__(
        self,
        owners: object,
        *,
        schema: TableSchema | None = None,
        key_owners: object = (),
        keys: Tensor | None = None,
        num_shards: int | None = None,
    ) -> None:
        self.schema = schema or make_schema()
        self.asked = 0
        self.away = False
        self.dropped = False
        self.keys = keys
        self.values = initial_values(self.schema).double()
        self.placement = Placement(
            table_id=self.schema.table_id,
            epoch=1,
            owners=np.array(owners, dtype=np.int32),
            key_owners=np.array(key_owners, dtype=np.int32),
        )
        count = num_shards or max(self.placement.shards) + 1
        self.shards = [FakeShard(self, number) for number in range(count)]

    @property
    def view(self) -> TableView:
        return TableView(
            schema=self.schema, placement=self.placement, shards=tuple(shard.info for shard in self.shards)
        )

    def dial(self, info: ShardInfo) -> "FakeShard":
        return self.shards[info.shard]

    def move(self, owners: object) -> None:
        """Pages change their owners, live; what was held of the table is dropped everywhere."""
        self.placement = replace(
            self.placement, owners=np.array(owners, dtype=np.int32), epoch=self.placement.epoch + 1
        )
        ledger = max((shard.ledger for shard in self.shards), key=lambda entries: sum(entries.values()), default={})
        for shard in self.shards:
            shard.forget()
            shard.ledger = dict(ledger)

    def table_now(self) -> Tensor:
        """The values the shards' pages have, [num_slots, value_dim] float64."""
        return self.values

    async def create_table(self, schema: TableSchema) -> TableView:
        self._answer()
        if schema.name == self.schema.name:
            raise AlreadyExists(f"there is a table {schema.name!r}")
        self.schema = replace(schema, table_id=self.schema.table_id)
        return self.view

    async def drop_table(self, name: str) -> None:
        await self.table(name)
        self.dropped = True

    async def table(self, name: str) -> TableView:
        self._answer()
        if self.dropped or name != self.schema.name:
            raise NotFound(f"no table {name!r}")
        return self.view

    async def tables(self) -> tuple[TableView, ...]:
        self._answer()
        return () if self.dropped else (self.view,)

    async def rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        report = RescaleProgress(
            shards_before=len(self.shards),
            shards_after=shards,
            pages_moved=0,
            pages_total=7,
            bytes_moved=0,
            bytes_total=70,
            table="facts",
            done=False,
        )
        yield report
        await asyncio.sleep(0)
        yield replace(report, pages_moved=7, bytes_moved=70, table="", done=True)

    async def status(self) -> PoolStatus:
        self._answer()
        shards = tuple(ShardStatus(info=shard.info, state="ready") for shard in self.shards)
        return PoolStatus(name="fake", shards=shards, tables=(self.view,), rescaling=False)

    async def close(self) -> None:
        self.away = True

    def _answer(self) -> None:
        self.asked += 1
        if self.away:
            raise PoolUnreachable("the controller is away")


class FakeShard:
    """One shard of a FakePool; a ``Shard``.

    Attributes:
        faults: Per method, what happens to its next calls, in order; calls after those are healthy.
        calls: (method, request) of every call that arrived here, in order.
    """

    def __init__(self, pool: FakePool, number: int) -> None:
        self.pool = pool
        self.info = ShardInfo(shard=number, address=f"host-{number}:1", incarnation=1)
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.calls: list[tuple[str, object]] = []
        self.contexts: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}
        self.held: dict[tuple[str, int, int], UpdateRequest] = {}
        self.prepared: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.ledger: dict[str, int] = {}
        self.version = 0
        self.step_offset = 0

    def forget(self) -> None:
        self.contexts.clear()
        self.held.clear()
        self.prepared.clear()

    def restart(self) -> None:
        self.forget()
        self.info = replace(self.info, incarnation=self.info.incarnation + 1)

    def names(self) -> list[str]:
        """The methods called, in order."""
        return [name for name, _ in self.calls]

    def requests(self, name: str) -> list[object]:
        return [request for called, request in self.calls if called == name]

    @property
    def blocks(self) -> tuple[int, ...]:
        owned = (self.pool.placement.owners == self.info.shard).any(axis=0)
        return tuple(int(block) for block in np.flatnonzero(owned))

    async def gather(self, request: GatherRequest) -> GatherReply:
        return await self._served("gather", request, lambda: self._gather(request))

    async def update(self, request: UpdateRequest) -> UpdateReply:
        return await self._served("update", request, lambda: self._update(request))

    async def prepare(self, request: PrepareRequest) -> PrepareReply:
        return await self._served("prepare", request, lambda: self._prepare(request))

    async def commit(self, request: CommitRequest) -> CommitReply:
        return await self._served("commit", request, lambda: self._commit(request))

    async def discard(self, request: DiscardRequest) -> DiscardReply:
        return await self._served("discard", request, lambda: self._discard(request))

    async def score(self, request: ScoreRequest) -> ScoreReply:
        return await self._served("score", request, lambda: self._score(request))

    async def read_rows(self, request: ReadRowsRequest) -> ReadRowsReply:
        return await self._served("read_rows", request, lambda: self._read_rows(request))

    async def write_rows(self, request: WriteRowsRequest) -> WriteRowsReply:
        return await self._served("write_rows", request, lambda: self._write_rows(request))

    async def step_count(self, request: StepCountRequest) -> StepCountReply:
        return await self._served("step_count", request, lambda: self._step_count(request))

    async def _served(self, name, request, answer):  # type: ignore[no-untyped-def]
        fault = self.faults[name].pop(0) if self.faults[name] else None
        await asyncio.sleep(0)
        if fault is Fault.ERROR_BEFORE:
            raise ShardUnavailable("the connection was refused")
        self.calls.append((name, request))
        if fault is Fault.RESTART:
            self.restart()
            raise ShardUnavailable("the connection broke")
        if fault is Fault.FORGET:
            self.forget()
        if fault is Fault.STALE:
            raise StalePlacement("so says the fault")
        if fault is Fault.DATA_LOSS:
            raise DataLoss("pages of table 'facts' are gone; restore checkpoint 7")
        self._fence(request.envelope)
        reply = answer()
        if fault is Fault.ERROR_AFTER:
            raise ShardUnavailable("the connection broke")
        if fault is Fault.SILENT:
            await asyncio.Event().wait()
        return reply

    def _fence(self, envelope: Envelope) -> None:
        if self.pool.dropped or envelope.table_id != self.pool.schema.table_id:
            raise NotFound("no such table here")
        if envelope.epoch != self.pool.placement.epoch or envelope.incarnation != self.info.incarnation:
            raise StalePlacement(f"planned for {envelope}, this is {self.info}")

    def _stamp(self) -> Stamp:
        return Stamp(
            shard=self.info.shard,
            incarnation=self.info.incarnation,
            epoch=self.pool.placement.epoch,
            table_version=self.version,
        )

    def _mask(self) -> Tensor:
        """[num_slots, value_dim] float64: 1 where this shard owns the element."""
        schema = self.pool.schema
        pages = torch.tensor(self.pool.placement.owners == self.info.shard).double()
        rows = pages.repeat_interleave(schema.page_slots, dim=0)[: schema.num_slots]
        return rows.repeat_interleave(schema.block_dim, dim=1)[:, : schema.value_dim]

    def _columns(self) -> list[int]:
        return [column for block in self.blocks for column in range(*self.pool.schema.block_columns(block))]

    def _gather(self, request: GatherRequest) -> GatherReply:
        for lookup_id in request.release:
            self.contexts.pop(lookup_id, None)
        bags = _bags(request.ids, request.weights, request.offsets)
        if request.remember:
            self.contexts[request.lookup_id] = bags
        values = _spread(*bags).t() @ (self.pool.values * self._mask())[request.ids]
        dtype = torch.bfloat16 if request.reply_dtype == "bfloat16" else torch.float32
        return GatherReply(stamp=self._stamp(), blocks=self.blocks, values=values[:, self._columns()].to(dtype))

    def _update(self, request: UpdateRequest) -> UpdateReply:
        if request.ids is not None:
            assert request.offsets is not None
            bags = _bags(request.ids, request.weights, request.offsets)
        elif request.lookup_id in self.contexts:
            bags = self.contexts[request.lookup_id]
        else:
            raise ContextMissing("forgotten")
        ids, _, offsets = bags
        if request.blocks != self.blocks or request.grads.shape != (len(offsets) - 1, len(self._columns())):
            raise InvalidRequest(f"blocks {request.blocks}, grads {list(request.grads.shape)}")
        if request.hold and request.step_id.step > self.ledger.get(request.step_id.group, 0):
            key = (request.step_id.group, request.step_id.step, request.sequence)
            self.held.setdefault(key, replace(request, ids=ids, weights=bags[1], offsets=offsets))
        weight_grad = None
        if request.want_weight_grad:
            rows = (self.pool.values * self._mask())[ids][:, self._columns()]
            bag = torch.repeat_interleave(offsets.diff())
            weight_grad = (rows * request.grads.double()[bag]).sum(dim=1).float()
        return UpdateReply(stamp=self._stamp(), weight_grad=weight_grad)

    def _missing(self, step_id: StepId, sequences: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(seq for seq in sequences if (step_id.group, step_id.step, seq) not in self.held)

    def _gradient(self, step_id: StepId, sequences: tuple[int, ...]) -> Tensor:
        """[num_slots, value_dim] float64, zero where this shard owns nothing."""
        total = torch.zeros_like(self.pool.values)
        for sequence in sorted(sequences):
            held = self.held[step_id.group, step_id.step, sequence]
            assert held.ids is not None
            assert held.offsets is not None
            grads = _spread(held.ids, held.weights, held.offsets) @ held.grads.double()
            wide = torch.zeros(len(held.ids), total.shape[1], dtype=torch.float64)
            wide[:, self._columns()] = grads
            total.index_add_(0, held.ids, wide)
        return total * self._mask()

    def _prepare(self, request: PrepareRequest) -> PrepareReply:
        step_id = request.step_id
        if self.ledger.get(step_id.group, 0) >= step_id.step:
            return PrepareReply(stamp=self._stamp(), missing=(), squared_norm=0.0, finite=True, applied=True)
        other = self.prepared.get(step_id.group)
        if other is not None and other[0] != step_id.step:
            raise StepConflict(f"step {other[0]} is prepared and not decided")
        missing = self._missing(step_id, request.sequences)
        if missing:
            return PrepareReply(stamp=self._stamp(), missing=missing, squared_norm=0.0, finite=True, applied=False)
        self.prepared[step_id.group] = (step_id.step, request.sequences)
        gradient = self._gradient(step_id, request.sequences)
        return PrepareReply(
            stamp=self._stamp(),
            missing=(),
            squared_norm=float(gradient.square().sum()) if request.want_norm else 0.0,
            finite=bool(gradient.isfinite().all()),
            applied=False,
        )

    def _commit(self, request: CommitRequest) -> CommitReply:
        step_id = request.step_id
        if self.ledger.get(step_id.group, 0) >= step_id.step:
            return CommitReply(stamp=self._stamp(), missing=(), applied=True)
        if request.one_phase:
            missing = self._missing(step_id, request.sequences)
            if missing:
                return CommitReply(stamp=self._stamp(), missing=missing, applied=False)
        elif self.prepared.get(step_id.group) != (step_id.step, request.sequences):
            raise StepConflict(f"step {step_id.step} is not prepared here")
        self.pool.values = self.pool.values - request.lr * request.grad_scale * self._gradient(
            step_id, request.sequences
        )
        self.ledger[step_id.group] = step_id.step
        self.version += 1
        self.prepared.pop(step_id.group, None)
        self._drop(step_id.group, upto=step_id.step)
        return CommitReply(stamp=self._stamp(), missing=(), applied=True)

    def _discard(self, request: DiscardRequest) -> DiscardReply:
        group, step = request.step_id.group, request.step_id.step
        if self.prepared.get(group, (0,))[0] == step:
            del self.prepared[group]
        keys = [key for key in self.held if key[:2] == (group, step)]
        for key in keys:
            del self.held[key]
        return DiscardReply(stamp=self._stamp(), discarded=len(keys))

    def _drop(self, group: str, *, upto: int) -> None:
        for key in [key for key in self.held if key[0] == group and key[1] <= upto]:
            del self.held[key]

    def _score(self, request: ScoreRequest) -> ScoreReply:
        schema, keys = self.pool.schema, self.pool.keys
        assert keys is not None
        if isinstance(schema.keys, FlatKeySpec):
            heads: tuple[int, ...] = (0,)
            owned = torch.tensor(self.pool.placement.owners[:, 0] == self.info.shard)
            mine = owned.repeat_interleave(schema.page_slots)[: schema.num_slots]
            scores = torch.where(mine, request.queries @ keys.t(), -torch.inf)
            ids = torch.where(mine, torch.arange(schema.num_slots), -1).expand_as(scores)
        else:
            heads = tuple(int(head) for head in np.flatnonzero(self.pool.placement.key_owners == self.info.shard))
            half = keys.shape[-1]
            first = torch.einsum("bhd,hnd->bhn", request.queries[:, heads, :half], keys[list(heads), 0])
            second = torch.einsum("bhd,hnd->bhn", request.queries[:, heads, half:], keys[list(heads), 1])
            scores = (first[..., :, None] + second[..., None, :]).flatten(2)
            ids = torch.arange(schema.num_slots).expand_as(scores)
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., : request.topk]
        return ScoreReply(stamp=self._stamp(), heads=heads, scores=scores.gather(-1, order), ids=ids.gather(-1, order))

    def _read_rows(self, request: ReadRowsRequest) -> ReadRowsReply:
        if request.array == "values":
            rows = (self.pool.values * self._mask()).float()[request.ids][:, self._columns()]
            return ReadRowsReply(stamp=self._stamp(), blocks=self.blocks, rows=rows)
        if request.array == "per_block":
            owned = torch.tensor(self.pool.placement.owners == self.info.shard)[request.ids // 8][:, list(self.blocks)]
            rows = torch.where(owned, request.ids[:, None] * 10.0 + torch.tensor(self.blocks), 0.0)
            return ReadRowsReply(stamp=self._stamp(), blocks=self.blocks, rows=rows)
        if request.array == "keys" and self.pool.keys is not None:
            rows = self.pool.keys[request.ids].flatten(1)
            blocks = (0,) if isinstance(self.pool.schema.keys, FlatKeySpec) else ()
            return ReadRowsReply(stamp=self._stamp(), blocks=blocks, rows=rows)
        raise InvalidRequest(f"no array {request.array!r}")

    def _write_rows(self, request: WriteRowsRequest) -> WriteRowsReply:
        if request.array == "keys":
            assert self.pool.keys is not None
            self.pool.keys[request.ids] = request.rows.reshape(-1, *self.pool.keys.shape[1:])
            return WriteRowsReply(stamp=self._stamp())
        if request.blocks != self.blocks:
            raise InvalidRequest(f"blocks {request.blocks}")
        wide = torch.zeros(len(request.ids), self.pool.values.shape[1], dtype=torch.float64)
        wide[:, self._columns()] = request.rows.double()
        mask = self._mask()[request.ids]
        self.pool.values[request.ids] = torch.where(mask > 0, wide, self.pool.values[request.ids])
        return WriteRowsReply(stamp=self._stamp())

    def _step_count(self, request: StepCountRequest) -> StepCountReply:
        if request.set is not None:
            assert request.at_version == self.version
            self.step_offset = request.set - request.at_version
        return StepCountReply(stamp=self._stamp(), count=self.version + self.step_offset)


def _bags(ids: Tensor, weights: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    assert ids.dtype == torch.int64
    assert offsets.dtype == torch.int64
    return ids.clone(), None if weights is None else weights.clone(), offsets.clone()


def _spread(ids: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """[L, B] float64: pair l's weight at its bag."""
    matrix = torch.zeros(len(ids), len(offsets) - 1, dtype=torch.float64)
    bag = torch.repeat_interleave(offsets.diff())
    matrix[torch.arange(len(ids)), bag] = 1.0 if weights is None else weights.double()
    return matrix
