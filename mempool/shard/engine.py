"""The engine: one shard's whole work, behind the ``ShardHost`` protocol.

Requests become jobs of one thread, in the order they come. The life of one: it is admitted on the caller's event loop,
waits in the queue, is fenced (incarnation, table, epoch) and checked (``validate``), and answered; nothing is changed
before all checks are passed. Waiting (for a freeze to end, for a peer's pages) happens on the event loop, never here.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from mempool.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    MempoolError,
    NotFound,
    ShardUnavailable,
    StalePlacement,
)
from mempool.observe import Stages
from mempool.shard import validate
from mempool.shard.hosted import HostedTable, Parked
from mempool.shard.pages.transfer import export, ledger_part, pull
from mempool.shard.steps import commits
from mempool.shard.steps.contexts import Contexts
from mempool.shard.steps.held import Budget, HeldUpdate
from mempool.shard.thread import EngineThread
from mempool.types import (
    AttachTable,
    CommitReply,
    CommitRequest,
    DiscardReply,
    DiscardRequest,
    Envelope,
    ExportLedger,
    ExportPages,
    GatherReply,
    GatherRequest,
    LedgerPart,
    PageBatch,
    PrepareReply,
    PrepareRequest,
    PullPages,
    PullReport,
    ReadRowsReply,
    ReadRowsRequest,
    ScoreReply,
    ScoreRequest,
    ShardHost,
    ShardInfo,
    ShardStatus,
    TableView,
    UpdateReply,
    UpdateRequest,
    WriteRowsReply,
    WriteRowsRequest,
)

T = TypeVar("T")

GIB = 2**30
MIB = 2**20


class Engine:
    """One shard.

    Args:
        info: Which shard this is, and which start of it.
        device: Where its pages lie, "cpu" or "cuda...". Requests and replies are on the CPU.
        peers: Reaches another shard, to pull pages from it. What it returns stays its own: the engine never closes it.
            None where pages are never pulled.
        pool: Name of the pool, for messages.
        context_budget_bytes: Bytes of lookup contexts kept; the oldest are forgotten first.
        context_lease_s: Seconds after which a context is forgotten.
        held_budget_bytes: Bytes of updates held; one more is refused with RequestTooLarge.
        memory_bytes: Bytes of pages, of all tables together; a new table, or pages of a move, that would exceed them
            are refused with InvalidRequest. Pages at rest are counted: while an arena grows it has two copies for a
            moment. None: whatever the device has.
        commit_memory_bytes: Temporary bytes of preparing and committing steps, of all tables together: a step that
            would need more is summed and applied in parts. The sums of one row and the gradient of one pair, some
            hundred bytes and the width of a row in float32, are needed in any case.
        held_lease_s: Seconds of silence after which a rank's held updates may be dropped where they stand in the way.
    """

    def __init__(
        self,
        info: ShardInfo,
        *,
        device: str = "cpu",
        peers: Callable[[ShardInfo], ShardHost] | None = None,
        pool: str = "local",
        context_budget_bytes: int = 1 * GIB,
        context_lease_s: float = 600.0,
        held_budget_bytes: int = 4 * GIB,
        held_lease_s: float = 600.0,
        memory_bytes: int | None = None,
        commit_memory_bytes: int = 256 * MIB,
    ) -> None:
        self.info = info
        self._device = torch.device(device)
        self._peers = peers
        self._held_lease_s = held_lease_s
        self._memory_bytes = memory_bytes
        self._budget = Budget(held_budget_bytes, commit_bytes=commit_memory_bytes)
        self._contexts = Contexts(budget_bytes=context_budget_bytes, lease_s=context_lease_s)
        self._tables: dict[int, HostedTable] = {}
        self._started_s = time.monotonic()
        self._stages = Stages()
        self._thread = EngineThread(name=f"shard {info.shard} of pool {pool!r}", stages=self._stages)

    # Shard

    async def gather(self, request: GatherRequest) -> GatherReply:
        return await self._thread.run("gather", lambda: self._gather(request))

    async def update(self, request: UpdateRequest) -> UpdateReply:
        return await self._thread.run("update", lambda: self._update(request))

    async def prepare(self, request: PrepareRequest) -> PrepareReply:
        return await self._when_woken("prepare", lambda: self._prepare(request))

    async def commit(self, request: CommitRequest) -> CommitReply:
        return await self._when_woken("commit", lambda: self._commit(request))

    async def discard(self, request: DiscardRequest) -> DiscardReply:
        return await self._thread.run("discard", lambda: self._discard(request))

    async def score(self, request: ScoreRequest) -> ScoreReply:
        return await self._thread.run("score", lambda: self._score(request))

    async def read_rows(self, request: ReadRowsRequest) -> ReadRowsReply:
        return await self._thread.run("read_rows", lambda: self._read_rows(request))

    async def write_rows(self, request: WriteRowsRequest) -> WriteRowsReply:
        return await self._when_woken("write_rows", lambda: self._write_rows(request))

    # PageHost

    async def attach_table(self, request: AttachTable) -> None:
        """Make a table known; large ones are filled piece by piece, so that other tables answer meanwhile.

        Raises:
            InvalidRequest: The table is here already, with pages, at another epoch; or its pages do not fit.
        """
        table = await self._thread.run("attach_table", lambda: self._attach(request))
        while not await self._thread.run("fill", lambda: self._fill(table)):
            pass

    async def drop_table(self, table_id: int) -> None:
        await self._thread.run("drop_table", lambda: self._drop(table_id))

    async def freeze(self, table_id: int, timeout_s: float) -> int:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._when_woken("freeze", lambda: self._freeze(table_id))
        except TimeoutError as error:
            if isinstance(error, MempoolError):
                raise
            return await self._thread.run("freeze", lambda: self._give_up_freeze(table_id, timeout_s))

    async def thaw(self, table_id: int) -> None:
        await self._thread.run("thaw", lambda: self._thaw(table_id))

    async def export_pages(self, request: ExportPages) -> PageBatch:
        return await self._thread.run("export_pages", lambda: self._export(request))

    async def export_ledger(self, request: ExportLedger) -> LedgerPart:
        return await self._thread.run("export_ledger", lambda: self._export_ledger(request))

    async def pull_pages(self, request: PullPages) -> PullReport:
        """Read pages from their owner in batches and stage each between other requests.

        Raises:
            InvalidRequest: The pages do not exist, are here already, or do not fit.
            Internal: There is no way to reach another shard, or what came is not what the schema says.
            MempoolError: What the owner raised.
        """
        if self._peers is None:
            raise Internal(f"shard {self.info.shard} was made without peers, to pull pages from", shard=self.info.shard)
        table = await self._thread.run("pull_pages", lambda: self._check_pull(request))
        return await pull(
            request,
            source=self._peers(request.source),
            page_bytes=table.storage.page_bytes(request.blocks),
            stage=lambda batch: self._thread.run("stage", lambda: self._stage(table, batch)),
            lacks_ledger=lambda: self._thread.run(
                "stage", lambda: self._pulling(table).staging.lacks_ledger(table.ledger.version)
            ),
            stage_ledger=lambda ledger: self._thread.run(
                "stage", lambda: self._pulling(table).staging.put_ledger(ledger)
            ),
        )

    async def set_view(self, view: TableView) -> None:
        await self._thread.run("set_view", lambda: self._set_view(view))

    async def views(self) -> tuple[TableView, ...]:
        return await self._thread.run("views", lambda: tuple(table.view for table in self._tables.values()))

    async def status(self) -> ShardStatus:
        return await self._thread.run("status", self._status)

    async def close(self) -> None:
        """Answer what is waiting, then end the thread and free all memory. Repeatable."""
        with suppress(ShardUnavailable):  # closed before
            await self._thread.run("close", self._drop_all)
        await self._thread.close()

    # Jobs: all below runs on the engine's thread, but for the loop.

    async def _when_woken(self, stage: str, job: Callable[[], T | Parked]) -> T:
        """Run a job again and again until it answers: everything may have changed while it waited."""
        while isinstance(answer := await self._thread.run(stage, job), Parked):
            await asyncio.wrap_future(answer.woken)
        return answer

    def _table(self, table_id: int) -> HostedTable:
        table = self._tables.get(table_id)
        if table is None:
            raise NotFound(
                f"shard {self.info.shard} has no table {table_id}; it was dropped, or is not attached yet",
                shard=self.info.shard,
                address=self.info.address,
            )
        return table

    def _fenced(self, envelope: Envelope) -> HostedTable:
        if envelope.incarnation != self.info.incarnation:
            raise StalePlacement(
                f"the request was planned for incarnation {envelope.incarnation} of shard {self.info.shard}, which is "
                f"now at {self.info.incarnation}",
                shard=self.info.shard,
                address=self.info.address,
            )
        table = self._table(envelope.table_id)
        table.check(envelope)
        return table

    def _gather(self, request: GatherRequest) -> GatherReply:
        table = self._fenced(request.envelope)
        with self._stages.measure("copy in"):
            bags = validate.check_bags(
                table.storage, request.ids, request.weights, request.offsets, own=request.remember
            )
        dtype = torch.bfloat16 if request.reply_dtype == "bfloat16" else torch.float32
        with self._stages.measure("kernel"):
            values = table.storage.pooled(bags, dtype)
        self._contexts.release(request.release)
        if request.remember:
            self._contexts.remember(request.lookup_id, table_id=table.table_id, epoch=table.epoch, bags=bags)
        table.lookups += 1
        return GatherReply(stamp=table.stamp, blocks=table.storage.blocks, values=self._copy_out(values))

    def _update(self, request: UpdateRequest) -> UpdateReply:
        table = self._fenced(request.envelope)
        held = table.updates.get(request.step_id, request.sequence) if request.hold else None
        if held is not None:
            # A repeat is answered from what is held, whatever it brings: its context may be gone by now.
            update = held
        else:
            remembered = self._contexts.recall(request.lookup_id, table_id=table.table_id, epoch=table.epoch)
            with self._stages.measure("copy in"):
                update = HeldUpdate(*validate.check_update(table.storage, request, remembered))
        weight_grad: Tensor | None = None
        if request.want_weight_grad:
            with self._stages.measure("kernel"):
                weight_grad = self._copy_out(table.storage.weight_grad(update.bags, update.grads))
        if request.hold and held is None and not table.ledger.has(request.step_id):
            table.updates.hold(request.step_id, request.sequence, update)
            self._wake_freezes()
        return UpdateReply(stamp=table.stamp, weight_grad=weight_grad)

    def _prepare(self, request: PrepareRequest) -> PrepareReply | Parked:
        table = self._fenced(request.envelope)
        validate.check_step(request.step_id, request.sequences)
        if table.ledger.has(request.step_id):
            return PrepareReply(stamp=table.stamp, missing=(), squared_norm=0.0, finite=True, applied=True)
        if table.holds_off(request.step_id):
            return table.park_until_thaw()
        missing = commits.missing(table.updates, request.step_id, request.sequences)
        if missing:
            return PrepareReply(stamp=table.stamp, missing=missing, squared_norm=0.0, finite=True, applied=False)
        with self._stages.measure("kernel"):
            step = commits.prepare(table.storage, table.updates, request)
        return PrepareReply(
            stamp=table.stamp, missing=(), squared_norm=step.squared_norm, finite=step.finite, applied=False
        )

    def _commit(self, request: CommitRequest) -> CommitReply | Parked:
        table = self._fenced(request.envelope)
        validate.check_commit(request)
        if table.ledger.has(request.step_id):
            return CommitReply(stamp=table.stamp, missing=(), applied=True)
        if request.one_phase:
            if table.holds_off(request.step_id):
                return table.park_until_thaw()
            missing = commits.missing(table.updates, request.step_id, request.sequences)
            if missing:
                return CommitReply(stamp=table.stamp, missing=missing, applied=False)
        with self._stages.measure("kernel"):
            commits.commit(table.storage, table.updates, table.ledger, request)
        table.steps_changed()
        return CommitReply(stamp=table.stamp, missing=(), applied=True)

    def _discard(self, request: DiscardRequest) -> DiscardReply:
        table = self._fenced(request.envelope)
        validate.check_step(request.step_id, ())
        discarded = table.updates.discard(request.step_id)
        table.steps_changed()
        return DiscardReply(stamp=table.stamp, discarded=discarded)

    def _score(self, request: ScoreRequest) -> ScoreReply:
        table = self._fenced(request.envelope)
        with self._stages.measure("copy in"):
            queries = validate.check_score(table.storage, request)
        with self._stages.measure("kernel"):
            heads, scores, ids = table.storage.score(queries, request.topk)
        return ScoreReply(stamp=table.stamp, heads=heads, scores=self._copy_out(scores), ids=self._copy_out(ids))

    def _read_rows(self, request: ReadRowsRequest) -> ReadRowsReply:
        table = self._fenced(request.envelope)
        ids = validate.check_array(table.storage, request.array, request.ids)
        rows = self._copy_out(table.storage.read(request.array, ids))
        return ReadRowsReply(stamp=table.stamp, blocks=table.storage.row_blocks(request.array), rows=rows)

    def _write_rows(self, request: WriteRowsRequest) -> WriteRowsReply | Parked:
        table = self._fenced(request.envelope)
        if table.frozen:
            return table.park_until_thaw()
        ids = validate.check_array(table.storage, request.array, request.ids)
        rows = validate.check_rows(table.storage, request.array, ids, request.blocks, request.rows)
        table.storage.write(request.array, ids, rows)
        return WriteRowsReply(stamp=table.stamp)

    def _copy_out(self, tensor: Tensor) -> Tensor:
        # On a GPU this waits for the kernel too: its launch alone is counted as "kernel".
        with self._stages.measure("copy out"):
            return tensor.cpu()

    def _attach(self, request: AttachTable) -> HostedTable:
        table_id, epoch = request.view.schema.table_id, request.view.placement.epoch
        present = self._tables.get(table_id)
        if present is not None and present.epoch == epoch:
            return present
        if present is not None and present.storage.num_pages + present.storage.num_lost:
            raise InvalidRequest(
                f"shard {self.info.shard} has table {present.view.schema.name!r} at epoch {present.epoch} already, "
                f"with pages, and cannot attach it at epoch {epoch}; send it the view, or drop it first",
                shard=self.info.shard,
            )
        self._drop(table_id)
        table = HostedTable(
            request, info=self.info, device=self._device, budget=self._budget, lease_s=self._held_lease_s
        )
        self._require_memory(table, table.num_bytes)
        self._tables[table_id] = table
        return table

    def _require_memory(self, table: HostedTable, num_bytes: int) -> None:
        """Raises InvalidRequest where so many more bytes of pages exceed the shard's memory. Before they are taken."""
        if self._memory_bytes is None:
            return
        taken = sum(table.num_bytes for table in self._tables.values())
        if taken + num_bytes > self._memory_bytes:
            raise InvalidRequest(
                f"{num_bytes / MIB:,.1f} MiB of pages of table {table.view.schema.name!r} do not fit on shard "
                f"{self.info.shard}: it may hold {self._memory_bytes / MIB:,.1f} MiB and holds {taken / MIB:,.1f} MiB "
                "already. Give shards more memory (shard.memory in the config), use more shards (mempool scale), make "
                "the table smaller (num_slots, value_dim, dtype='bfloat16' or 'int8', an optimizer with less state), "
                "or drop a table. Nothing was changed.",
                shard=self.info.shard,
                address=self.info.address,
            )

    def _fill(self, table: HostedTable) -> bool:
        if self._tables.get(table.table_id) is not table:
            raise NotFound(f"table {table.table_id} was dropped while it was being made", shard=self.info.shard)
        try:
            return table.fill()
        except Exception:
            self._drop(table.table_id)  # half a table must not answer
            raise

    def _drop(self, table_id: int) -> None:
        table = self._tables.pop(table_id, None)
        if table is not None:
            table.close()
            self._contexts.drop_table(table_id)

    def _drop_all(self) -> None:
        for table_id in list(self._tables):
            self._drop(table_id)

    def _freeze(self, table_id: int) -> int | Parked:
        table = self._table(table_id)
        table.check_ready()
        table.check_whole()
        table.frozen = True
        table.updates.expire()
        if any(table.updates.prepared()):
            return table.park_until_decided()
        return table.ledger.version

    def _give_up_freeze(self, table_id: int, timeout_s: float) -> int:
        table = self._table(table_id)
        undecided = list(table.updates.prepared())
        if not undecided and table.frozen:
            return table.ledger.version
        self._thaw(table_id)
        (group, rank), step = undecided[0] if undecided else (("", 0), None)
        raise DeadlineExceeded(
            f"table {table.view.schema.name!r} did not come to rest on shard {self.info.shard} within {timeout_s:g} s"
            + (f": step {step.step} of rank {rank} of group {group!r} is prepared and not decided" if step else "")
            + "; it is thawed again",
            shard=self.info.shard,
        )

    def _wake_freezes(self) -> None:
        # Making room for an update can have dropped what dead ranks of any table had prepared.
        for table in self._tables.values():
            table.steps_changed()

    def _thaw(self, table_id: int) -> None:
        table = self._tables.get(table_id)
        if table is not None:
            table.staging.drop()
            table.thaw()

    def _export(self, request: ExportPages) -> PageBatch:
        table = self._table(request.table_id)
        table.check_ready()
        return export(table.storage, request, version=table.ledger.version)

    def _export_ledger(self, request: ExportLedger) -> LedgerPart:
        table = self._table(request.table_id)
        table.check_ready()
        return ledger_part(table.ledger.snapshot(), request)

    def _check_pull(self, request: PullPages) -> HostedTable:
        table = self._table(request.table_id)
        table.check_ready()
        table.staging.check_pull(request.row_pages, request.blocks, request.key_pages)
        pages = request.row_pages, request.blocks
        self._require_memory(table, table.staging.new_bytes(*pages, request.key_pages))
        table.staging.reserve(*pages)
        return table

    def _stage(self, table: HostedTable, batch: PageBatch) -> int:
        return self._pulling(table).staging.put(batch)

    def _pulling(self, table: HostedTable) -> HostedTable:
        if self._tables.get(table.table_id) is not table:
            raise NotFound(f"table {table.table_id} was dropped while its pages were pulled", shard=self.info.shard)
        return table

    def _set_view(self, view: TableView) -> None:
        table = self._table(view.schema.table_id)
        if table.adopt(view):
            self._contexts.drop_table(table.table_id)

    def _status(self) -> ShardStatus:
        tables = tuple(table.status() for _, table in sorted(self._tables.items()))
        return ShardStatus(
            info=self.info,
            state="ready",
            device=str(self._device),
            num_bytes=sum(table.num_bytes for table in tables),
            context_bytes=self._contexts.num_bytes,
            uptime_s=time.monotonic() - self._started_s,
            tables=tables,
            stages=self._stages.snapshot(),
        )
