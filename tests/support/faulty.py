"""Real engines behind faults on demand, and a controller of one table over them: what the client is tested against.

Legend: N slots, V value dim, D key dim, n half-keys.
"""

import asyncio
import itertools
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool import types
from mempool.errors import (
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    NotFound,
    PoolUnreachable,
    ShardUnavailable,
    StalePlacement,
)
from mempool.shard import Engine
from mempool.types import (
    AttachTable,
    Envelope,
    OptimizerSpec,
    Placement,
    PoolStatus,
    ProductKeySpec,
    PullPages,
    ReadRowsRequest,
    RescaleProgress,
    ShardHost,
    ShardInfo,
    ShardStatus,
    TableSchema,
    TableStatus,
    TableView,
    WriteRowsRequest,
)
from mempool.wire.channels.loop import run, start

_BOUND_S = 60.0
_tokens = itertools.count(1)

# [8 row pages, 3 blocks] on up to four shards.
COLUMNS = np.tile([0, 1, 2], (8, 1))
ROWS = np.tile(np.arange(8)[:, None] % 3, (1, 3))
GRID = np.array([[page % 2, page % 2, 2 + page % 2] for page in range(8)])
LAYOUTS = {"one": np.zeros((8, 3)), "columns": COLUMNS, "rows": ROWS, "grid": GRID}


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


def _served(name: str) -> Any:
    """A method whose calls may meet a fault."""

    async def call(self: "FaultyShard", request: Any) -> Any:
        return await self._served(name, request)

    return call


class FaultyShard:
    """A ``ShardHost`` that passes every call on to another, unless a fault says otherwise.

    Without faults it is what it stands before, which the contract suite shows. Pages survive its restarts; what was
    held or remembered does not. To forget is to be set a view of a higher epoch, and to restart is that and another
    incarnation: what callers see of epochs and incarnations is told from what the host knows.

    Attributes:
        info: Where it is, for callers.
        faults: Per method, what happens to its next calls, in order; calls after those are healthy.
        calls: (method, request) of every call that arrived here, in order.
    """

    def __init__(self, host: ShardHost, info: ShardInfo, *, view: Callable[[], TableView] | None = None) -> None:
        self.host = host
        self.info = info
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.calls: list[tuple[str, object]] = []
        self._view = view
        self._forgotten = 0
        self._restarts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)  # PageHost, and close

    gather = _served("gather")
    update = _served("update")
    prepare = _served("prepare")
    commit = _served("commit")
    discard = _served("discard")
    heartbeat = _served("heartbeat")
    score = _served("score")
    read_rows = _served("read_rows")
    write_rows = _served("write_rows")
    step_count = _served("step_count")
    usage = _served("usage")
    pin = _served("pin")

    def names(self) -> list[str]:
        """The methods called, in order."""
        return [name for name, _ in self.calls]

    def requests(self, name: str) -> list[Any]:
        return [request for called, request in self.calls if called == name]

    def forget(self) -> None:
        """Contexts, held updates and prepared steps are gone."""
        run(self.forget_now(), _BOUND_S)

    def restart(self) -> None:
        """It comes back as a new incarnation, with its pages."""
        run(self.restart_now(), _BOUND_S)

    async def forget_now(self) -> None:
        self._forgotten += 1
        await asyncio.shield(self.set_pool_view())  # a caller that is cut off does not undo it

    async def restart_now(self) -> None:
        await self.forget_now()
        self._restarts += 1
        self.info = replace(self.info, incarnation=self.info.incarnation + 1)

    async def set_pool_view(self) -> None:
        """Tell the host of the pool's view, as a new one."""
        assert self._view is not None, "only shards of a FaultyPool forget"
        view = self._view()
        placement = replace(view.placement, epoch=view.placement.epoch + self._forgotten)
        await self.host.set_view(replace(view, placement=placement))

    @property
    def table(self) -> TableStatus:
        """What the host says of the pool's table."""
        (table,) = run(self.host.status(), _BOUND_S).tables
        return table

    @property
    def context_bytes(self) -> int:
        """What it remembers of look-ups."""
        return run(self.host.status(), _BOUND_S).context_bytes

    @property
    def version(self) -> int:
        return self.table.version

    @property
    def held(self) -> int:
        """How many updates it holds."""
        return self.table.updates_held

    def ask(self, name: str, **request: Any) -> Any:
        """One call of the host itself, by its request's fields but the envelope; neither faulty nor recorded."""
        assert self._view is not None
        table_id, epoch = self.table.table_id, self._view().placement.epoch
        envelope = Envelope(table_id=table_id, epoch=epoch, incarnation=self.info.incarnation)
        kind = getattr(types, f"{name.title().replace('_', '')}Request")
        return run(getattr(self.host, name)(kind(envelope=self._inward(envelope), **request)), _BOUND_S)

    @property
    def prepared(self) -> bool:
        """Whether a step is prepared and not decided: a freeze would wait for it."""
        table_id = self.table.table_id
        for _ in range(100):
            try:
                run(self.host.freeze(table_id, 0.01, token=f"look {next(_tokens)}", lease_s=_BOUND_S), _BOUND_S)
            except DeadlineExceeded as late:
                if "is prepared and not decided" in str(late):
                    return True
                continue  # it was not looked at in time
            run(self.host.thaw(table_id), _BOUND_S)
            return False
        raise AssertionError("the shard has no time for a look")

    async def _served(self, name: str, request: Any) -> Any:
        fault = self.faults[name].pop(0) if self.faults[name] else None
        if fault is Fault.ERROR_BEFORE:
            raise ShardUnavailable("the connection was refused")
        self.calls.append((name, request))
        if fault is Fault.RESTART:
            await self.restart_now()
            raise ShardUnavailable("the connection broke")
        if fault is Fault.FORGET:
            await self.forget_now()
        if fault is Fault.STALE:
            raise StalePlacement("so says the fault")
        if fault is Fault.DATA_LOSS:
            raise DataLoss("pages of table 'facts' are gone; restore checkpoint 7")
        reply = await getattr(self.host, name)(self._request(request))
        if fault is Fault.ERROR_AFTER:
            raise ShardUnavailable("the connection broke")
        if fault is Fault.SILENT:
            await asyncio.Event().wait()
        if hasattr(reply, "parts"):
            return replace(reply, parts=tuple(self._stamped(part) for part in reply.parts))
        return self._stamped(reply) if hasattr(reply, "stamp") else reply

    def _request(self, request: Any) -> Any:
        """As the host is to see it."""
        if hasattr(request, "parts"):
            parts = tuple(replace(part, envelope=self._inward(part.envelope)) for part in request.parts)
            return replace(request, parts=parts)
        if hasattr(request, "envelope"):
            return replace(request, envelope=self._inward(request.envelope))
        return replace(request, incarnation=request.incarnation - self._restarts)

    def _stamped(self, reply: Any) -> Any:
        """As callers are to see it."""
        stamp = reply.stamp
        outward = replace(stamp, epoch=stamp.epoch - self._forgotten, incarnation=stamp.incarnation + self._restarts)
        return replace(reply, stamp=outward)

    def _inward(self, envelope: Envelope) -> Envelope:
        return replace(
            envelope, epoch=envelope.epoch + self._forgotten, incarnation=envelope.incarnation - self._restarts
        )


