"""Marks and parts on bare shards: what ends a mark, what bounds it, and pages of every layout as they were."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.checkpoint.commit import begin, commit
from mempool.checkpoint.format.layout import PageGroup
from mempool.checkpoint.format.manifest import parse_part
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores import open_store
from mempool.controller.saving.checkpointing import _STALLED_S as STALLED_S
from mempool.errors import DataLoss, InvalidRequest, NotFound, Overloaded, StalePlacement, StorageFailed
from mempool.shard import Engine
from mempool.shard.forks.forked import share
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.capture import ArenaCapture
from mempool.shard.saving import marks
from mempool.shard.saving.marks import Mark, Saving
from mempool.types import (
    AttachTable,
    Ledger,
    MarkTable,
    OptimizerSpec,
    ReleaseMark,
    ShardInfo,
    TableSource,
    WritePart,
    WriteRowsRequest,
)
from mempool.wire.channels.loop import run
from tests.contract.bags import Bags
from tests.contract.driver import Driver, make_schema
from tests.contract.layouts import LAYOUTS
from tests.unit.shard.conftest import MakeDriver

NAME = "000001-0123abcd"
BOUND_S = 20.0


def mark(driver: Driver, *, lease_s: float = 60.0, since: str = "", token: str = "c1") -> None:
    """Freeze all, mark all, thaw all, as a controller does."""
    versions = [driver.freeze(shard, token=token) for shard in driver.owners]
    for shard, version in zip(driver.owners, versions, strict=True):
        request = MarkTable(table_id=driver.table_id, token=token, version=version, lease_s=lease_s, since=since)
        driver.call(driver.host(shard).mark_table(request))
    for shard in driver.owners:
        driver.thaw(shard, token=token)


def asked(driver: Driver, place: Path, *, token: str = "c1", **changes: Any) -> WritePart:
    parts = {"table_id": driver.table_id, "token": token, "url": str(place), "checkpoint": NAME, "wait_s": BOUND_S}
    return WritePart(**(parts | changes))


def until(check: Callable[[], bool]) -> None:
    end_s = time.monotonic() + BOUND_S
    while not check():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.01)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is read out before it is set."""
    opened, read = threading.Event(), Saving._read

    async def gated(self: Saving, found: Mark, group: PageGroup | None) -> dict[str, Tensor]:
        while not opened.is_set():
            await asyncio.sleep(0.005)
        return await read(self, found, group)

    monkeypatch.setattr(Saving, "_read", gated)
    return opened


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    dense=st.booleans(),
    before=st.lists(st.integers(0, 49), max_size=4),
    during=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=6), max_size=4),
    order=st.integers(0, 3),
)
def test_every_layout_is_read_out_as_it_was(
    make_driver: MakeDriver,
    tmp_path: Path,
    layout: str,
    dense: bool,
    before: list[int],
    during: list[list[int]],
    order: int,
) -> None:
    """Steps and writes come before, between and after the groups that are read out."""
    optimizer = OptimizerSpec(algorithm="adamw", lr=0.1, weight_decay=0.1, dense=dense)
    driver = make_driver(3).create(make_schema(optimizer=optimizer), LAYOUTS[layout])
    place = tmp_path / f"{time.monotonic_ns()}"

    def train(step: int, ids: list[int], on: Driver) -> None:
        bags = (torch.tensor(ids), torch.ones(len(ids)), torch.tensor([0, len(ids)]))
        on.train(step, {step: (Bags(*bags), torch.full((1, 10), 0.5 + step))})

    twin = make_driver(3).create(make_schema(optimizer=optimizer), LAYOUTS[layout])
    for one in (driver, twin):
        train(1, [0, *before], one)
    mark(driver)
    for number, ids in enumerate(during[:order]):
        train(2 + number, ids, driver)
    parts = [driver.submit(driver.host(shard).write_part(asked(driver, place))) for shard in driver.owners]
    for number, ids in enumerate(during[order:]):
        train(2 + len(during[:order]) + number, ids, driver)
    store = open_store(place)
    begun = begin(store, pool="p")
    found = [parse_part(part.result(BOUND_S).part) for part in parts]
    object.__setattr__(begun, "name", NAME)
    commit(store, begun, found)
    table = Checkpoint(store).table("facts")
    values, expected = torch.empty(56, 10), twin.read()
    for batch in table.batches(Pages.all(driver.schema), arrays=["values"]):
        columns = np.concatenate([np.arange(*driver.schema.block_columns(block)) for block in batch.blocks])
        rows = (batch.row_pages[:, None] * 8 + np.arange(8)).reshape(-1)
        values[np.ix_(rows, columns)] = batch.arrays["values"]
    assert torch.equal(values[:50], expected)
    for shard in driver.owners:
        driver.call(driver.host(shard).release_mark(ReleaseMark(table_id=driver.table_id, token="c1", kept=NAME)))


