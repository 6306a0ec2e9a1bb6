"""All a shard has of one table: its view, storage, staged pages, held updates, ledger, and who waits for it.

Decides what a table answers at all (fences, freezes); the answers are made elsewhere.
"""

from collections.abc import Iterator

import torch

from mempool.agreement.doubt import Doubt
from mempool.agreement.ledger import AppliedLedger, over
from mempool.agreement.order import Order
from mempool.agreement.rounds_here import RoundsHere
from mempool.agreement.turns import Turns
from mempool.agreement.writes import SeenWrites
from mempool.errors import DataLoss, ShardUnavailable, StalePlacement
from mempool.shard.forks.forked import ForkedPages
from mempool.shard.pages.restored import RestoredPages
from mempool.shard.pages.staging import Staging
from mempool.shard.pages.storage import Storage
from mempool.shard.parking import (
    Behind,
    Parked,
    Waiting,
    commits_lost,
    held_off,
    is_late,
    no_updates,
    no_word,
    pages_lost,
)
from mempool.shard.steps import commits
from mempool.shard.steps.budget import Budget
from mempool.shard.steps.held import HeldUpdates, PreparedStep
from mempool.types import AttachTable, DecidedStep, Envelope, Ledger, ShardInfo, Stamp, StepId, TableView
from mempool.types.pool import merged
from mempool.types.running import Clock

PEERS_WAIT_S = 1.0
"""How long after another shard has asked it is taken to wait: it asks again sooner than that."""


