"""Trainers of steps of two tables that give up and die, with any message of theirs again at any time: no half step.

Every answer comes within seconds, all owners end at one version, and hold what was decided, in the gate's order, once.
"""

import random
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from mempool.errors import StepConflict
from mempool.types import (
    CommitPart,
    CommitRequest,
    DiscardPart,
    DiscardRequest,
    PreparePart,
    PrepareRequest,
    ReadRowsRequest,
    StepId,
)
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
ANSWER_S = 5.0
STEPS = 6
LEASE_S = 10.0


class Clock:
    """Runs, and can be set forward."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Trainer:
    """One trainer, message by message.

    Args:
        tables: Of each of its steps; the first one's gate decides.
        dies: It is replaced now and then, by one that knows nothing of its step; else it ends Prepares now and then.

    Attributes:
        decided: The steps whose Commit was acknowledged.
        sent: All its messages: method, shard, request.
    """

    def __init__(self, group: str, tables: list[Driver], chance: random.Random, *, dies: bool) -> None:
        self.group, self.tables, self.dies = group, tables, dies
        self.decided: set[StepId] = set()
        self.sent: list[tuple[str, int, Any]] = []
        self._chance = chance
        self._step_id = StepId(group=group, rank=0, step=0)
        self._shards = sorted({shard for table in tables for shard in table.owners})

    def send(self, method: str, shard: int, request: Any, *, again: bool = False) -> Any:
        """The answer, which comes soon; None where the message was refused as late."""
        if not again:
            self.sent.append((method, shard, request))
        table = self.tables[0]
        try:
            return table.submit(getattr(table.host(shard), method)(request)).result(timeout=ANSWER_S)
        except StepConflict:
            return None

    def life(self) -> Iterator[None]:
        """Its messages, one after the other."""
        for _ in range(STEPS):
            self._next(generation=self._step_id.generation)
            yield from self._push()
            if not (yield from self._prepare()):
                yield from self._give_up()
                continue
            fate = self._chance.random()
            if fate < 0.2:
                yield from self._give_up()
                continue
            if self.dies and fate < 0.35:
                self._replace()
                continue
            committed = self.send("commit", self.tables[0].gate, self._commit_request())
            yield
            if committed is None:
                yield from self._give_up()
                continue
            self.decided.add(self._step_id)
            versions = {table.table_id: part.version for table, part in zip(self.tables, committed.parts, strict=True)}
            yield from self._tell(versions, until=0.4 if self.dies and fate < 0.6 else 1.0)
            if self.dies and fate < 0.6:
                self._replace()

    def _next(self, *, generation: int, step: int | None = None) -> None:
        step = self._step_id.step + 1 if step is None else step
        self._step_id = StepId(group=self.group, rank=0, step=step, generation=generation)

    def _replace(self) -> None:
        self._next(generation=self._step_id.generation + 1, step=0)

    def _push(self) -> Iterator[None]:
        for table in self.tables:
            for shard in table.owners:
                self.send("update", shard, update_of(table, shard, self._step_id))
                yield

    def _prepare_at(self, shard: int) -> bool:
        parts = tuple(
            PreparePart(envelope=table.envelope(shard), step_id=self._step_id, sequences=(0,))
            for table in self.tables
            if shard in table.owners
        )
        first = self.tables[0].table_id
        request = PrepareRequest(parts=parts, want_norm=False, decider_table=first, decider_step=self._step_id.step)
        reply = self.send("prepare", shard, request)
        return reply is not None and not any(part.missing for part in reply.parts)

    def _prepare(self) -> Generator[None, None, bool]:
        """Returns whether it is prepared everywhere."""
        for shard in self._chance.sample(self._shards, len(self._shards)):
            prepared = self._prepare_at(shard)
            yield
            if not prepared:
                return False
        return True

    def _discard(self, shard: int, *, keep_updates: bool) -> None:
        parts = tuple(
            DiscardPart(envelope=table.envelope(shard), step_id=self._step_id)
            for table in self.tables
            if shard in table.owners
        )
        self.send("discard", shard, DiscardRequest(parts=parts, keep_updates=keep_updates))

    def _give_up(self) -> Iterator[None]:
        """Some of its Discards are lost."""
        for shard in self._shards:
            if self._chance.random() < 0.6:
                self._discard(shard, keep_updates=not self.dies and self._chance.random() < 0.5)
                yield

    def _commit_request(self) -> CommitRequest:
        gate = self.tables[0].gate
        return CommitRequest(
            parts=tuple(
                CommitPart(
                    envelope=table.envelope(gate),
                    step_id=self._step_id,
                    lr=0.1,
                    grad_scale=1.0,
                    sequences=(0,) if table.gate == gate else (),
                )
                for table in self.tables
            )
        )

    def _tell(self, versions: dict[int, int], *, until: float) -> Iterator[None]:
        """The other owners, gates first; until: which part of them is reached."""
        to = [(table, shard) for table in self.tables for shard in table.owners]
        to.sort(key=lambda each: (each[0].gate != each[1], self._chance.random()))
        for table, shard in to:
            if self._chance.random() > until or (shard != table.gate and not versions[table.table_id]):
                continue
            while True:
                request = table.commit_request(
                    shard,
                    self._step_id.step,
                    [0],
                    decided=True,
                    version=versions[table.table_id],
                    group=self.group,
                    generation=self._step_id.generation,
                )
                reply = self.send("commit", shard, request)
                yield
                if reply is not None:
                    versions[table.table_id] = reply.parts[0].version
                    break
                self.send("update", shard, update_of(table, shard, self._step_id))
                self._prepare_at(shard)


def update_of(table: Driver, shard: int, step_id: StepId) -> Any:
    """The one update of a step, whichever shard or pool it is sent to."""
    seed = 100 * ord(step_id.group) + 10 * step_id.generation + step_id.step
    grads = GRADS * (1 + seed % 7)
    return table.update_request(
        shard, step_id.step, 0, grads, bags=make_bags(seed), want_weight_grad=False, step_id=step_id
    )


def order_of(table: Driver) -> list[StepId]:
    """What its gate has numbered."""
    engine: Any = table.host(table.gate)
    return [step.step_id for step in engine._tenancy.table(table.table_id).order.after(0)]


def values_of(make_driver: MakeDriver, table: Driver, order: list[StepId]) -> torch.Tensor:
    """What one shard makes of these steps."""
    one = make_driver().create(table.schema)
    for step_id in order:
        one.call(one.host(0).update(update_of(one, 0, step_id)))
        one.commit(step_id.step, [0], group=step_id.group, generation=step_id.generation, one_phase=True)
    return one.read()


def play(trainers: list[Trainer], chance: random.Random) -> None:
    """Their messages in any order, and some of them once more."""
    lives = {trainer: trainer.life() for trainer in trainers}
    while lives:
        trainer = chance.choice(list(lives))
        if next(lives[trainer], lives) is lives:
            del lives[trainer]
        for late in trainers:
            if late.sent and chance.random() < 0.3:
                method, shard, request = chance.choice(late.sent[-30:])
                late.send(method, shard, request, again=True)


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_again_each_step_is_everywhere_once_or_nowhere(
    make_driver: MakeDriver, seed: int, dies: bool
) -> None:
    chance, clock = random.Random(seed), Clock()
    first = make_driver(3, clock=clock, held_lease_s=LEASE_S).create(make_schema(), [[1, 2, 1]] * 7)
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"), "columns")
    trainers = [
        Trainer("a", [first, second], chance, dies=dies),
        Trainer("b", [second, first], chance, dies=dies),
        Trainer("c", [second], chance, dies=dies),
    ]
    play(trainers, chance)
    clock.ahead_s = LEASE_S + 1.0
    for table in (first, second):
        decided = {step_id for trainer in trainers if table in trainer.tables for step_id in trainer.decided}
        for shard in table.owners:
            reader = ReadRowsRequest(envelope=table.envelope(shard), array="values", ids=torch.arange(1))
            table.submit(table.host(shard).read_rows(reader)).result(timeout=ANSWER_S)
        freezes = [
            table.submit(table.host(shard).freeze(table.table_id, 20.0, token="t", lease_s=60.0))
            for shard in table.owners
        ]
        versions = [freeze.result(timeout=30) for freeze in freezes]
        order = order_of(table)
        assert (set(order), len(order)) == (decided, len(decided))
        assert versions == [len(decided)] * len(table.owners)
        assert [table.status(shard).updates_applied for shard in table.owners] == versions
        assert torch.equal(table.read(), values_of(make_driver, table, order))
    assert any(trainer.decided for trainer in trainers)
    second.drop()