def test_a_mark_is_taken_of_a_table_that_stands_still_at_that_version_alone(
    make_driver: MakeDriver, tmp_path: Path
) -> None:
    driver = make_driver(1).create(make_schema())
    host = driver.host(0)
    request = MarkTable(table_id=driver.table_id, token="c1", version=0, lease_s=5.0)
    with pytest.raises(StalePlacement, match="does not hold"):
        driver.call(host.mark_table(request))
    driver.freeze(0, token="c1")
    for wrong in (
        MarkTable(table_id=driver.table_id, token="c2", version=0, lease_s=5.0),
        MarkTable(table_id=driver.table_id, token="c1", version=1, lease_s=5.0),
    ):
        with pytest.raises(StalePlacement):
            driver.call(host.mark_table(wrong))
    for wrong in (
        MarkTable(table_id=driver.table_id, token="", version=0, lease_s=5.0),
        MarkTable(table_id=driver.table_id, token="c1", version=-1, lease_s=5.0),
        MarkTable(table_id=driver.table_id, token="c1", version=0, lease_s=0.0),
        MarkTable(table_id=driver.table_id, token="c1", version=0, lease_s=float("inf")),
        MarkTable(table_id=driver.table_id, token="c1", version=0, lease_s=5.0, since="../x"),
    ):
        with pytest.raises(InvalidRequest):
            driver.call(host.mark_table(wrong))
    with pytest.raises(NotFound):
        driver.call(host.write_part(asked(driver, tmp_path)))
    driver.call(host.mark_table(request))
    driver.thaw(0, token="c1")
    for changes in ({"url": "relative"}, {"checkpoint": "../../etc"}, {"since_version": -1}, {"url": "/a/../../b"}):
        with pytest.raises(InvalidRequest):
            driver.call(host.write_part(asked(driver, tmp_path, **changes)))
    assert not list(tmp_path.iterdir())
    assert driver.call(host.write_part(asked(driver, tmp_path))).part
    with pytest.raises(InvalidRequest, match="written once"):
        driver.call(host.write_part(asked(driver, tmp_path / "other")))
    again = driver.call(host.write_part(asked(driver, tmp_path)))
    assert again.part
    assert again.bytes_done == again.bytes_total > 0


@pytest.mark.parametrize("what", ["lease", "move", "drop", "another", "release"])
def test_what_ends_a_mark_gives_its_memory_back_and_leaves_no_file_that_counts(
    make_driver: MakeDriver, tmp_path: Path, gate: threading.Event, what: str
) -> None:
    driver = make_driver(2).create(make_schema(), "rows")
    mark(driver, lease_s=2.0 if what == "lease" else 60.0)
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    writing = driver.submit(engine.write_part(asked(driver, tmp_path, wait_s=0.0)))
    writing.result(BOUND_S)
    driver.write("values", torch.arange(8), torch.zeros(8, 10))
    assert engine._saving.num_bytes > 0
    if what == "move":
        gate.set()
        driver.move("columns", token="m")
    elif what == "drop":
        driver.drop()
    elif what == "another":
        mark(driver, token="c2")
    elif what == "release":
        gate.set()
        driver.call(engine.release_mark(ReleaseMark(table_id=driver.table_id, token="c1")))
    if what == "another":
        with pytest.raises(NotFound, match="take it again"):
            driver.call(engine.write_part(asked(driver, tmp_path)))
    else:
        until(lambda: engine._saving.num_bytes == 0)
        with pytest.raises(NotFound, match="take it again"):
            driver.call(engine.write_part(asked(driver, tmp_path)))
    gate.set()
    until(lambda: not list(tmp_path.glob("*/*.safetensors")) or what in ("move", "release"))


