"""All a shard has of one table: its view, storage, staged pages, held updates, ledger, and who waits for it.

Decides what a table answers at all (fences, freezes); the answers are made elsewhere.
"""

import asyncio
from collections.abc import Awaitable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import torch

from mempool.errors import DataLoss, ShardUnavailable, StalePlacement
from mempool.shard.pages.staging import Staging
from mempool.shard.pages.storage import Storage
from mempool.shard.steps.budget import Budget
from mempool.shard.steps.held import HeldUpdates
from mempool.shard.steps.ledger import AppliedLedger
from mempool.types import AttachTable, Envelope, ShardInfo, Stamp, StepId, TableStatus, TableView


class Parked:
    """Not an answer: the job is to be run again, from its start, when ``woken`` is done."""

    def __init__(self) -> None:
        self.woken: Future[None] = Future()

    def wake(self) -> None:
        """Let the waiter go on; one that was cancelled is passed over."""
        if self.woken.set_running_or_notify_cancel():
            self.woken.set_result(None)

    def wait(self) -> Awaitable[None]:
        """Done when ``wake`` was called. Cancelling it says that nobody waits."""
        return asyncio.wrap_future(self.woken)


class HostedTable:
    """One table on one shard.

    Attributes:
        pages, lost_pages: (row page, block)s and key pages that are here, and that are owned and not there.
        num_bytes: Of its pages: of those that are here or staged, or that initial values are being written to.
            All three are of the last ``measure``; any thread may read them.
        bytes_to_fill: Bytes of initial values that are still to be written; any thread may read it.
        preparing: What is done before they are written, in words; "" for nothing. Any thread may read and write it.
    """

    def __init__(
        self, request: AttachTable, *, info: ShardInfo, device: torch.device, budget: Budget, lease_s: float
    ) -> None:
        self.info = info
        self.view = request.view
        self.ledger = AppliedLedger(request.ledger)
        self.storage = Storage(request.view.schema, shard=info.shard, device=device, version=self.ledger.version)
        self.staging = Staging(self.storage)
        self.updates = HeldUpdates(budget=budget, lease_s=lease_s)
        self.frozen = False
        self.lookups = 0
        self._filling: Iterator[int] | None = None
        self._filling_bytes = self.bytes_to_fill = 0
        self.preparing = ""
        self._waiting_for_thaw: list[Parked] = []
        self._waiting_for_decisions: list[Parked] = []
        if request.mode == "initialise":
            self._filling = self.storage.initialise(request.view.placement)
            self._filling_bytes = self.bytes_to_fill = self.storage.initial_bytes(request.view.placement)
        elif request.mode == "lost":
            self.storage.own(request.view.placement)
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
    def stamp(self) -> Stamp:
        return Stamp(
            shard=self.info.shard,
            incarnation=self.info.incarnation,
            epoch=self.epoch,
            table_version=self.ledger.version,
        )

    def fill(self) -> bool:
        """Write a piece of the initial values. Returns whether all are there."""
        if self._filling is not None:
            written = next(self._filling, None)
            if written is None:
                self._filling, self._filling_bytes, self.bytes_to_fill = None, 0, 0
            else:  # what is not done has something left
                self.bytes_to_fill = max(1, self.bytes_to_fill - written)
        self.measure()
        return self._filling is None

    def check(self, envelope: Envelope) -> None:
        """Refuse a request that was planned for another placement, or that lost pages cannot answer.

        Raises:
            ShardUnavailable: The table is still being made.
            StalePlacement: Another epoch.
            DataLoss: Pages of the table are lost here, or commits that the client has seen acknowledged.
        """
        self.check_ready()
        if envelope.epoch != self.epoch:
            raise StalePlacement(
                f"the request was planned for epoch {envelope.epoch} of table {self.view.schema.name!r}; shard "
                f"{self.info.shard} is at epoch {self.epoch}",
                shard=self.info.shard,
                address=self.info.address,
            )
        self.check_whole()
        if envelope.table_version > self.ledger.version:
            raise DataLoss(
                f"shard {self.info.shard} has table {self.view.schema.name!r} at version {self.ledger.version}, and "
                f"this client has seen version {envelope.table_version} acknowledged: commits were lost here. Drop "
                f"the table (pool.drop_table({self.view.schema.name!r})), make it again and write back what you saved",
                shard=self.info.shard,
                address=self.info.address,
            )

    def check_ready(self) -> None:
        """Raises ShardUnavailable while initial values are being written."""
        if self._filling is not None:
            raise ShardUnavailable(
                f"shard {self.info.shard} is still writing the initial values of table {self.view.schema.name!r}; "
                "try again in a moment",
                shard=self.info.shard,
                address=self.info.address,
            )

    def check_whole(self) -> None:
        """Raises DataLoss where pages are lost."""
        if self.lost_pages:
            raise DataLoss(
                f"shard {self.info.shard} (incarnation {self.info.incarnation}) lost {self.lost_pages} pages of table "
                f"{self.view.schema.name!r}: it restarted without them, or a commit failed half way. They are not "
                f"replaced by initial values. Drop the table (pool.drop_table({self.view.schema.name!r})), make it "
                "again and write back what you saved of it; other tables go on",
                shard=self.info.shard,
                address=self.info.address,
            )

    def holds_off(self, step_id: StepId) -> bool:
        """Whether a freeze holds off preparing this step. One that is prepared already goes on to its end."""
        self.updates.touch(step_id)
        self.updates.give_up_older(step_id)
        self.steps_changed()
        prepared = self.updates.prepared_step(step_id)
        return self.frozen and (prepared is None or prepared.step != step_id.step)

    def park_until_thaw(self) -> Parked:
        """For a request that a freeze holds off."""
        return _park(self._waiting_for_thaw)

    def park_until_decided(self) -> Parked:
        """For a freeze that waits for prepared steps."""
        return _park(self._waiting_for_decisions)

    def steps_changed(self) -> None:
        """A prepared step was decided, or dropped: a freeze may go on."""
        if self._waiting_for_decisions and not self.updates.any_prepared:
            _wake(self._waiting_for_decisions)

    def expire(self) -> None:
        """Drop what ranks hold that have fallen silent; sooner while a freeze waits for them."""
        self.updates.expire(in_the_way=self.frozen)
        self.steps_changed()

    def thaw(self) -> None:
        """End the freeze; those who wait go on."""
        self.frozen = False
        _wake(self._waiting_for_thaw)

    def adopt(self, view: TableView) -> bool:
        """Take over a view. Returns whether pages changed hands. Raises Internal as ``Staging.adopt`` does."""
        if view.placement.epoch < self.epoch:
            return False
        if view.placement.epoch == self.epoch:
            self.view = replace(self.view, shards=view.shards)
            return False
        self.check_ready()
        arrived = self.staging.ledger
        self.staging.adopt(view.placement, version=self.ledger.version)
        if self.ledger.adopt(arrived):
            self.storage.begin_at(self.ledger.version)
        self.view = view
        self.measure()
        self.updates.clear()
        self.steps_changed()
        self.thaw()
        self.storage.shrink_arenas()  # last: all is adopted, should there be no memory for it
        self.measure()
        return True

    def close(self) -> None:
        """Give back what is held, and let those who wait find out."""
        self.updates.clear()
        _wake(self._waiting_for_thaw)
        _wake(self._waiting_for_decisions)

    def status(self) -> TableStatus:
        """The table at a glance; any thread may ask."""
        return TableStatus(
            table_id=self.table_id,
            name=self.view.schema.name,
            epoch=self.epoch,
            version=self.ledger.version,
            pages=self.pages,
            lost_pages=self.lost_pages,
            num_bytes=self.num_bytes,
            updates_held=len(self.updates),
            updates_applied=self.ledger.updates_applied,
            lookups=self.lookups,
            frozen=self.frozen,
            bytes_to_fill=self.bytes_to_fill,
            preparing=self.preparing,
        )


def _park(waiting: list[Parked]) -> Parked:
    parked = Parked()
    if len(waiting).bit_count() == 1:  # at 1, 2, 4, ...: what is left out below costs little
        waiting[:] = [other for other in waiting if not other.woken.cancelled()]
    waiting.append(parked)
    return parked


def _wake(waiting: list[Parked]) -> None:
    for parked in waiting:
        parked.wake()
    waiting.clear()
