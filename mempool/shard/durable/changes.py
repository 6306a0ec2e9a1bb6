"""Changes of a shard's tables, each made and then told to whoever keeps them. All runs on the engine's thread.

What they are is ``Tenancy``'s, and what they raise.
"""

from mempool.shard.durable.records import Attached, Dropped, Forked, Restored, Staged, StagedLedger, Viewed
from mempool.shard.forks.forking import base_of, checked_point, take_fork
from mempool.shard.hosted import HostedTable
from mempool.shard.tenancy import Tenancy
from mempool.types import AttachTable, Ledger, PageBatch, PullPages, TableView


class Changes:
    """Tables that come, go and move. Each raises StorageFailed, too, where it could not be kept."""

    def __init__(self, tenancy: Tenancy) -> None:
        self._tenancy = tenancy

    def attach(self, request: AttachTable) -> HostedTable:
        self._tenancy.log.require()
        before = self._tenancy.tables.get(request.view.schema.table_id)
        if request.mode == "forked":
            return self._fork(request)
        table = self._tenancy.attach(request, base=base_of(self._tenancy, request))
        if table is not before or request.mode == "confirm":
            self._tenancy.log.add(Attached(request))
        return table

    def prepare_fork(self, request: AttachTable) -> bool:
        """Before the moment: a piece of what its table has that cannot be shared yet. Returns whether all can."""
        table = self._tenancy.tables.get(request.view.schema.table_id)
        return table is None or table.forked is None or self.fill(table)

    def _fork(self, request: AttachTable) -> HostedTable:
        forked = take_fork(self._tenancy, request)
        if forked is not None:
            self._tenancy.log.add(Forked(forked.table_id, checked_point(request).table_id))
        return self._tenancy.table(request.view.schema.table_id)

    def fill(self, table: HostedTable) -> bool:
        """A piece of initial values, which nobody needs to keep. Returns whether all are there, or a fork is ready."""
        is_here = table.table_id in self._tenancy.tables
        try:
            return self._tenancy.fill(table) or (table.forked is not None and table.forked.ready)
        except Exception:
            if is_here and table.table_id not in self._tenancy.tables:
                self._tenancy.log.add(Dropped(table.table_id))
            raise

    def restore(self, table: HostedTable, batch: PageBatch | None) -> bool:
        """A piece of what a checkpoint has of a table; None: that was all. Returns whether it is whole."""
        self._tenancy.log.require(0 if batch is None else batch.num_bytes)
        if table.restored is not None:
            table.restored.take(batch)
        whole = self.fill(table)
        self._tenancy.log.add(Restored(table.table_id, batch))
        return whole

    def give_up(self, table: HostedTable) -> None:
        """A table that cannot be filled is here no more."""
        if self._tenancy.tables.get(table.table_id) is table:
            self._tenancy.drop(table.table_id)
            self._tenancy.log.add(Dropped(table.table_id))

    def end(self, table_id: int, *, unmade: bool) -> None:
        self._tenancy.log.require()
        self._tenancy.end(table_id, unmade=unmade)
        self._tenancy.log.add(Dropped(table_id))

    def set_view(self, view: TableView, *, token: str = "") -> None:
        self._tenancy.log.require()
        table = self._tenancy.table(view.schema.table_id)
        before = table.view
        self._tenancy.set_view(view, token=token)
        if table.view is not before:
            self._tenancy.log.add(Viewed(table.view))

    def stage(self, table: HostedTable, batch: PageBatch, *, token: str) -> int:
        self._tenancy.log.require()
        num_bytes = self._tenancy.stage(table, batch, token=token)
        self._tenancy.log.add(Staged(token, batch))
        return num_bytes

    def stage_ledger(self, table: HostedTable, request: PullPages, ledger: Ledger) -> None:
        self._tenancy.stage_ledger(table, ledger, token=request.token, decisions=request.of_decisions)
        self._tenancy.log.add(StagedLedger(table.table_id, request.token, ledger, request.of_decisions))
