"""Checkpoints of pools that have storage, restored into such pools: killed afterwards, or half way, they are whole."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from durable_trainer import contents, differences, open_tables
from killed_copies import left_by_a_kill
from torch import Tensor

import mempool
from mempool import errors
from mempool.shard.durable.store import Store
from mempool.shard.saving import restoring
from mempool.types import PageBatch

NAMES = ("momentum", "adagrad", "adam", "dense")
WAIT_S = 30.0


def train(tables: list[mempool.Table], step: int) -> None:
    """A step of each table; nothing else is read, so that slots without a gradient stay behind."""
    random = torch.Generator().manual_seed(step)
    for table in tables:
        ids = torch.randint(0, table.num_slots, (4, 3), generator=random)
        target = torch.randn(4, table.value_dim, generator=random)
        (table.gather(ids, torch.rand(4, 3, generator=random)).float() * target).sum().backward()
        table.commit()


def killed(path: Path) -> Path:
    """What a ``kill -9`` of the process that uses this folder leaves, now: another folder."""
    return left_by_a_kill(path, path.with_name(f"{path.name}-killed"))


def test_a_copy_is_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, copy, copied = tmp_path / "folder", shutil.copytree, []
    folder.mkdir()
    (folder / "segment").write_text("1")

    def disturbed(*given: object, **named: object) -> object:
        copied.append(copy(*given, **named))  # type: ignore[arg-type]
        if len(copied) == 1:  # written to while it is read
            (folder / "segment").write_text("12")
            (folder / "synced").write_text("2")
        return copied[-1]

    monkeypatch.setattr(shutil, "copytree", disturbed)
    left = killed(folder)
    assert len(copied) == 2
    assert [path.read_text() for path in sorted(left.iterdir())] == ["12", "2"]


def held(path: Path, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """What a folder's pool holds."""
    with mempool.local(path) as pool:
        assert sorted(table.name for table in pool.tables()) == sorted(names)
        return contents(open_tables(pool, names))


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Tensor]:
    """What a pool without storage holds that is trained, checkpointed and trained on."""
    with mempool.local(shards=1) as pool:
        tables = open_tables(pool, NAMES)
        for step in range(1, 6):
            train(tables, step)
        contents(tables)  # reads all, as a checkpoint does
        for step in range(6, 11):
            train(tables, step)
        return contents(tables)


@pytest.mark.parametrize("snapshot", [False, True], ids=["journal", "snapshot"])
def test_taken_and_trained_on_and_killed(
    tmp_path: Path, undisturbed: dict[str, Tensor], snapshot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a dense optimizer's slots stopped for the checkpoint they stop in every later life, too."""
    if snapshot:  # so early that each step takes one
        monkeypatch.setitem(Store.__init__.__kwdefaults__, "journal_limit", 2**14)
    disk, place = tmp_path / "disk", tmp_path / "place"
    with mempool.local(disk, shards=2) as pool:
        tables = open_tables(pool, NAMES)
        for step in range(1, 6):
            train(tables, step)
        pool.checkpoint(place)
        for step in range(6, 9):
            train(tables, step)
        left = killed(disk)
    with mempool.local(left) as pool:
        tables = open_tables(pool, NAMES)
        for step in range(9, 11):
            train(tables, step)
        assert differences(contents(tables), undisturbed) == []


def test_restored_into_a_pool_with_storage_and_killed(tmp_path: Path, undisturbed: dict[str, Tensor]) -> None:
    disk, place, other = tmp_path / "disk", tmp_path / "place", tmp_path / "other"
    with mempool.local(disk, shards=2) as pool:
        tables = open_tables(pool, NAMES)
        for step in range(1, 6):
            train(tables, step)
        pool.checkpoint(place)
    with mempool.local(other, shards=3) as pool:
        stale = open_tables(pool, NAMES[:2])
        train(stale, 99)
        pool.restore(place, replace=True)
        for step in range(6, 8):
            train(open_tables(pool, NAMES), step)
        left = killed(other)
    with mempool.local(left) as pool:
        assert len(pool.tables()) == len(NAMES)
        tables = open_tables(pool, NAMES)
        for step in range(8, 11):
            train(tables, step)
        assert differences(contents(tables), undisturbed) == []
    assert differences(held(left), undisturbed) == []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Set by each shard that has read the first batch of a restore, and what lets it read on."""
    arrived, opened, read_pages = threading.Event(), threading.Event(), restoring.read_pages

    def gated(*given: object, **named: object) -> Iterator[PageBatch]:
        for number, batch in enumerate(read_pages(*given, **named)):  # type: ignore[arg-type]
            if number:
                arrived.set()
                assert opened.wait(WAIT_S)
            yield batch

    monkeypatch.setattr(restoring, "read_pages", gated)
    monkeypatch.setattr(restoring, "_BATCH_BYTES", 4096)
    yield arrived, opened
    opened.set()


@pytest.mark.parametrize("replace", [False, True])
def test_killed_half_way_through_a_restore(
    tmp_path: Path, gate: tuple[threading.Event, threading.Event], replace: bool
) -> None:
    arrived, opened = gate
    disk, place = tmp_path / "disk", tmp_path / "place"
    with mempool.local(shards=1) as pool:
        train(open_tables(pool, ["adam"]), 1)
        pool.checkpoint(place)
    with mempool.local(disk, shards=2) as pool:
        tables = open_tables(pool, ["adam"] if replace else ["sgd"])
        train(tables, 2)
        before = contents(tables)
        restore = threading.Thread(target=_refused_or_done, args=(lambda: pool.restore(place, replace=replace),))
        restore.start()
        assert arrived.wait(WAIT_S)
        left = killed(disk)
        opened.set()
        restore.join(WAIT_S)
        assert not restore.is_alive()
        restored = contents(open_tables(pool, ["adam"]))
    names = ("adam",) if replace else ("sgd",)
    assert differences(held(left, names), before) == []  # and what was half there is no table
    assert (
        differences(held(disk, ("adam",) if replace else ("adam", "sgd")), restored | (before if not replace else {}))
        == []
    )
    with mempool.local(left) as pool:
        pool.restore(place, replace=replace)
        assert differences(contents(open_tables(pool, ["adam"])), restored) == []


def test_an_imported_table_is_there_after_a_kill(tmp_path: Path) -> None:
    disk, file = tmp_path / "disk", tmp_path / "adam.safetensors"
    with mempool.local(shards=1) as pool:
        train(open_tables(pool, ["adam"]), 1)
        pool.export_table("adam", file)
        exported = contents(open_tables(pool, ["adam"]))
    with mempool.local(disk, shards=2) as pool:
        table = pool.import_table(file)
        imported = contents([table])
        left = killed(disk)
    name = next(name for name in imported if name.endswith("values"))
    assert torch.equal(imported[name], exported[name])
    file.unlink()
    assert differences(held(left, ("adam",)), imported) == []


def _refused_or_done(call: Callable[[], object]) -> None:
    try:
        call()
    except errors.MempoolError as error:
        print(error)