class HostedTable:
    """One table on one shard.

    Attributes:
        pages, lost_pages: (row page, block)s and key pages that are here, and that are owned and not there.
        num_bytes: Of its pages: of those that are here or staged, or that initial values are being written to.
            All three are of the last ``measure``; any thread may read them.
        bytes_to_fill: Bytes of initial values that are still to be written; any thread may read it.
        restored: Where its pages are handed in, of a table that is restored. forked: Likewise, of a fork.
        fork_of: The id of the table that it was a fork of when it was made; None: of none. It may be gone.
        preparing: What is done before they are written, in words; "" for nothing. Any thread may read and write it.
        order: Of its steps, as far as it is known here.
        others: By version: of a decided step that waits to be applied, this table its first: its parts at the others.
        rounds: Which move's round holds it frozen. turns: Whose steps a freeze has held off.
        writes: Which writes to it were done, and which are over. num_writes: As stamps say.
        order_doubt, step_doubt, round_doubt: Who waits to hear of others what was decided.
        peers_wait_until_s: Other shards have asked for what this one has to ask for itself.
        unprepared: The next step in the order, where it is decided and not prepared here, and since when that is known.
        gate: The shard that numbers its steps, under the present view.
        pending: It is being made: it answers no client. Any thread may read it.
    """

    def __init__(
        self,
        request: AttachTable,
        *,
        info: ShardInfo,
        device: torch.device,
        budget: Budget,
        lease_s: float,
        clock: Clock,
        base: "HostedTable | None" = None,
    ) -> None:
        self.info, self.view = info, request.view
        self.ledger = AppliedLedger(request.ledger)
        schema, version, keeper = request.view.schema, self.ledger.version, budget.keeper
        self.storage = Storage(schema, shard=info.shard, device=device, version=version, clock=clock, keeper=keeper)
        self.staging = Staging(self.storage)
        self.updates = HeldUpdates(budget=budget, lease_s=lease_s, clock=clock)
        self.order = Order(self.ledger.version)
        self.others: dict[int, tuple[DecidedStep, ...]] = {}
        self.rounds = RoundsHere(clock)
        self.turns, self.writes, self.num_writes = Turns(), SeenWrites(), 1
        self.order_doubt, self.step_doubt, self.round_doubt = Doubt(), Doubt(), Doubt()
        self._read_for: str | None = None  # the round whose destinations have read pages here
        self.peers_wait_until_s = float("-inf")
        self.unprepared: tuple[DecidedStep, float] | None = None
        self.gate, self.pending, self.lookups = min(request.view.placement.shards), request.pending, 0
        self._clock, self._lease_s = clock, lease_s
        self._filling: Iterator[int] | None = None
        self._filling_bytes, self.bytes_to_fill, self.preparing = 0, 0, ""
        self._waiting_for_thaw, self._waiting_for_rest = Waiting(), Waiting()
        self._waiting_for_turns, self._waiting_for_news = Waiting(), Waiting()
        placement, ledger = request.view.placement, request.ledger or Ledger()
        self.restored = RestoredPages(self.staging, placement, ledger) if request.mode == "restore" else None
        self.fork_of = None if request.fork is None else request.fork.table_id
        self.forked = None if base is None else ForkedPages(self.storage, base.storage, placement)
        if request.mode in ("initialise", "restore", "fork"):
            self._filling = self.restored or self.forked or self.storage.initialise(placement)
            self._filling_bytes = self.bytes_to_fill = self.storage.initial_bytes(placement)
        elif request.mode == "lost":
            self.storage.own(placement)
            self.storage.lose_all()
        self.pages = self.lost_pages = self.num_bytes = 0
        self.measure()

    @property
    def table_id(self) -> int:
        return self.view.schema.table_id

    @property
    def epoch(self) -> int:
        return self.view.placement.epoch

    def measure(self) -> None:
        """Count pages and bytes anew: to be called by whoever changed which pages are here."""
        self.pages, self.lost_pages = self.storage.num_pages, self.storage.num_lost
        self.num_bytes = max(self.storage.num_bytes + self.staging.num_bytes, self._filling_bytes)

    @property
    def frozen(self) -> bool:
        """Whether a move's round holds it."""
        return self.rounds.token is not None

    @property
    def is_gate(self) -> bool:
        """Whether this shard numbers its steps."""
        return self.gate == self.info.shard

    @property
    def gate_info(self) -> ShardInfo | None:
        """Where that shard is; None where the view does not say."""
        return next((info for info in self.view.shards if info.shard == self.gate), None)

    @property
    def stamp(self) -> Stamp:
        shard, incarnation = self.info.shard, self.info.incarnation
        epoch, version, writes = self.view.placement.epoch, self.ledger.version, self.num_writes
        return Stamp(shard=shard, incarnation=incarnation, epoch=epoch, table_version=version, writes=writes)

    def fill(self) -> bool:
        """Write a piece of the initial values. Returns whether all are there."""
        if self._filling is not None:
            written = next(self._filling, None)
            if written is None:
                self._filling, self._filling_bytes, self.bytes_to_fill, self.restored, self.forked = (
                    None,
                    0,
                    0,
                    None,
                    None,
                )
            else:  # what is not done has something left
                self.bytes_to_fill = max(1, self.bytes_to_fill - written)
        self.measure()
        return self._filling is None

    def check(self, envelope: Envelope, *, whole: bool = True) -> None:
        """Refuse a request that was planned for another placement, or that lost pages cannot answer (``whole``).

        Raises:
            ShardUnavailable: The table is still being made.
            StalePlacement: Another epoch.
            DataLoss: Pages of the table are lost here.
            Behind: The next epoch, whose view this shard is about to be told.
        """
        if self.rounds.token is not None:
            self.let_go()
        if self.pending or self._filling is not None:
            self.check_ready()
        epoch = self.view.placement.epoch
        if envelope.epoch != epoch:
            if self.frozen and envelope.epoch == epoch + 1:
                raise Behind(self.park_until_thaw)
            raise StalePlacement(
                f"the request was planned for epoch {envelope.epoch} of table {self.view.schema.name!r}; shard "
                f"{self.info.shard} is at epoch {epoch}",
                shard=self.info.shard,
                address=self.info.address,
            )
        if whole and self.lost_pages:
            self.check_whole()

    def require_newest(self, step_id: StepId) -> None:
        """Raises StepConflict where a later generation of the step's rank has committed, or holds anything here."""
        self.updates.require_newest(step_id)
        newest = self.ledger.entry(step_id).generation
        if step_id.generation < newest:
            raise over(step_id, newest)

    def is_decided(self, step_id: StepId) -> bool:
        """Whether it, or a later step of its rank, is known to be decided. Raises StepConflict where it is over."""
        return self.ledger.has(step_id) or self.order.find(step_id) is not None

    @property
    def is_settled(self) -> bool:
        """Whether no step is in doubt, nor a move under way: what has been applied is all there is."""
        return self.rounds.token is None and self.order.next() is None and not self.updates.any_prepared

    def lacks(self, envelope: Envelope, *, waits_since_s: float) -> Parked | None:
        """Where the client has seen a later version than is here: what to wait for.

        Raises:
            DataLoss: The gate does not know of that version: commits were lost.
        """
        if envelope.table_version <= self.order.applied:
            return None
        self.apply_decided()  # what failed for want of memory is tried again
        if envelope.table_version <= self.order.applied:
            return None
        self._check_prepared()
        known = envelope.table_version <= self.order.numbered
        if not known and (self.is_gate or self.order_doubt.covers(waits_since_s)):
            raise commits_lost(self.view, self.order.applied, seen=envelope.table_version, here=self.info)
        return self.park_for_order(waits_since_s)

    def learn(self, version: int, steps: tuple[DecidedStep, ...]) -> None:
        """What the gate says has been decided, up to that version: kept in order, as far as it can be applied."""
        whole = self.owns and not self.lost_pages
        refused = self.order.learn(version, steps, prepared=self.updates.is_prepared if whole else lambda _: True)
        known = self.unprepared
        if refused is None or known is None or refused.version != known[0].version:
            self.unprepared = None if refused is None else (refused, self._clock())

    def _check_prepared(self) -> None:
        """Raises ShardUnavailable where a decided step is not prepared here, and its trainer has not come for it."""
        if self.unprepared is None or self.unprepared[0].version <= self.order.applied:
            return
        step, since_s = self.unprepared
        if self._clock() - since_s > self._lease_s:
            raise no_updates(step, table=self.view.schema.name, here=self.info)

    def in_doubt(self, *, waits_since_s: float) -> Parked | None:
        """Where a step may be acknowledged by now that is not applied here: what a reader has to wait for.

        Raises as ``apply_decided`` does.
        """
        if self.order.next() is not None:
            self.apply_decided()
        prepared = self.updates.doubtful(waits_since_s)
        if prepared is not None:
            return self.park_for_steps(prepared, waits_since_s)
        read = self.frozen and self._read_for == self.rounds.token and not self.is_gate
        return self._park_for_round(waits_since_s) if read and not self.round_doubt.covers(waits_since_s) else None

    def read_by_round(self) -> None:
        """Pages are read for the round that holds the table: it may be decided before this shard hears of it, and steps
        without this shard be acknowledged. Readers who come from now on have to know."""
        if self._read_for != self.rounds.token:
            self._read_for = self.rounds.token
            self.round_doubt.settled(self._clock())

    def _park_for_round(self, since_s: float) -> Parked:
        if is_late(since_s, self._clock()):
            raise self._no_word(f"whether round {self.rounds.token!r} of a move is decided", self.gate_info)
        self.round_doubt.wait(self._clock(), at_once=True)
        return self._waiting_for_news.park(since_s=since_s, in_doubt=True)

    def park_for_order(self, since_s: float) -> Parked:
        """For a request, of that time, that comes before what it builds on.

        Raises:
            ShardUnavailable: It has waited for long enough.
        """
        if is_late(since_s, self._clock()):
            self._check_prepared()
            raise self._no_word(f"what its version {self.order.applied + 1} is", self.gate_info)
        self.order_doubt.wait(self._clock())
        return self._waiting_for_news.park(since_s=since_s, in_doubt=True)

    def park_for_steps(self, prepared: PreparedStep, since_s: float) -> Parked:
        """For a request, of that time, that must know what became of a prepared step.

        Raises:
            ShardUnavailable: It has waited for long enough.
        """
        if is_late(since_s, self._clock()):
            who = prepared.step_id
            what = f"whether step {who.step} of rank {who.rank} of group {who.group!r}, prepared here, is decided"
            by = prepared.decider_at
            if by is None or by.shard == self.info.shard:  # decided here, and numbered elsewhere
                by = self.gate_info
            raise self._no_word(what, by)
        self.step_doubt.wait(self._clock(), at_once=self.updates.unwanted(prepared.step_id))
        return self._waiting_for_news.park(since_s=since_s, in_doubt=True)

    def _no_word(self, what: str, by: ShardInfo | None) -> ShardUnavailable:
        return no_word(f"of table {self.view.schema.name!r} {what}", here=self.info, late=by)

    def apply_decided(self) -> None:
        """Apply what is decided and whose turn it is. Raises as ``commits.apply`` does: the rest waits."""
        applied = self.order.applied
        try:
            while (step := self.order.next()) is not None:
                commits.apply(self.storage, self.updates, self.ledger, step, others=self.others.get(step.version, ()))
                self.others.pop(step.version, None)
                self.order.did()
                self.turns.served(step.step_id)
        except DataLoss:
            self.measure()
            raise
        finally:
            if self.order.applied > applied:
                self.steps_changed()

    def check_ready(self) -> None:
        """Raises ShardUnavailable while the table is being made: here, or on other shards."""
        name, number = self.view.schema.name, self.info.shard
        if self._filling is not None:
            what = f"shard {number} is still writing the initial values of table {name!r}"
        elif self.pending:
            what = f"table {name!r} is being made: shard {number} has not heard yet that all shards have their pages"
        else:
            return
        raise ShardUnavailable(f"{what}; try again in a moment", shard=number, address=self.info.address)

    def check_whole(self) -> None:
        """Raises DataLoss where pages are lost."""
        if self.lost_pages:
            raise pages_lost(self.view, self.lost_pages, here=self.info)

    def apply_now(self, step: DecidedStep) -> None:
        """Decide and apply a step of the next version in one, where nothing waits and nobody else has a part in it.

        Raises as ``commits.apply`` does; nothing is decided where that changed nothing.
        """
        try:
            commits.apply(self.storage, self.updates, self.ledger, step)
        except DataLoss:
            self.measure()
            raise
        self.order.did_at_once(step)
        self.turns.served(step.step_id)
        self.steps_changed()

    @property
    def owns(self) -> bool:
        """Whether any page of it is this shard's."""
        return self.pages + self.lost_pages > 0

    @property
    def owns_all(self) -> bool:
        """Whether every page of it is."""
        return self.view.placement.shards == (self.info.shard,)

    def park_until_thaw(self, since_s: float) -> Parked:
        """For a request, of that time, that a freeze holds off.

        Raises:
            ShardUnavailable: It has waited for long enough.
        """
        if self.held_off_for_long(since_s):
            raise held_off(self.view.schema.name, self.rounds.token, here=self.info)
        return self._waiting_for_thaw.park(since_s=since_s)

    def held_off_for_long(self, since_s: float) -> bool:
        """Whether a request of that time has waited long enough for a freeze to end."""
        return is_late(since_s, self._clock())

    def park_for_turns(self) -> Parked | None:
        """For a freeze, where steps that the last one held off go first. The gate, frozen first, speaks for all."""
        ends_s = self.turns.ends_s(now_s := self._clock())
        if ends_s is None or not self.is_gate:
            return None
        return self._waiting_for_turns.park(since_s=now_s, longest_s=ends_s - now_s)

    def park_until_rest(self) -> Parked:
        """For a freeze that waits for prepared steps."""
        self.step_doubt.wait(self._clock())
        if self.order.any_waiting:
            self.order_doubt.wait(self._clock())
        return self._waiting_for_rest.park(in_doubt=True)

    @property
    def rest_waited_for(self) -> bool:
        """Whether a freeze waits for prepared steps."""
        return bool(self._waiting_for_rest)

    @property
    def waited_for(self) -> bool:
        """Whether any request waits for it."""
        return bool(self._waiting_for_news or self._waiting_for_rest or self._waiting_for_thaw)

    def steps_changed(self) -> None:
        """Steps were applied, dropped, or are known to be undecided: whoever waits for that looks again."""
        self._waiting_for_news.wake()
        if not self.updates.any_prepared and not self.order.any_waiting:
            self._waiting_for_rest.wake()
        if self._waiting_for_turns and self.turns.ends_s(self._clock()) is None:
            self._waiting_for_turns.wake()

    def peers_wait(self) -> None:
        """Another shard has asked for the order, and a step may belong into it that this one has not heard of."""
        self.step_doubt.wait(self._clock())
        self.peers_wait_until_s = self._clock() + PEERS_WAIT_S

    def end_doubts(self) -> None:
        """Where nobody waits to hear what was decided, nothing is asked."""
        waits = bool(self._waiting_for_news or self._waiting_for_rest)
        peers_wait = self._clock() < self.peers_wait_until_s
        if not (self.updates.any_prepared and (waits or peers_wait or self.updates.silent())):
            self.step_doubt.ends()
        if not (waits or peers_wait or self.order.lacks):
            self.order_doubt.ends()
        if not (waits and self.frozen):
            self.round_doubt.ends()

    def expire(self) -> None:
        """Drop what ranks hold that have fallen silent, and, at the gate, end a round whose controller has.

        Elsewhere such a round waits until the gate was asked: what it decided nobody else may undo.
        """
        self.updates.expire()
        self.storage.moments.expire(self._clock())
        if self.updates.silent():
            self.step_doubt.wait(self._clock())
        if self.order.lacks:
            self.order_doubt.wait(self._clock())
        self.let_go()
        self._waiting_for_news.wake_late(self._clock())
        self._waiting_for_thaw.wake_late(self._clock())

    def let_go(self) -> None:
        """At the gate: end the round whose lease has ended."""
        if self.rounds.lapsed and self.is_gate:
            self.end_round()

    def end_round(self) -> None:
        """Whichever round holds the table is over, undecided."""
        if self.rounds.end():
            self.thaw()

    def thaw(self) -> None:
        """The freeze has ended: what was staged is dropped, and those who wait go on."""
        self.turns.thawed(self._clock())
        self.staging.drop()
        self.measure()
        self.go_on()

    def go_on(self) -> None:
        """Those that were held off look again."""
        self._waiting_for_thaw.wake()

    def adopt(self, view: TableView) -> bool:
        """Take over a view. Returns whether pages changed hands. Raises Internal as ``Staging.adopt`` does, and as
        ``apply_decided``."""
        if view.placement.epoch < self.epoch:
            return False
        if view.placement.epoch == self.epoch:
            self.view = merged(self.view, view)
            return False
        self.check_ready()
        if self.order.next() is not None:
            self.apply_decided()
        arrived, decisions = self.staging.ledger, self.staging.decisions
        self.staging.adopt(view.placement, version=self.ledger.version)
        if self.ledger.adopt(arrived):
            self.storage.begin_at(self.ledger.version)
            self.order.moved_to(self.ledger.version)
        self.ledger.learn_others(decisions)
        self.unprepared, self.view, self.gate = None, merged(self.view, view), min(view.placement.shards)
        self.measure()
        self.updates.clear()
        self.writes.clear()
        self.rounds.end()
        self.turns.thawed(self._clock())
        self.steps_changed()
        self.go_on()
        return True

    def shrink(self) -> None:
        """Give back memory that pages have left, once it is said that they have. Rows move: no step is prepared yet."""
        self.storage.shrink_arenas()
        self.measure()

    def close(self) -> None:
        """Give back what is held, and let those who wait find out. Memory that forks share is theirs from here on: what
        is read of it as it was is read no more."""
        self.storage.on_change("its table was dropped")
        self.updates.clear()
        self.storage.moments.end("the table was dropped")
        self.storage.close()
        for those in (self._waiting_for_thaw, self._waiting_for_rest, self._waiting_for_turns, self._waiting_for_news):
            those.wake()