def test_nothing_is_read_out_of_a_table_that_was_dropped_where_its_memory_is_its_forks(
    make_driver: MakeDriver, tmp_path: Path, gate: threading.Event
) -> None:
    """What no fork needs of it is zeros by then."""
    driver = make_driver(1).create(make_schema())
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    storage = engine._tenancy.table(driver.table_id).storage
    mark(driver)
    writing = driver.submit(engine.write_part(asked(driver, tmp_path)))
    until(lambda: engine._saving._marks[driver.table_id].writing is not None)
    found = engine._saving._marks[driver.table_id]
    pages = PageGroup(blocks=(0,), rows=(0,), heads=())

    def drop_and_read(_: Any) -> dict[str, Tensor]:
        while share(storage, 2**20):
            pass
        engine._tenancy.drop(driver.table_id)
        (arena,) = storage.arenas.values()
        assert not arena.rows("values").any(), "it was given back"
        return engine._saving._export((found, pages))

    with pytest.raises(NotFound, match=r"its table was dropped.*take it again"):
        driver.call(engine._on_thread("read", drop_and_read))
    assert engine._saving.num_bytes == 0
    gate.set()
    with pytest.raises(NotFound, match="its table was dropped"):
        writing.result(BOUND_S)


def test_a_mark_whose_part_is_written_waits_for_others_and_copies_nothing(
    make_driver: MakeDriver, tmp_path: Path
) -> None:
    """So that what changes is known where the next checkpoint is taken, however long other shards need for this one."""
    driver = make_driver(1).create(make_schema())
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    mark(driver)
    assert driver.call(engine.write_part(asked(driver, tmp_path))).part
    engine._saving.clock = lambda: time.monotonic() + 1000.0
    driver.call(engine._on_thread("expire", lambda _: engine._saving.expire()))
    driver.write("values", torch.arange(8), torch.zeros(8, 10))
    assert engine._saving.num_bytes == 0
    assert driver.call(engine.write_part(asked(driver, tmp_path))).part
    driver.call(engine.release_mark(ReleaseMark(table_id=driver.table_id, token="c1", kept=NAME)))
    (arena,) = engine._tenancy.table(driver.table_id).storage.arenas.values()
    assert arena.mark is not None
    assert len(arena.written_since(arena.mark[1])) == 1


def test_the_engine_is_left_to_others_while_there_are_any(make_driver: MakeDriver) -> None:
    engine = make_driver(1).create(make_schema()).host(0)
    assert isinstance(engine, Engine)
    now_s = busy_s = 100.0
    saving = replace(engine._saving, clock=lambda: now_s, busy_s=lambda: busy_s, _marks={})
    saving._looked = now_s, busy_s

    def pauses(others_s: float) -> list[float]:
        """After each of five groups, an eighth of a second apart, that were read out in a 64th."""
        nonlocal now_s, busy_s
        found = []
        for _ in range(5):
            now_s, busy_s = now_s + 0.125, busy_s + others_s
            found.append(saving._pause_s(now_s, 1 / 64))
            busy_s += 1 / 64
        return found

    assert pauses(0.0) == [0.0] * 5
    assert pauses(0.001) == [0.0] * 5  # who looks at it now and then
    assert pauses(0.05) == pytest.approx([marks._PAUSES / 64] * 5)
    assert pauses(0.0) == pytest.approx([marks._PAUSES / 64] * 5)  # a trainer may be computing
    assert saving._pause_s(now_s, 60.0) == marks._LONGEST_PAUSE_S < STALLED_S  # of a process that was stopped meanwhile
    busy_s += 60.0
    now_s += marks._IN_USE_S
    assert pauses(0.0) == [0.0] * 5
    full = SimpleNamespace(capture=SimpleNamespace(used_bytes=saving.copy_bytes))
    saving._marks[1] = full  # type: ignore[assignment]
    assert pauses(0.05) == [0.0] * 5  # steps would wait for it
    full.capture.used_bytes //= 2
    assert pauses(0.05) == pytest.approx([marks._PAUSES / 128] * 5)


