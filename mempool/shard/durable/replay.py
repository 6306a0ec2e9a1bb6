"""Makes a shard again of what its store has: the newest snapshot, then the records behind it, in their order.

Runs on the engine's thread before anything else does, and says nothing to the store. No other shard is asked: what
is in doubt then is asked for as at any other time.
"""

import logging
from collections.abc import Callable

from mempool import kernels
from mempool.errors import DataLoss, Internal, MempoolError
from mempool.observe import Stages
from mempool.shard import validate
from mempool.shard.durable.families import forks_of, restore_forks
from mempool.shard.durable.pages import place_pages, populate, restore_pages, rows_of
from mempool.shard.durable.records import (
    Applied,
    Attached,
    Begun,
    CaughtUp,
    Counted,
    Decided,
    Dropped,
    Forked,
    Gone,
    Held,
    Kept,
    Over,
    Prepared,
    RecordOf,
    Restored,
    Schedule,
    Staged,
    StagedLedger,
    Stopped,
    Unstaged,
    Viewed,
    Written,
)
from mempool.shard.durable.store import Store
from mempool.shard.forks.forking import base_of, become
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.transfer import PULL_LEASE_S
from mempool.shard.steps import commits
from mempool.shard.steps.budget import Budget, out_of_memory
from mempool.shard.steps.held import HeldUpdate, PreparedStep
from mempool.shard.steps.optimizers import kernel_needs
from mempool.shard.tenancy import Tenancy
from mempool.shard.usage.renewal import written
from mempool.types import PrepareRequest, StepId
from mempool.types.bags import Bags

_LOG = logging.getLogger("mempool.shard")


def recover(store: Store, tenancy: Tenancy, budget: Budget, stages: Stages) -> dict[Arena, int]:
    """Make the shard again, and have it tell its store from now on.

    Args:
        stages: How long the snapshot takes to be read, and the records to be replayed, is told here.

    Returns:
        Which arenas' pages are as in the newest snapshot, but for those that were written to since ``writes`` was that.

    Raises:
        DataLoss: Something of it is damaged or missing.
    """
    replay = _Replay(tenancy)
    budget.recovers = True
    try:
        with stages.measure("recover: snapshot"):
            for record in store.take_head():
                replay.take(record)
            rows, forks = rows_of(store.snapshots, tenancy.tables), forks_of(tenancy.tables)
            others = {table_id: table for table_id, table in tenancy.tables.items() if table_id not in forks}
            places = place_pages(rows, others)
        with stages.measure("recover: kernels"):  # on a new machine they are compiled, on all cores
            for table in tenancy.tables.values():
                _make_ready(table)
        with stages.measure("recover: memory"):
            populate(places)
        with stages.measure("recover: snapshot"):
            restored = restore_pages(store.snapshots, tenancy.tables, places)
            restored |= restore_forks(store.snapshots, tenancy.tables, forks, rows)
            replay.own()
        with stages.measure("recover: replay"):
            for record in store.records():
                replay.take(record)
    except MempoolError:
        raise
    except Exception as error:
        raise Internal(f"{store.path} cannot be replayed: {type(error).__name__}: {error}. This is a bug.") from error
    finally:
        budget.recovers = False
    tenancy.keep_in(store)
    replay.finish()
    return restored


def _make_ready(table: HostedTable) -> None:
    """Have the table's kernels compiled and loaded; what fails is left to the first call in need."""
    try:
        kernels.make_ready(kernel_needs(table.view.schema, table.storage.device))
    except Exception as error:
        _LOG.warning("kernels of table %r were not made ready: %s", table.view.schema.name, error, exc_info=True)


