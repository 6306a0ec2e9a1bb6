"""Making a table: for as long as it moves, with its progress; or finding the one that is there."""

import _thread
import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mempool.client import Pool
from mempool.client.opening import creation as creation_module
from mempool.client.opening.creation import CreateProgress
from mempool.config import SGD, Adagrad, TableConfig
from mempool.errors import AlreadyExists, DeadlineExceeded
from mempool.types import PoolStatus, ShardFill, TableCreation, TableSchema, TableView
from tests.support.faulty import COLUMNS, FaultyPool
from tests.support.interrupts import interruptible

CONFIG = TableConfig(name="other", num_slots=64, value_dim=12, block_dim=4, page_slots=8, optimizer=SGD(lr=0.5))


def filling(table: str, done: int, total: int, *, waiting_for: str = "") -> TableCreation:
    """How far a table is, as a pool's status says it: one of two shards has half of what is done."""
    halves = (done // 2, done - done // 2)
    fills = tuple(ShardFill(shard=n, bytes_done=half, bytes_total=total // 2) for n, half in enumerate(halves))
    return TableCreation(table=table, table_id=2, waiting_for=waiting_for, spent_s=1.0, shards=fills if total else ())


class SlowPool(FaultyPool):
    """Takes its time, and says how far it is.

    Args:
        steps: (bytes done, bytes in all) at each status; the table is there after the last.
        sticks: The last one is said for ever.
    """

    def __init__(self, steps: list[tuple[int, int]], *, sticks: bool = False) -> None:
        super().__init__(COLUMNS)
        self.steps = steps
        self.sticks = sticks
        self.asked_for = 0
        self._done = asyncio.Event()

    async def create_table(self, schema: TableSchema) -> TableView:
        self.asked_for += 1
        await self._done.wait()
        return await super().create_table(schema)

    async def status(self) -> PoolStatus:
        done, total = self.steps[0]
        if len(self.steps) > 1 or self.sticks:
            self.steps = self.steps[1:] or self.steps
        else:
            self._done.set()
        waiting_for = "" if total else "a rescale"
        creating = (filling("third", 8, 10), filling("other", done, total, waiting_for=waiting_for))
        return replace(await super().status(), creating=creating)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(creation_module, "_QUIET_S", 0.02)
    monkeypatch.setattr(creation_module, "_POLL_S", 0.02)


def test_it_takes_as_long_as_it_moves_and_says_how_far_it_is(
    open_pool: Callable[..., Pool], caplog: pytest.LogCaptureFixture
) -> None:
    mib = 2**20
    steps = [(0, 0), (0, 64 * mib), *((n * mib, 64 * mib) for n in range(1, 40))]
    slow = SlowPool(steps)
    reports: list[CreateProgress] = []
    with caplog.at_level(logging.WARNING, logger="mempool"):
        table = open_pool(slow, timeout_s=0.25).create_table(CONFIG, progress=reports.append)
    assert table.name == "other"
    assert slow.asked_for == 1
    assert [(report.bytes_done, report.bytes_total) for report in reports[: len(steps)]] == steps
    assert reports[-1].spent_s > 0.25  # longer than any other call may take
    assert str(reports[0]) == "it waits for a rescale"
    assert str(reports[1]) == "its CPU kernels are made ready, and its first values"
    assert str(reports[5]) == "4 of 64 MiB have their initial values"
    assert [record.getMessage() for record in caplog.records] == [
        "making table 'other' takes a while: it waits for a rescale"
    ]


def test_what_does_not_move_is_given_up_and_goes_on(open_pool: Callable[..., Pool]) -> None:
    slow = SlowPool([(5 * 2**20, 8 * 2**20)], sticks=True)
    with pytest.raises(DeadlineExceeded) as raised:
        open_pool(slow, timeout_s=0.2).create_table(CONFIG)
    assert str(raised.value) == (
        "table 'other' of pool 'run-7': its making has not moved for 0.2 s (5 of 8 MiB have their initial values). The "
        "pool goes on with it: create_table(..., exist_ok=True) waits for it again, drop_table('other') gives it up."
    )


def test_an_interrupt_says_what_becomes_of_it(open_pool: Callable[..., Pool]) -> None:
    slow = SlowPool([(1, 8)], sticks=True)
    pool = open_pool(slow, timeout_s=60.0)
    status = slow.status

    async def interrupting() -> Any:
        _thread.interrupt_main()
        return await status()

    slow.status = interrupting  # type: ignore[method-assign]
    with interruptible(), pytest.raises(KeyboardInterrupt) as raised:
        pool.create_table(CONFIG)
    assert raised.value.__notes__ == [
        "The pool goes on making table 'other': create_table(..., exist_ok=True) waits for it again, "
        "drop_table('other') gives it up."
    ]


def test_a_table_that_is_there_is_opened_where_that_will_do(open_pool: Callable[..., Pool]) -> None:
    pool = open_pool(FaultyPool(COLUMNS))
    table = pool.create_table(CONFIG)
    assert pool.create_table(CONFIG, exist_ok=True) is table
    # What follows from the rest is compared only where it is said.
    brief = TableConfig(name="other", num_slots=64, value_dim=12, optimizer=SGD(lr=0.5))
    assert pool.create_table(brief, exist_ok=True) is table
    with pytest.raises(AlreadyExists):
        pool.create_table(CONFIG)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"value_dim": 16}, "value_dim is 12, asked for 16"),
        ({"optimizer": SGD(lr=0.25)}, "optimizer.lr is 0.5, asked for 0.25"),
        ({"optimizer": Adagrad(lr=0.5)}, "optimizer.algorithm is 'sgd', asked for 'adagrad'"),
        ({"page_slots": 16, "seed": 3}, "page_slots is 8, asked for 16; seed is 0, asked for 3"),
    ],
)
def test_another_table_of_the_name_is_refused_with_the_difference(
    open_pool: Callable[..., Pool], changes: dict[str, Any], text: str
) -> None:
    pool = open_pool(FaultyPool(COLUMNS))
    pool.create_table(CONFIG)
    other = TableConfig(**{**{name: getattr(CONFIG, name) for name in CONFIG.model_fields_set}, **changes})
    with pytest.raises(AlreadyExists) as raised:
        pool.create_table(other, exist_ok=True)
    assert text in str(raised.value)


def test_a_small_tables_progress_is_told_in_kibibytes() -> None:
    small = CreateProgress(table="t", bytes_done=1536, bytes_total=10_001, waiting_for="", spent_s=2.0)
    assert str(small) == "1 of 10 KiB have their initial values"