def test_steps_are_held_off_where_copies_take_too_much_and_go_on_when_they_are_written(
    make_driver: MakeDriver, tmp_path: Path, gate: threading.Event
) -> None:
    driver = make_driver(1).create(make_schema())
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    engine._saving.copy_bytes = 100
    mark(driver)
    driver.call(engine.write_part(asked(driver, tmp_path, wait_s=0.0)))
    driver.write("values", torch.arange(32), torch.zeros(32, 10))  # what has begun is not held off
    assert engine._saving.crowded()
    assert driver.call(engine.status()).copied_bytes == engine._saving.num_bytes > 0
    later: Future[Any] = driver.submit(_written(driver, engine))
    time.sleep(0.05)
    assert not later.done()
    gate.set()
    later.result(BOUND_S)
    assert driver.call(engine.write_part(asked(driver, tmp_path))).part
    assert not engine._saving.crowded()


def test_steps_that_are_held_off_go_on_when_the_mark_ends(make_driver: MakeDriver) -> None:
    driver = make_driver(1).create(make_schema())
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    engine._saving.copy_bytes = 100
    mark(driver)
    driver.write("values", torch.arange(32), torch.zeros(32, 10))
    later: Future[Any] = driver.submit(_written(driver, engine))
    (table,) = engine._tenancy.tables.values()
    until(lambda: table.waited_for)
    driver.call(engine.release_mark(ReleaseMark(table_id=driver.table_id, token="c1", kept="")))
    assert not table.waited_for
    later.result(BOUND_S)


async def _written(driver: Driver, engine: Engine) -> None:
    rows = torch.ones(2, 10)
    request = WriteRowsRequest(
        envelope=driver.envelope(0), array="values", ids=torch.tensor([40, 41]), blocks=(0, 1, 2), rows=rows
    )
    await engine.write_rows(request)


def test_no_memory_for_copies_ends_the_checkpoint_and_no_step(
    make_driver: MakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(1).create(make_schema())
    mark(driver)

    def none_left(_self: ArenaCapture, _count: int) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(ArenaCapture, "_take", none_left)
    driver.write("values", torch.arange(4), torch.ones(4, 10))
    assert torch.equal(driver.read("values", torch.arange(4)), torch.ones(4, 10))
    with pytest.raises(StorageFailed, match="no memory left"):
        driver.call(driver.host(0).write_part(asked(driver, tmp_path)))
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_mark_for_which_there_is_no_memory_leaves_nothing_that_copies(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(1).create(make_schema(), "one")
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    storage = engine._tenancy.table(driver.table_id).storage
    (first,) = storage.arenas.values()
    another = storage.arena((0,))
    make = ArenaCapture.__init__

    def refused(self: ArenaCapture, arena: Arena, pages_left: Any, owner: Any) -> None:
        if arena is another:
            raise MemoryError("none left")
        make(self, arena, pages_left, owner)

    monkeypatch.setattr(ArenaCapture, "__init__", refused)
    with pytest.raises(Overloaded, match="none left"):
        mark(driver)
    assert first.capture is None
    assert not storage.shared_head_keys


def test_a_restore_that_fails_leaves_no_table(make_driver: MakeDriver, tmp_path: Path) -> None:
    driver = make_driver(1).create(make_schema())
    (view,) = driver.call(driver.host(0).views())
    host = Engine(ShardInfo(shard=0, address="", incarnation=1))
    try:
        for source, error in (
            (TableSource(url=str(tmp_path), checkpoint=NAME, table="facts"), NotFound),
            (TableSource(url="relative", checkpoint=NAME, table="facts"), InvalidRequest),
            (TableSource(url=str(tmp_path), checkpoint="x", table="facts"), InvalidRequest),
            (None, InvalidRequest),
        ):
            request = AttachTable(view=view, mode="restore", ledger=Ledger(version=3), source=source)
            with pytest.raises(error):
                run(host.attach_table(request), timeout_s=BOUND_S)
            assert run(host.status(), timeout_s=BOUND_S).tables == ()
    finally:
        run(host.close(), timeout_s=BOUND_S)


def test_lost_pages_are_in_no_checkpoint(make_driver: MakeDriver) -> None:
    driver = make_driver(1).create(make_schema())
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    driver.freeze(0, token="c1")
    engine._tenancy.table(driver.table_id).storage.lose_all()
    engine._tenancy.table(driver.table_id).measure()
    with pytest.raises(DataLoss):
        driver.call(engine.mark_table(MarkTable(table_id=driver.table_id, token="c1", version=0, lease_s=5.0)))