class _Replay:
    """Does what records say."""

    def __init__(self, tenancy: Tenancy) -> None:
        self._tenancy = tenancy
        self._rounds: dict[int, str] = {}  # of tables with staged pages
        self._do: dict[type, Callable[..., None]] = {
            Begun: lambda _: None,
            Attached: self._attach,
            Dropped: lambda record: tenancy.end(record.table_id),
            Viewed: self._view,
            Held: self._hold,
            Prepared: lambda record: self._prepare(record.request),
            Decided: self._decide,
            Applied: self._apply,
            Over: self._over,
            Written: self._write,
            Counted: self._count,
            Restored: self._restore,
            Staged: self._stage,
            StagedLedger: self._stage_ledger,
            Stopped: self._stop,
            Unstaged: self._unstage,
            Forked: lambda record: become(self._table(record.table_id), self._table(record.base_id)),
            Gone: lambda record: tenancy.decisions.remember(record.table_id, record.step_id, record.others),
            Kept: self._keep,
            Schedule: self._schedule,
            CaughtUp: lambda record: self._table(record.table_id).storage.catch_up(record.slots),
        }

    def take(self, record: RecordOf) -> None:
        """Do what a record says."""
        self._do[type(record)](record)

    def own(self) -> None:
        """The pages of the snapshot are there: tables answer with them."""
        for table in self._tenancy.tables.values():
            if not table.storage.num_lost:
                table.storage.own(table.view.placement)
            table.measure()

    def finish(self) -> None:
        """Go on where the life before ended: what was decided is applied, rounds of moves hold their tables; half a
        table that was being restored, or forked, is no table."""
        halves = [table for table in self._tenancy.tables.values() if table.restored or table.forked]
        for half in [table.table_id for table in halves]:
            self._tenancy.drop(half)
            self._tenancy.log.add(Dropped(half))
        for table_id, token in self._rounds.items():
            if (table := self._tenancy.tables.get(table_id)) is not None and token:
                table.rounds.join(token, PULL_LEASE_S)
        for table in self._tenancy.tables.values():
            try:
                table.apply_decided()
            except Exception as error:
                if not (isinstance(error, MempoolError) or out_of_memory(error)):
                    raise
                _LOG.warning("what was decided for table %r is applied later: %s", table.view.schema.name, error)

    def _attach(self, record: Attached) -> None:
        # A table that could not be filled was dropped, too, and may have been attached anew.
        table_id, tenancy = record.request.view.schema.table_id, self._tenancy
        tenancy.ended = tuple(each for each in tenancy.ended if each != table_id)
        table = tenancy.attach(record.request, base=base_of(tenancy, record.request))
        if record.request.mode == "initialise":
            _make_ready(table)
        while table.restored is None and table.forked is None and not table.fill():
            pass

    def _restore(self, record: Restored) -> None:
        table = self._table(record.table_id)
        if table.restored is None:
            raise DataLoss(
                f"table {record.table_id} was not attached to be restored, and pages of a checkpoint are there"
            )
        table.restored.take(record.batch)
        table.fill()

    def _view(self, record: Viewed) -> None:
        table = self._table(record.view.schema.table_id)
        if record.view.placement.epoch > table.epoch:
            self._rounds.pop(table.table_id, None)
        table.adopt(record.view)

    def _hold(self, record: Held) -> None:
        table, step_id = self._table(record.table_id), record.step_id
        entry = table.ledger.entry(step_id)
        over = max(entry.step, entry.dropped) if entry.generation == step_id.generation else 0
        if step_id.generation < entry.generation or step_id.step <= over:
            return
        # Only what is not held is kept: one that is here was dropped, as its lease ended, before this one came.
        table.updates.let_go(step_id, record.sequence)
        device = table.storage.device
        bags = record.update.bags
        weights = None if bags.weights is None else bags.weights.to(device)
        held = Bags(ids=bags.ids.to(device, table.storage.id_dtype), weights=weights, offsets=bags.offsets.to(device))
        update = HeldUpdate(held, record.update.grads.to(device), input_dim=record.update.input_dim)
        table.updates.hold(step_id, record.sequence, update)

    def _prepare(self, request: PrepareRequest) -> None:
        for part in request.parts:
            table, step_id = self._table(part.envelope.table_id), part.step_id
            if table.ledger.entry(step_id).generation > step_id.generation or table.ledger.has(step_id):
                continue
            sequences = tuple(sorted(part.sequences))
            self._require_held(table, step_id, sequences)
            # Sums are made anew where they are asked for: they come out as they were.
            prepared = PreparedStep(
                step_id=step_id,
                decider=(request.decider_table, request.decider_step),
                decider_at=self._tenancy.gate_of(request.decider_table),
                decided_here=self._tenancy.decides(request.decider_table),
                sequences=sequences,
                want_norm=False,
                squared_norm=0.0,
                finite=True,
                reductions=None,
            )
            table.updates.set_prepared(step_id, prepared)

    def _decide(self, record: Decided) -> None:
        first, *others = record.steps
        for step in record.steps:
            table = self._tenancy.tables.get(step.table_id)
            if table is None:  # it was dropped since
                continue
            if step.version:
                table.order.add(step)
            else:
                table.updates.decided_unnumbered(step.step_id)
        if others and (table := self._tenancy.tables.get(first.table_id)) is not None:
            table.others[first.version] = tuple(others)

    def _apply(self, record: Applied) -> None:
        step = record.step
        table = self._table(step.table_id)
        if step.version <= table.order.applied:
            return
        if step.version != table.order.applied + 1:
            raise DataLoss(
                f"version {step.version} of table {table.view.schema.name!r} follows version {table.order.applied} in "
                "the journal: what is between them is missing"
            )
        self._require_held(table, step.step_id, step.sequences)
        prepared = table.updates.prepared_step(step.step_id)
        if prepared is not None and prepared.sequences != step.sequences:
            table.updates.end_prepare(step.step_id)
        commits.apply(table.storage, table.updates, table.ledger, step, others=record.others)
        table.order.add(step)
        table.others.pop(step.version, None)
        table.order.did()

    def _over(self, record: Over) -> None:
        table = self._table(record.table_id)
        table.ledger.drop(record.step_id)
        table.updates.discard(record.step_id)

    def _write(self, record: Written) -> None:
        request = record.request
        storage = self._table(request.envelope.table_id).storage
        ids = validate.check_array(storage, request.array, request.ids)
        rows = validate.check_rows(storage, request.array, ids, request.blocks, request.rows)
        written(storage, request, ids, rows)

    def _count(self, record: Counted) -> None:
        request = record.request
        table = self._table(request.envelope.table_id)
        table.ledger.count_steps(request.set or 0, at_version=request.at_version)

    def _stage(self, record: Staged) -> None:
        table = self._table(record.batch.table_id)
        self._join(table, record.token)
        table.staging.put(record.batch)
        table.measure()

    def _stage_ledger(self, record: StagedLedger) -> None:
        table = self._table(record.table_id)
        self._join(table, record.token)
        table.staging.put_ledger(record.ledger, decisions=record.decisions)

    def _join(self, table: HostedTable, token: str) -> None:
        """What was staged for another round was dropped when that ended."""
        if self._rounds.get(table.table_id, token) != token:
            table.staging.drop()
        self._rounds[table.table_id] = token

    def _unstage(self, record: Unstaged) -> None:
        self._rounds.pop(record.table_id, None)
        table = self._table(record.table_id)
        table.staging.drop()
        table.measure()

    def _keep(self, record: Kept) -> None:
        if record.steps:
            self._table(record.steps[0].table_id).order.remember(record.steps)

    def _schedule(self, record: Schedule) -> None:
        storage = self._table(record.table_id).storage
        if storage.schedule is not None:
            storage.schedule.restore(record.first_step, record.steps, record.log_decays)

    def _stop(self, record: Stopped) -> None:
        schedule = self._table(record.table_id).storage.schedule
        if schedule is not None:
            schedule.stop(record.step)

    def _require_held(self, table: HostedTable, step_id: StepId, sequences: tuple[int, ...]) -> None:
        if missing := commits.missing(table.updates, step_id, sequences):
            raise DataLoss(
                f"updates {list(missing[:8])} of step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} "
                f"on table {table.view.schema.name!r} are not in the journal, and the step is"
            )

    def _table(self, table_id: int) -> HostedTable:
        table = self._tenancy.tables.get(table_id)
        if table is None:
            raise DataLoss(f"table {table_id} is not in the journal, and records of it are")
        return table
