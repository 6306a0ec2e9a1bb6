"""A real ``Table`` whose session is a tensor in this process: no shards, no loop, torch's own operations."""

from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mempool.client import Bags, Prepared, Seen, SessionCounters, Table
from mempool.config import SGD, TableConfig, resolve


@dataclass
class Remembered:
    """What the stand-in keeps of a gather for its updates."""

    bags: Bags
    seen: Seen
    remembered_by: tuple[()] = ()


class LocalCoordinator:
    """One after another what the pool's does together.

    Attributes:
        calls: Of each call its name and how many tables it was of, the newest last.
        group, found, alone: It is of no group.
    """

    def __init__(self) -> None:
        self.group = self.found = None
        self.alone = False
        self.calls: deque[tuple[str, int]] = deque(maxlen=100)

    async def prepare(
        self, sessions: Sequence["LocalSession"], *, want_norm: bool, norm_order: float = 0.0
    ) -> list[Prepared | None]:
        self.calls.append(("prepare", len(sessions)))
        return [await session.prepare(want_norm=want_norm, norm_order=norm_order) for session in sessions]

    async def commit(self, commitments: Sequence[Any]) -> list[int]:
        self.calls.append(("commit", len(commitments)))
        return [await each.session.commit(lr=each.lr, grad_scale=each.grad_scale) for each in commitments]

    async def discard(self, sessions: Sequence["LocalSession"]) -> list[int]:
        self.calls.append(("discard", len(sessions)))
        return [await session.discard() for session in sessions]

    def notices(self) -> list[str]:
        return []


POOL = LocalCoordinator()


class LocalSession:
    """Values [num_slots, value_dim], updates held as they come, plain SGD at commit.

    Attributes:
        remembered: What each gather was told.
        calls: Every prepare, commit and discard that had something to do, in order: its name and arguments.
    """

    def __init__(self, num_slots: int, value_dim: int) -> None:
        generator = torch.Generator("cpu").manual_seed(3)
        self.values = torch.randn(num_slots, value_dim, generator=generator, dtype=torch.float32, device="cpu")
        self.counters = SessionCounters()
        self.coordinator = POOL
        self.remembered: list[bool] = []
        self.calls: list[tuple[Any, ...]] = []
        self.fail_next_commit: Exception | None = None
        self._held: list[tuple[Bags, Tensor]] = []

    @property
    def pending(self) -> int:
        return len(self._held)

    @property
    def known_version(self) -> int | None:
        return self.counters.steps_committed or None

    @property
    def commits(self) -> int:
        return self.counters.steps_committed

    @property
    def pending_bytes(self) -> int:
        return sum(bags.num_bytes + grads.nbytes for bags, grads in self._held)

    @property
    def nothing_to_drop(self) -> bool:
        return not self._held

    def gradient(self) -> Tensor:
        """The gradient of what is held, [num_slots, value_dim]."""
        total = torch.zeros_like(self.values)
        for bags, grads in self._held:
            rows = grads.repeat_interleave(bags.offsets.diff(), dim=0)
            total.index_add_(0, bags.ids, rows * _weights(bags))
        return total

    def gather_at_once(self, bags: Bags, **_: object) -> None:
        """There is no such way here."""

    def left_s(self, _: float) -> None:
        """There is no deadline."""

    def weight_grad(self, record: Remembered, grads: Tensor, *, hold: bool, run: Callable[[Any], Any]) -> Any:
        return run(self.update(record, grads, hold=hold, want_weight_grad=True))

    async def gather(self, bags: Bags, *, remember: bool, **_: object) -> tuple[Tensor, Remembered]:
        self.remembered.append(remember)
        bag_numbers = torch.arange(bags.num_bags, device="cpu").repeat_interleave(bags.offsets.diff())
        sums = torch.zeros(bags.num_bags, self.values.shape[1], dtype=torch.float32, device="cpu")
        sums.index_add_(0, bag_numbers, self.values[bags.ids] * _weights(bags))
        version = self.counters.steps_committed
        return sums, Remembered(bags, Seen(epoch=1, oldest_version=version, newest_version=version))

    async def update(self, record: Remembered, grads: Tensor, *, hold: bool, want_weight_grad: bool) -> Tensor | None:
        if hold:
            self._held.append((record.bags, grads))
            self.counters.updates_pushed += 1
        rows = grads.repeat_interleave(record.bags.offsets.diff(), dim=0)
        return (rows * self.values[record.bags.ids]).sum(dim=1) if want_weight_grad else None

    async def prepare(self, *, want_norm: bool, norm_order: float = 0.0) -> Prepared | None:
        if not self._held:
            return None
        self.calls.append(("prepare", want_norm))
        gradient = self.gradient().double()
        return Prepared(
            updates=len(self._held),
            squared_norm=float(gradient.square().sum()),
            finite=bool(gradient.isfinite().all()),
            norm=float(torch.linalg.vector_norm(gradient, norm_order)) if norm_order else 0.0,
        )

    async def commit(self, *, lr: float, grad_scale: float) -> int:
        if not self._held:
            return 0
        if self.fail_next_commit is not None:
            error, self.fail_next_commit = self.fail_next_commit, None
            raise error
        self.calls.append(("commit", lr, grad_scale))
        self.values -= lr * grad_scale * self.gradient()
        self.counters.steps_committed += 1
        return self._drop()

    async def discard(self) -> int:
        if self._held:
            self.calls.append(("discard",))
            self.counters.updates_discarded += len(self._held)
        return self._drop()

    def _drop(self) -> int:
        dropped = len(self._held)
        self._held.clear()
        return dropped


def local_table(*, num_slots: int = 81, value_dim: int = 7, name: str = "facts", lr: float = 0.5) -> Table:
    schema = resolve(TableConfig(name=name, num_slots=num_slots, value_dim=value_dim, optimizer=SGD(lr)))
    session = LocalSession(num_slots, value_dim)
    return Table(schema, router=None, session=session, run=_run, begin=None)  # type: ignore[arg-type]


def session_of(table: Table) -> LocalSession:
    session = table._session
    assert isinstance(session, LocalSession)
    return session


def _weights(bags: Bags) -> Tensor:
    return (
        torch.ones(bags.num_pairs, 1, dtype=torch.float32, device="cpu")
        if bags.weights is None
        else bags.weights[:, None]
    )


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the stand-in's calls wait for nothing")