class FaultyPool:
    """A controller and its shards, of one table, placed as a test wants it.

    Args:
        owners: [row pages, blocks], shard ids.
        key_owners: [heads], shard ids.
        keys: Flat keys [N, D], or product keys [heads, 2, n, D / 2].

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
        self.placement = Placement(
            table_id=self.schema.table_id,
            epoch=1,
            owners=np.array(owners, dtype=np.int32),
            key_owners=np.array(key_owners, dtype=np.int32),
        )
        hosts: list[ShardHost] = []
        infos = [
            ShardInfo(shard=number, address=f"host-{number}:1", incarnation=1)
            for number in range(num_shards or max(self.placement.shards) + 1)
        ]
        hosts += [Engine(info, peers=lambda source: hosts[source.shard], pool="faulty") for info in infos]
        this = weakref.proxy(self)
        self.shards = [FaultyShard(host, info, view=lambda: this.view) for host, info in zip(hosts, infos, strict=True)]
        # Engines end with whoever holds them last: tests need not say so.
        self._end = weakref.finalize(self, lambda: start(_close_all(hosts)))
        run(self._attach(), _BOUND_S)
        if keys is not None:
            run(self._write_keys(keys), _BOUND_S)

    @property
    def view(self) -> TableView:
        return TableView(
            schema=self.schema, placement=self.placement, shards=tuple(shard.info for shard in self.shards)
        )

    @property
    def values(self) -> Tensor:
        """[N, V] float64, as the shards have them now."""
        return self.rows("values").double()

    @property
    def keys(self) -> Tensor:
        """As they were given."""
        keys = self.schema.keys
        rows = self.rows("keys")
        return rows.reshape(rows.shape[0], 2, -1, keys.key_dim // 2) if isinstance(keys, ProductKeySpec) else rows

    def rows(self, array: str) -> Tensor:
        """All rows of an array, put together by who owns what; shares no code with the client."""
        return run(self._rows(array), _BOUND_S)

    def dial(self, info: ShardInfo) -> ShardHost:
        return self.shards[info.shard]

    def move(self, owners: object) -> None:
        """Pages change their owners, live; what was held of the table is dropped everywhere."""
        run(self._move(np.array(owners, dtype=np.int32)), _BOUND_S)

    def drop(self) -> None:
        """Somebody else drops the table."""
        run(self.drop_table(self.schema.name), _BOUND_S)

    def drop_and_remake(self) -> None:
        """Somebody else drops the table and makes another of its name."""

        async def remake() -> None:
            await self.drop_table(self.schema.name)
            table_id = self.schema.table_id + 1
            self.schema = replace(self.schema, table_id=table_id)
            self.placement = replace(self.placement, table_id=table_id)
            self.dropped = False
            await self._attach()

        run(remake(), _BOUND_S)

    async def create_table(self, schema: TableSchema) -> TableView:
        self._answer()
        if schema.name == self.schema.name:
            raise AlreadyExists(f"there is a table {schema.name!r}")
        await asyncio.gather(*(shard.host.drop_table(self.schema.table_id) for shard in self.shards))
        self.schema = replace(schema, table_id=self.schema.table_id + 1)
        await self._attach()
        return self.view

    async def drop_table(self, name: str, *, table_id: int = 0) -> None:  # noqa: ARG002
        await self.table(name)
        await asyncio.gather(*(shard.host.drop_table(self.schema.table_id) for shard in self.shards))
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
        return PoolStatus(name="faulty", shards=shards, tables=(self.view,), rescaling=False)

    async def close(self) -> None:
        self.away = True

    def _answer(self) -> None:
        self.asked += 1
        if self.away:
            raise PoolUnreachable("the controller is away")

    async def _attach(self) -> None:
        owners = self.placement.shards
        for shard in self.shards:
            mode = "initialise" if shard.info.shard in owners else "empty"
            await shard.host.attach_table(AttachTable(view=self.view, mode=mode))  # type: ignore[arg-type]

    async def _move(self, owners: "np.ndarray[Any, np.dtype[np.int32]]") -> None:
        before = self.placement
        for source, dest in np.argwhere(np.ones((len(self.shards), len(self.shards)))):
            moved = (before.owners == source) & (owners == dest)
            for page in np.flatnonzero(moved.any(axis=1)) if source != dest else ():
                blocks = tuple(np.flatnonzero(moved[page]).tolist())
                await self.shards[dest].host.pull_pages(
                    PullPages(
                        table_id=self.schema.table_id,
                        source=self.shards[source].info,
                        row_pages=np.array([page]),
                        blocks=blocks,
                    )
                )
        self.placement = replace(before, owners=owners, epoch=before.epoch + 1)
        await asyncio.gather(*(shard.set_pool_view() for shard in self.shards))

    async def _rows(self, array: str) -> Tensor:
        whole: Tensor | None = None
        for shard, ids, blocks in self._owned(array):
            envelope = shard._inward(self._envelope(shard))
            reply = await shard.host.read_rows(ReadRowsRequest(envelope=envelope, array=array, ids=ids))
            columns = self._columns(array, reply.rows.shape[1], blocks)
            if whole is None:
                whole = torch.zeros(self._count(array), self._width(array, columns), dtype=reply.rows.dtype)
            whole[ids[:, None], columns] += reply.rows
        assert whole is not None
        return whole

    async def _write_keys(self, keys: Tensor) -> None:
        for shard, ids, _ in self._owned("keys"):
            blocks = () if isinstance(self.schema.keys, ProductKeySpec) else (0,)
            request = WriteRowsRequest(
                envelope=self._envelope(shard), array="keys", ids=ids, blocks=blocks, rows=keys[ids].flatten(1)
            )
            await shard.host.write_rows(request)

    def _envelope(self, shard: FaultyShard) -> Envelope:
        return Envelope(table_id=self.schema.table_id, epoch=self.placement.epoch, incarnation=shard.info.incarnation)

    def _count(self, array: str) -> int:
        product = array == "keys" and isinstance(self.schema.keys, ProductKeySpec)
        return self.schema.num_key_pages if product else self.schema.num_slots

    def _owned(self, array: str) -> list[tuple[FaultyShard, Tensor, tuple[int, ...]]]:
        """(shard, ids it is asked for, blocks of its reply) of those that own anything of an array."""
        found = []
        for shard in self.shards:
            number = shard.info.shard
            if array == "keys" and isinstance(self.schema.keys, ProductKeySpec):
                ids, blocks = np.flatnonzero(self.placement.key_owners == number), ()
            else:
                ids = np.arange(self.schema.num_slots)
                blocks = tuple(np.flatnonzero((self.placement.owners == number).any(axis=0)).tolist())
                if not blocks or (array == "keys" and 0 not in blocks):
                    continue
            if len(ids):
                found.append((shard, torch.tensor(ids), blocks))
        return found

    def _width(self, array: str, columns: Tensor) -> int:
        if array == "keys":
            return columns.shape[0]
        return self.schema.num_blocks if _per_block(array) else self.schema.value_dim

    def _columns(self, array: str, width: int, blocks: tuple[int, ...]) -> Tensor:
        """Where the columns of a shard's rows stand in the whole row: per block, or per element of the blocks."""
        if array == "keys":
            return torch.arange(width)
        if _per_block(array):
            return torch.tensor(blocks)
        return torch.cat([torch.arange(*self.schema.block_columns(block)) for block in blocks])


def _per_block(array: str) -> bool:
    return array.rpartition(".")[2] in ("row_sum", "row_exp_avg_sq", "last_step", "scales")


async def _close_all(hosts: list[ShardHost]) -> None:
    await asyncio.gather(*(host.close() for host in hosts))
