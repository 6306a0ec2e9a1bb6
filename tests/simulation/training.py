"""A trainer's sessions on the tables of a pool, and what it pushed and was told of, in the history's words."""

from collections.abc import Sequence
from typing import Any

from mempool.client.training.commitment import Commitment
from mempool.client.training.coordinator import Coordinator
from mempool.client.training.session import Session
from mempool.types import TableView
from mempool.types.bags import Bags
from tests.simulation.history import Acknowledged, History, Update
from tests.simulation.oracle import Content
from tests.simulation.processes import Trainer


class Training:
    """One trainer's process.

    Args:
        trainer: Its router and loop.
        group: Its name in ledgers.
        history: Is told what every update consists of.
        generation: How often this group has gone back to an earlier step.
    """

    def __init__(self, trainer: Trainer, *, group: str, history: History, generation: int = 0) -> None:
        self.timeout_s = 30.0
        self._trainer = trainer
        self._group = group
        self.generation = generation
        self._history = history
        self._coordinator = Coordinator(trainer.router)
        self._sessions: dict[int, Session] = {}
        self._pending: dict[int, list[Update]] = {}

    async def gather(self, view: TableView, bags: Bags, *, remember: bool) -> Any:
        """The record of a lookup."""
        _, record = await self._session(view).gather(bags, remember=remember, timeout_s=self.timeout_s)
        return record

    async def push(self, view: TableView, record: Any, content: Content, *, hold: bool, want: bool) -> None:
        """One update. One that fails is no part of a step."""
        table_id, session = view.schema.table_id, self._session(view)
        update = (table_id, self._group, self.generation, session.book._next_sequence)
        self._history.contents[update] = content
        pending = self._pending[table_id]
        if hold:
            pending.append(update)
        try:
            await session.update(record, content.grads, hold=hold, want_weight_grad=want, timeout_s=self.timeout_s)
        except BaseException:
            if update in pending:
                pending.remove(update)
            raise

    async def prepare(self, views: Sequence[TableView], *, want_norm: bool) -> None:
        sessions = [self._session(view) for view in views]
        await self._coordinator.prepare(sessions, want_norm=want_norm, timeout_s=self.timeout_s)

    async def commit(self, views: Sequence[TableView], *, lr: float, grad_scale: float) -> bool:
        """Commit all that is pending on these tables, together."""
        sessions = [self._session(view) for view in views]
        commitments = [Commitment(session, lr=lr, grad_scale=grad_scale) for session in sessions]
        try:
            await self._coordinator.commit(commitments, timeout_s=self.timeout_s)
        finally:
            acknowledged = self._ended()
            if acknowledged:
                now_s = self._trainer.loop.scheduler.now_s
                self._history.acknowledged.append(Acknowledged(tuple(acknowledged), now_s))
        dropped = self._history.dropped
        left = [session.pending for session in sessions if session.pending and session.table_id not in dropped]
        if left:
            self._history.say(f"{self._group}: {left} updates are pending after a commit of all that was")
        return True

    async def discard(self, views: Sequence[TableView]) -> None:
        """Drop what is pending; what is on its way to be decided stays."""
        try:
            await self._coordinator.discard([self._session(view) for view in views], timeout_s=self.timeout_s)
        finally:
            self._history.discarded.update(self._ended())

    def _ended(self) -> list[Update]:
        """Updates that are pending no more, of all tables, since this was asked last."""
        ended: list[Update] = []
        for table_id, session in self._sessions.items():
            book = session.book
            left = set(book.open.updates) | (set() if book.closing is None else set(book.closing.updates))
            ended += [update for update in self._pending[table_id] if update[3] not in left]
            self._pending[table_id] = [update for update in self._pending[table_id] if update[3] in left]
        return ended

    async def close(self) -> None:
        """What is decided reaches every owner."""
        await self._coordinator.close(timeout_s=self.timeout_s)

    def _session(self, view: TableView) -> Session:
        table_id = view.schema.table_id
        if table_id not in self._sessions:
            self._trainer.api._learned(view)  # as one that has asked for it
            self._trainer.router.adopt(view)
            self._sessions[table_id] = Session(
                self._trainer.router,
                table_id=table_id,
                group=self._group,
                generation=self.generation,
                coordinator=self._coordinator,
            )
            self._pending[table_id] = []
        return self._sessions[table_id]
