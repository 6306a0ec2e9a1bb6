"""The tables of a shard and their lives: attached, filled, frozen, moved, dropped; and what the shard says of itself.

Changes run on the engine's thread. What is only read (views, status) may be asked on any thread and never waits.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from mempool import kernels
from mempool.errors import DeadlineExceeded, InvalidRequest, NotFound, StalePlacement
from mempool.observe import Stages
from mempool.shard.bounds import check_ledger, check_reply
from mempool.shard.hosted import HostedTable, Parked
from mempool.shard.pages.transfer import export, ledger_part
from mempool.shard.steps.budget import Budget, out_of_memory
from mempool.shard.steps.contexts import Contexts
from mempool.shard.steps.optimizers import kernel_needs
from mempool.types import (
    AttachTable,
    Envelope,
    ExportLedger,
    ExportPages,
    Ledger,
    LedgerPart,
    PageBatch,
    PullPages,
    ShardInfo,
    ShardStatus,
    TableView,
)

MIB = 2**20

_LOG = logging.getLogger("mempool.shard")


def _make_ready(
    needs: kernels.Needs, say: Callable[[int, int], None], stop: threading.Event, done: "Future[None]"
) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        kernels.make_ready(needs, report=say, stop=stop)
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


class Tenancy:
    """The tables of one shard.

    Args:
        info: Which shard this is.
        device: Where pages lie.
        budget: What clients may make it hold.
        contexts: Lookups of all its tables.
        page_bytes: Bytes of pages, of all tables together; None: whatever the device has.
        held_lease_s: Seconds of silence after which a rank's held updates are dropped.
        reply_bytes: What a message to a peer may have; None: as much as there is.
    """

    def __init__(
        self,
        info: ShardInfo,
        *,
        device: torch.device,
        budget: Budget,
        contexts: Contexts,
        page_bytes: int | None,
        held_lease_s: float,
        reply_bytes: int | None = None,
    ) -> None:
        self._info = info
        self._device = device
        self._budget = budget
        self._contexts = contexts
        self._page_bytes = page_bytes
        self._held_lease_s = held_lease_s
        self._reply_bytes = reply_bytes
        # Never changed, always replaced: so that other threads can read it.
        self._tables: dict[int, HostedTable] = {}

    # Which table is meant

    def table(self, table_id: int) -> HostedTable:
        """Raises NotFound where it is not here."""
        table = self._tables.get(table_id)
        if table is None:
            raise NotFound(
                f"shard {self._info.shard} has no table {table_id}; it was dropped, or is not attached yet",
                shard=self._info.shard,
                address=self._info.address,
            )
        return table

    def fenced(self, envelope: Envelope) -> HostedTable:
        """The table of a request. Raises StalePlacement, NotFound, and as ``HostedTable.check`` does."""
        if envelope.incarnation != self._info.incarnation:
            raise StalePlacement(
                f"the request was planned for incarnation {envelope.incarnation} of shard {self._info.shard}, which is "
                f"now at {self._info.incarnation}",
                shard=self._info.shard,
                address=self._info.address,
            )
        table = self.table(envelope.table_id)
        table.check(envelope)
        return table

    # Tables come and go

    def attach(self, request: AttachTable) -> HostedTable:
        """Make a table known, with nothing in it yet that answers.

        Raises:
            InvalidRequest: It is here already, with pages, at another epoch; or its pages do not fit.
        """
        check_ledger(request.ledger)
        table_id, epoch = request.view.schema.table_id, request.view.placement.epoch
        present = self._tables.get(table_id)
        if present is not None and present.epoch == epoch:
            return present
        if present is not None and present.pages + present.lost_pages:
            raise InvalidRequest(
                f"shard {self._info.shard} has table {present.view.schema.name!r} at epoch {present.epoch} already, "
                f"with pages, and cannot attach it at epoch {epoch}; send it the view, or drop it first",
                shard=self._info.shard,
            )
        self.drop(table_id)
        table = HostedTable(
            request, info=self._info, device=self._device, budget=self._budget, lease_s=self._held_lease_s
        )
        self._require_memory(table, table.num_bytes)
        self._tables = self._tables | {table_id: table}
        return table

    async def prepare(self, table: HostedTable) -> None:
        """Make the table's kernels ready, on a thread of its own; what fails is left to the first call in need."""
        stop = threading.Event()

        def say(done: int, parts: int) -> None:
            table.preparing = f"CPU kernels to be compiled, once per machine: {done} of {parts} are"

        needs = kernel_needs(table.view.schema, self._device)
        done: Future[None] = Future()
        # Of its own: those of asyncio are few, and others wait for them.
        threading.Thread(target=_make_ready, args=(needs, say, stop, done), name="mempool-kernels", daemon=True).start()
        try:
            await asyncio.wrap_future(done)
        except Exception as error:
            _LOG.warning("kernels of table %r were not made ready: %s", table.view.schema.name, error, exc_info=True)
        finally:
            stop.set()  # whoever is cancelled waits no longer
            table.preparing = ""

    def fill(self, table: HostedTable) -> bool:
        """Write a piece of initial values. Returns whether all are there; a table that cannot be filled is dropped.

        Raises:
            NotFound: It was dropped meanwhile.
            InvalidRequest: The device has no memory for it, whatever shard.memory promised.
        """
        if self._tables.get(table.table_id) is not table:
            raise NotFound(f"table {table.table_id} was dropped while it was being made", shard=self._info.shard)
        try:
            return table.fill()
        except Exception as error:
            self.drop(table.table_id)  # half a table must not answer
            if not out_of_memory(error):
                raise
            raise InvalidRequest(
                f"shard {self._info.shard} has no memory left for the pages of table {table.view.schema.name!r} "
                f"({type(error).__name__}: {error}); the table was dropped there. Use more shards or a smaller table, "
                "or set shard.memory to what a shard really has",
                shard=self._info.shard,
            ) from error

    def drop(self, table_id: int) -> None:
        """Forget a table; unknown ones are no error."""
        table = self._tables.get(table_id)
        if table is not None:
            self._tables = {key: other for key, other in self._tables.items() if key != table_id}
            table.close()
            self._contexts.drop_table(table_id)

    def drop_all(self) -> None:
        """Forget all tables."""
        for table_id in list(self._tables):
            self.drop(table_id)

    # Moves

    def freeze(self, table_id: int) -> int | Parked:
        """Begin a freeze, or go on with it: the table's version once nothing is prepared."""
        table = self.table(table_id)
        table.check_ready()
        table.check_whole()
        table.frozen = True
        table.expire()
        if table.updates.any_prepared:
            return table.park_until_decided()
        return table.ledger.version

    def give_up_freeze(self, table_id: int, timeout_s: float) -> int:
        """The last look at a freeze whose time is over: thawed, with DeadlineExceeded, where something is undecided."""
        table = self.table(table_id)
        undecided = next(table.updates.prepared(), None)
        if undecided is None and table.frozen:
            return table.ledger.version
        self.thaw(table_id)
        why = ""
        if undecided is not None:
            (group, rank), step = undecided
            why = (
                f": step {step.step} of rank {rank} of group {group!r} is prepared and not decided. If that trainer "
                f"died, it is given up {table.updates.patience_s:g} s after it was last heard of"
            )
        raise DeadlineExceeded(
            f"table {table.view.schema.name!r} did not come to rest on shard {self._info.shard} within {timeout_s:g} s"
            f"{why}; it is thawed again",
            shard=self._info.shard,
        )

    def thaw(self, table_id: int) -> None:
        """End a freeze and drop what is staged; no error where there is nothing to undo."""
        table = self._tables.get(table_id)
        if table is not None:
            table.staging.drop()
            table.measure()
            table.thaw()

    def export(self, request: ExportPages) -> PageBatch:
        """Pages whole, for a peer. Raises as ``transfer.export`` does, and RequestTooLarge."""
        table = self.table(request.table_id)
        table.check_ready()
        num_bytes = len(request.row_pages) * table.storage.page_bytes(request.blocks)
        num_bytes += len(request.key_pages) * table.storage.head_bytes
        check_reply(num_bytes, self._reply_bytes, f"{len(request.row_pages):,} row pages")
        return export(table.storage, request, version=table.ledger.version)

    def export_ledger(self, request: ExportLedger) -> LedgerPart:
        """A part of a table's ledger, for a peer."""
        table = self.table(request.table_id)
        table.check_ready()
        return ledger_part(table.ledger.snapshot(), request)

    def begin_pull(self, request: PullPages) -> HostedTable:
        """Check a pull and make room for it."""
        table = self.table(request.table_id)
        table.check_ready()
        table.staging.check_pull(request.row_pages, request.blocks, request.key_pages)
        pages = request.row_pages, request.blocks
        self._require_memory(table, table.staging.new_bytes(*pages, request.key_pages))
        table.staging.reserve(*pages)
        table.measure()
        return table

    def stage(self, table: HostedTable, batch: PageBatch) -> int:
        """Stage a batch of a pull. Returns its bytes."""
        self._require_pulled(table)
        num_bytes = table.staging.put(batch)
        table.measure()
        return num_bytes

    def lacks_ledger(self, table: HostedTable) -> bool:
        """Whether a pull is to bring what was applied to its pages, too."""
        self._require_pulled(table)
        return table.staging.lacks_ledger(table.ledger.version)

    def stage_ledger(self, table: HostedTable, ledger: Ledger) -> None:
        """Stage the ledger of a pull. Raises InvalidRequest for one that no shard makes, Internal where it is newer."""
        self._require_pulled(table)
        check_ledger(ledger)
        table.staging.put_ledger(ledger)

    def _require_pulled(self, table: HostedTable) -> None:
        if self._tables.get(table.table_id) is not table:
            raise NotFound(f"table {table.table_id} was dropped while its pages were pulled", shard=self._info.shard)

    def set_view(self, view: TableView) -> None:
        """Adopt a view. Raises Internal as ``HostedTable.adopt`` does."""
        table = self.table(view.schema.table_id)
        if view.schema != table.view.schema:
            raise InvalidRequest(
                f"the view's schema of table {table.view.schema.name!r} is another one than the table was made with; "
                "drop the table and make it anew. Nothing was changed.",
                shard=self._info.shard,
            )
        if table.adopt(view):
            self._contexts.drop_table(table.table_id)

    # All tables

    def expire(self) -> bool:
        """Drop what nobody has spoken of for longer than its lease. Returns whether there is more that may expire."""
        self._contexts.expire()
        self._contexts.give_way()
        for table in self._tables.values():
            table.expire()
        return self._budget.held_bytes > 0 or len(self._contexts) > 0

    def make_room(self) -> None:
        """Something was held: forget lookups where they stand in its way, and let freezes know of what expired."""
        self._contexts.give_way()
        for table in self._tables.values():
            table.steps_changed()

    # Read on any thread

    def views(self) -> tuple[TableView, ...]:
        """The newest view of every table here."""
        return tuple(table.view for table in self._tables.values())

    def status(self, *, stages: Stages, started_s: float, queued_jobs: int) -> ShardStatus:
        """The shard at a glance."""
        tables = tuple(table.status() for _, table in sorted(self._tables.items()))
        budget = self._budget
        return ShardStatus(
            info=self._info,
            state="ready",
            device=str(self._device),
            num_bytes=sum(table.num_bytes for table in tables),
            context_bytes=self._contexts.num_bytes,
            held_bytes=budget.held_bytes,
            queued_bytes=budget.queued_bytes,
            kept_bytes=budget.kept_bytes,
            queued_calls=queued_jobs,
            client_limit_bytes=budget.limit_bytes,
            page_limit_bytes=self._page_bytes or 0,
            uptime_s=time.monotonic() - started_s,
            tables=tables,
            stages=stages.snapshot(),
        )

    def _require_memory(self, table: HostedTable, num_bytes: int) -> None:
        """Raises InvalidRequest where so many more bytes of pages exceed the shard's memory. Before they are taken."""
        if self._page_bytes is None:
            return
        taken = sum(table.num_bytes for table in self._tables.values())
        if taken + num_bytes > self._page_bytes:
            raise InvalidRequest(
                f"{num_bytes / MIB:,.1f} MiB of pages of table {table.view.schema.name!r} do not fit on shard "
                f"{self._info.shard}: it may hold {self._page_bytes / MIB:,.1f} MiB and holds {taken / MIB:,.1f} MiB "
                "already. Give shards more memory (shard.memory in the config), use more shards (mempool scale), make "
                "the table smaller (num_slots, value_dim, dtype='bfloat16' or 'int8', an optimizer with less state), "
                "or drop a table. Nothing was changed.",
                shard=self._info.shard,
                address=self._info.address,
            )
