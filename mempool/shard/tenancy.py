"""The tables of a shard and their lives: attached, filled, frozen, moved, dropped; and what the shard says of itself.

Changes run on the engine's thread. What is only read (views, status) may be asked on any thread and never waits.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from mempool import kernels
from mempool.errors import DeadlineExceeded, InvalidRequest, MempoolError, NotFound, StalePlacement
from mempool.observe import Stages
from mempool.shard.bounds import check_also, check_ledger, check_rank, check_reply, no_memory
from mempool.shard.durable.log import NO_LOG, Log
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.transfer import check_round, check_version, export, ledger_part
from mempool.shard.parking import Parked
from mempool.shard.resolving import Decisions
from mempool.shard.steps.budget import Budget, out_of_memory
from mempool.shard.steps.contexts import Contexts
from mempool.shard.steps.optimizers import kernel_needs
from mempool.shard.work.saying import table_status
from mempool.types import (
    AttachTable,
    Envelope,
    ExportLedger,
    ExportPages,
    HeartbeatReply,
    HeartbeatRequest,
    Ledger,
    LedgerPart,
    PageBatch,
    PullPages,
    ShardInfo,
    ShardStatus,
    TableView,
)
from mempool.types.running import THREADS, Clock, Runner

_LOG = logging.getLogger("mempool.shard")

MOST_ENDED = 1024
"""Dropped tables that a shard remembers: for longer than a controller needs to tell every shard."""


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
        clock: Seconds, monotonic: what leases are told by.
        runner: Makes kernels ready.

    Attributes:
        decisions: What became of steps, for whoever asks.
        log: Told what changes.
        tables: By id. Never changed, always replaced: so that other threads can read it.
        ended: Ids of tables that were dropped for good, the newest last.
        on_doubt: Called on the engine's thread where another shard is to be asked.
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
        clock: Clock = time.monotonic,
        runner: Runner = THREADS,
    ) -> None:
        self._info = info
        self._device = device
        self._budget = budget
        self._contexts = contexts
        self._page_bytes = page_bytes
        self._held_lease_s = held_lease_s
        self._reply_bytes = reply_bytes
        self._clock = clock
        self._runner = runner
        self.tables: dict[int, HostedTable] = {}
        self.ended: tuple[int, ...] = ()
        budget.keeper.page_bytes = page_bytes
        budget.keeper.taken_bytes = lambda: sum(table.num_bytes for table in self.tables.values())
        self.decisions = Decisions(info.shard, lambda: self.tables, clock=clock)
        self.on_doubt: Callable[[], None] = lambda: None
        self.log: Log = NO_LOG

    def keep_in(self, log: Log) -> None:
        """From now on ``log`` is told what changes."""
        self.log = log
        for table in self.tables.values():
            self._have_kept(table)

    def _have_kept(self, table: HostedTable) -> None:
        table.ledger.log = self.log.steps_of(table.table_id)
        table.storage.tell_caught_up = self.log.caught_up_of(table.table_id)
        table.staging.on_drop = self.log.unstaged_of(table.table_id)

    def table(self, table_id: int) -> HostedTable:
        """Raises NotFound where it is not here."""
        table = self.tables.get(table_id)
        if table is None:
            raise NotFound(
                f"shard {self._info.shard} has no table {table_id}; it was dropped, or is not attached yet",
                shard=self._info.shard,
                address=self._info.address,
            )
        return table

    def fenced(self, envelope: Envelope, *, whole: bool = True) -> HostedTable:
        """The table of a request. Raises StalePlacement, NotFound, and as ``HostedTable.check`` does."""
        if envelope.incarnation != self._info.incarnation:
            self.check_incarnation(envelope.incarnation)
        table = self.table(envelope.table_id)
        table.check(envelope, whole=whole)
        return table

    def decides(self, table_id: int) -> bool:
        """Whether steps of which that table is the first are decided here."""
        table = self.tables.get(table_id)
        return table is not None and table.is_gate

    def gate_of(self, table_id: int) -> ShardInfo | None:
        """The shard that decides such steps; None where it is not known."""
        table = self.tables.get(table_id)
        return None if table is None else table.gate_info

    def check_incarnation(self, incarnation: int) -> None:
        """Raises StalePlacement for another one than this."""
        if incarnation != self._info.incarnation:
            raise StalePlacement(
                f"the request was planned for incarnation {incarnation} of shard {self._info.shard}, which is "
                f"now at {self._info.incarnation}",
                shard=self._info.shard,
                address=self._info.address,
            )

    # Tables come and go

    def attach(self, request: AttachTable, *, base: HostedTable | None = None) -> HostedTable:
        """Make a table known, with nothing in it yet that answers; or let one answer that was pending.

        Raises:
            InvalidRequest: It is here already, with pages, at an earlier epoch; or another one is; or it does not fit.
            StalePlacement: It is here at a later epoch.
            NotFound: It is to be confirmed, and is not here, or one is not that is confirmed with it.
        """
        check_also(request)
        if request.mode == "confirm":
            confirmed = [self.table(each) for each in (request.view.schema.table_id, *request.also)]
            for each in confirmed:
                each.pending = False
            return confirmed[0]
        check_ledger(request.ledger)
        if request.view.schema.table_id in self.ended:
            raise NotFound(
                f"table {request.view.schema.table_id} was dropped on shard {self._info.shard}, and is not attached "
                "again: the request is late",
                shard=self._info.shard,
            )
        table_id, epoch = request.view.schema.table_id, request.view.placement.epoch
        present = self.tables.get(table_id)
        if present is not None and present.epoch == epoch:
            self._require_same(present, request.view)
            return present
        if present is not None and present.epoch > epoch:
            raise StalePlacement(
                f"table {present.view.schema.name!r} is here at epoch {present.epoch}, and is to "
                f"be attached at epoch {epoch}: the request is late. Nothing was changed",
                shard=self._info.shard,
            )
        if present is not None and present.pages + present.lost_pages:
            raise InvalidRequest(
                f"shard {self._info.shard} has table {present.view.schema.name!r} at epoch {present.epoch} already, "
                f"with pages, and cannot attach it at epoch {epoch}; send it the view, or drop it first",
                shard=self._info.shard,
            )
        self.drop(table_id)
        table = HostedTable(
            request,
            info=self._info,
            device=self._device,
            budget=self._budget,
            lease_s=self._held_lease_s,
            clock=self._clock,
            base=base,
        )
        self._require_memory(table, table.num_bytes)
        self._have_kept(table)
        self.tables = self.tables | {table_id: table}
        return table

    async def prepare(self, table: HostedTable) -> None:
        """Make the table's kernels ready, on a thread of its own; what fails is left to the first call in need."""
        stop = threading.Event()

        def say(done: int, parts: int) -> None:
            table.preparing = f"CPU kernels to be compiled, once per machine: {done} of {parts} are"

        needs = kernel_needs(table.view.schema, self._device)
        try:
            # A thread of its own: those of asyncio are few, and others wait for them.
            await self._runner.run(lambda: kernels.make_ready(needs, report=say, stop=stop), name="mempool-kernels")
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
        if self.tables.get(table.table_id) is not table:
            raise NotFound(f"table {table.table_id} was dropped while it was being made", shard=self._info.shard)
        try:
            if table.forked is not None and table.fork_of not in self.tables:
                raise NotFound(
                    f"table {table.fork_of} was dropped while a fork of it, table {table.view.schema.name!r}, was made",
                    shard=self._info.shard,
                )
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
        table = self.tables.get(table_id)
        if table is not None:
            self.tables = {key: other for key, other in self.tables.items() if key != table_id}
            self.decisions.leave(table)
            table.close()
            self._contexts.drop_table(table_id)
            for other in self.tables.values():
                other.measure()  # a fork of it may have what was its memory

    def end(self, table_id: int, *, unmade: bool = False) -> None:
        """Drop a table for good: the shard remembers it, refuses it from now on, and says so to controllers.

        Raises StalePlacement where only a pending one is meant, and it was confirmed.
        """
        table = self.tables.get(table_id)
        if unmade and table is not None and not table.pending:
            raise StalePlacement(
                f"table {table.view.schema.name!r} ({table_id}) was confirmed on shard {self._info.shard}: who says "
                "that nobody has made it is late. Nothing was changed"
            )
        self.drop(table_id)
        self.ended = (*(each for each in self.ended if each != table_id), table_id)[-MOST_ENDED:]

    def drop_all(self) -> None:
        """Forget all tables."""
        for table_id in list(self.tables):
            self.drop(table_id)

    # Moves

    def freeze(self, request: tuple[int, str, float, bool]) -> int | Parked:
        """Begin or renew a round's freeze (table, token, lease, only renew): the table's version once nothing is
        undecided.

        It begins when those were served that the freeze before it has held off, or their turn is over.

        Raises:
            StalePlacement: Another round holds the table, or this one is over, or does not hold it as it should.
        """
        table_id, token, lease_s, renew = request
        table = self.table(table_id)
        table.check_ready()
        table.check_whole()
        if token != table.rounds.token:
            table.let_go()  # one whose lease is over stands in nobody's way
            table.rounds.require(token) if renew else table.rounds.check(token)
            if (turns := table.park_for_turns()) is not None:
                return turns
        table.rounds.begin(token, lease_s)
        table.expire()
        if table.updates.any_prepared or table.order.any_waiting:
            return table.park_until_rest()
        return table.ledger.version

    def give_up_freeze(self, request: tuple[int, str], timeout_s: float) -> int:
        """The last look at a freeze whose time is over: thawed, with DeadlineExceeded, where something is undecided."""
        table_id, token = request
        table = self.table(table_id)
        if not table.updates.any_prepared and not table.order.any_waiting and table.frozen:
            return table.ledger.version
        undecided = next((step for step in table.updates.prepared() if table.order.find(step.step_id) is None), None)
        self.thaw((table_id, token))
        why = ""
        if undecided is not None:
            step, by = undecided.step_id, undecided.decider_at
            why = (
                f": step {step.step} of rank {step.rank} of group {step.group!r} is prepared and not decided"
                f"{'' if by is None or by.shard == self._info.shard else f' as far as shard {by.shard} has said'}. If "
                f"that trainer died, it is given up {self._held_lease_s:g} s after it was last heard of"
            )
        elif table.order.any_waiting:
            why = (
                f": its version {table.order.applied + 1} is decided and not applied here"
                f"{', as updates of it are missing: its trainer sends them again' if table.unprepared else ''}"
            )
        raise DeadlineExceeded(
            f"table {table.view.schema.name!r} did not come to rest on shard {self._info.shard} within {timeout_s:g} s"
            f"{why}; it is thawed again",
            shard=self._info.shard,
        )

    def thaw(self, request: tuple[int, str]) -> None:
        """End a round's freeze, or whichever there is (""), and drop what is staged; no error where there is none."""
        table_id, token = request
        table = self.tables.get(table_id)
        if table is not None and (table.rounds.end(token) or not token):
            table.thaw()

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply:
        """A rank is alive: all it holds stays."""
        check_rank(request.group, request.rank)
        held = sum(table.updates.heard_of(request.group, request.rank) for table in self.tables.values())
        return HeartbeatReply(lease_s=self._held_lease_s, updates_held=held)

    def export(self, request: ExportPages) -> PageBatch:
        """Pages whole, for a peer. Raises as ``transfer.export`` does, and RequestTooLarge."""
        table = self.table(request.table_id)
        table.check_ready()
        check_round(table, request.token)
        storage, row_pages = table.storage, len(request.row_pages)
        num_bytes = row_pages * storage.page_bytes(request.blocks) + len(request.key_pages) * storage.head_bytes
        check_reply(num_bytes, self._reply_bytes, f"{row_pages:,} row pages")
        table.read_by_round()
        return export(storage, request, version=table.ledger.version)

    def export_ledger(self, request: ExportLedger) -> LedgerPart:
        """A part of a table's ledger, for a peer."""
        (table := self.table(request.table_id)).check_ready()
        return ledger_part(table.ledger.snapshot(), request)

    def begin_pull(self, request: PullPages) -> HostedTable:
        """Check a pull and make room for it."""
        table = self.table(request.table_id)
        table.check_ready()
        check_round(table, request.token, join=True)
        table.staging.check_pull(request.row_pages, request.blocks, request.key_pages)
        pages = request.row_pages, request.blocks
        self._require_memory(table, table.staging.new_bytes(*pages, request.key_pages))
        table.staging.reserve(*pages)
        table.measure()
        return table

    def stage(self, table: HostedTable, batch: PageBatch, *, token: str = "") -> int:
        """Stage a batch of a pull. Returns its bytes. Raises StalePlacement where its round is over by now, or its
        owner is at another version."""
        self._require_pulled(table)
        check_round(table, token, join=True)
        if token:
            check_version(table, batch.version)
        num_bytes = table.staging.put(batch)
        table.measure()
        return num_bytes

    def lacks_ledger(self, table: HostedTable) -> bool:
        """Whether a pull is to bring what was applied to its pages, too."""
        self._require_pulled(table)
        return table.staging.lacks_ledger(table.ledger.version)

    def stage_ledger(self, table: HostedTable, ledger: Ledger, *, token: str = "", decisions: bool = False) -> None:
        """Stage the ledger of a pull, or the gate's decisions. Raises as ``stage``, and InvalidRequest for one that no
        shard makes, Internal where it is newer."""
        self._require_pulled(table)
        check_round(table, token, join=True)
        check_ledger(ledger)
        table.staging.put_ledger(ledger, decisions=decisions)

    def _require_pulled(self, table: HostedTable) -> None:
        if self.tables.get(table.table_id) is not table:
            raise NotFound(f"table {table.table_id} was dropped while its pages were pulled", shard=self._info.shard)

    def _require_same(self, table: HostedTable, view: TableView) -> None:
        if view.schema != table.view.schema:
            raise InvalidRequest(
                f"the view's schema of table {view.schema.name!r} is another one than table {table.view.schema.name!r} "
                f"({table.table_id}) was made with; drop the table and make it anew. Nothing was changed.",
                shard=self._info.shard,
            )

    def set_view(self, view: TableView, *, token: str = "") -> None:
        """Adopt a view. Raises StalePlacement where its round is over here, or another one has made its epoch, and as
        ``HostedTable.adopt`` does."""
        table = self.table(view.schema.table_id)
        self._require_same(table, view)
        late = view.placement.epoch < table.epoch and token
        if late or (view.placement.epoch == table.epoch and not view.placement.same_owners(table.view.placement)):
            raise StalePlacement(
                f"the view of epoch {view.placement.epoch} is late: another round has brought table "
                f"{table.view.schema.name!r} to epoch {table.epoch} on shard {self._info.shard}, so one of two "
                "controllers is late. Nothing was changed",
                shard=self._info.shard,
                address=self._info.address,
            )
        if view.placement.epoch > table.epoch and token:
            table.let_go()
            table.rounds.require(token)
        if table.adopt(view):
            self._contexts.drop_table(table.table_id)

    # All tables

    def expire(self) -> bool:
        """Drop what nobody has spoken of for longer than its lease. Returns whether there is more that may expire."""
        self._contexts.expire()
        self._contexts.give_way()
        for table in self.tables.values():
            table.expire()
            self._apply_again(table)
            if table.step_doubt.since_s is not None or table.order_doubt.since_s is not None or table.rounds.lapsed:
                self.on_doubt()
        busy = any(table.frozen or table.order.any_waiting or table.waited_for for table in self.tables.values())
        busy = busy or any(len(table.storage.moments.pins) for table in self.tables.values())
        return busy or self._budget.held_bytes > 0 or len(self._contexts) > 0

    def _apply_again(self, table: HostedTable) -> None:
        """What was decided and failed, for want of memory, is tried again."""
        if table.order.next() is None or table.lost_pages:
            return
        try:
            table.apply_decided()
        except Exception as error:
            log = _LOG.warning if isinstance(error, MempoolError) or out_of_memory(error) else _LOG.exception
            log("what was decided for table %r cannot be applied now: %s", table.view.schema.name, error)

    def make_room(self) -> None:
        """Something was held: forget lookups where they stand in its way."""
        self._contexts.give_way()

    # Read on any thread

    def views(self) -> tuple[TableView, ...]:
        """The newest view of every table here that is made."""
        return tuple(table.view for table in self.tables.values() if not table.pending)

    def status(self, *, stages: Stages, **said: Any) -> ShardStatus:
        """The shard at a glance; said: what others know of it."""
        tables = tuple(table_status(table) for _, table in sorted(self.tables.items()))
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
            client_limit_bytes=budget.limit_bytes,
            page_limit_bytes=self._page_bytes or 0,
            version_bytes=budget.keeper.num_bytes,
            version_limit_bytes=budget.keeper.limit_bytes,
            tables=tables,
            stages=stages.snapshot(),
            dropped=self.ended,
            **said,
        )

    def _require_memory(self, table: HostedTable, num_bytes: int) -> None:
        """Raises InvalidRequest where so many more bytes of pages exceed the shard's memory. Before they are taken."""
        if self._page_bytes is None:
            return
        taken = sum(table.num_bytes for table in self.tables.values())
        if taken + num_bytes > self._page_bytes:
            raise no_memory(self._info, table.view.schema.name, num_bytes, limit=self._page_bytes, taken=taken)
        self._budget.keeper.give_way(num_bytes)
