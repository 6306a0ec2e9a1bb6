"""Snapshots while a shard works: what goes wrong meanwhile is in none of them."""

from collections.abc import Callable

import pytest
import torch
from shard_lives import Lives, step

from mempool.errors import DataLoss, Overloaded, StorageFailed
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.capture import ArenaCut
from tests.contract.driver import make_schema, same


def test_a_snapshot_for_which_there_is_no_memory_leaves_nothing_that_copies(
    make_lives: Callable[..., Lives], monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = make_lives()
    driver = lives.begin().create(make_schema(), "one")
    taking, (table,) = lives.engines[-1]._taking, lives.engines[-1]._tenancy.tables.values()
    assert taking is not None
    (first,) = table.storage.arenas.values()
    another, make = table.storage.arena((0,)), ArenaCut.__init__

    def refused(self: ArenaCut, arena: Arena, keys: dict[int, bytes], *, page_slots: int) -> None:
        if arena is another:
            raise MemoryError("none left")
        make(self, arena, keys, page_slots=page_slots)

    monkeypatch.setattr(ArenaCut, "__init__", refused)
    with pytest.raises(Overloaded, match="none left"):
        driver.call(taking.take())
    assert first.cut is None
    monkeypatch.undo()
    assert driver.call(taking.take())


def test_a_page_that_could_not_be_copied_is_missing_in_no_snapshot(
    make_lives: Callable[..., Lives], monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = make_lives()
    driver = lives.begin().create(make_schema(), "one")
    step(driver, 1)
    engine = lives.engines[-1]
    taking = engine._taking
    assert taking is not None
    cut = driver.call(engine._on_thread("snapshot", lambda _: taking._cut()))
    monkeypatch.setattr(taking, "_cut", lambda: cut)

    def none_left(_self: ArenaCut, _count: int) -> None:
        raise MemoryError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(ArenaCut, "_take", none_left)
        driver.write("values", torch.arange(9), torch.ones(9, 10))
    with pytest.raises(Overloaded, match="none left"):
        driver.call(taking.take())
    monkeypatch.undo()
    again = make_lives(lives.after_power_cut(1)).begin(driver)
    assert same(again.contents(), driver.contents())
    assert driver.call(taking.take())


def test_a_snapshot_that_lacks_a_page_is_not_gone_on_with(
    make_lives: Callable[..., Lives], monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = make_lives()
    driver = lives.begin().create(make_schema(), "one")
    taking, take = lives.engines[-1]._taking, ArenaCut.take
    assert taking is not None
    monkeypatch.setattr(ArenaCut, "take", lambda self, num_bytes: take(self, num_bytes)[1:])
    assert driver.call(taking.take())
    with pytest.raises(DataLoss, match="pages of table 'facts', of which"):
        make_lives(lives.after_kill()).begin(driver)


def test_a_page_that_is_damaged_on_the_disk_is_written_again_from_memory(make_lives: Callable[..., Lives]) -> None:
    """It is found where its pack is to be written anew, as most of it is needed no more."""
    lives = make_lives()
    driver = lives.begin().create(make_schema(), "one")
    taking = lives.engines[-1]._taking
    assert taking is not None
    driver.write("values", torch.arange(49), torch.randn(49, 10))
    assert driver.call(taking.take())
    (path,) = [path for path in lives.files.paths() if path.endswith(".pack")]
    lives.files.flip(path, 8 * (len(lives.files.content(path)) - 100))
    driver.write("values", torch.arange(40), torch.randn(40, 10))
    with pytest.raises(DataLoss, match=path):
        driver.call(taking.take())
    assert driver.call(taking.take())
    again = make_lives(lives.after_kill()).begin(driver)
    assert same(again.contents(), driver.contents())


def test_where_segments_cannot_be_removed_snapshots_do_not_follow_one_another(
    make_lives: Callable[..., Lives], monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = make_lives(journal_limit=2**17)
    driver = lives.begin().create(make_schema(), "one")
    store, remove = lives.engines[-1]._store, lives.files.remove
    assert store is not None

    def refuse(path: str) -> None:
        if path.endswith(".segment"):
            raise StorageFailed(f"could not remove {path}")
        remove(path)

    monkeypatch.setattr(lives.files, "remove", refuse)
    monkeypatch.setattr("mempool.shard.durable.taking._AGAIN_S", 1e6)
    for number in range(150):
        driver.write("values", torch.arange(49), torch.full((49, 10), float(number)))
    lives.after_kill()  # once none is under way
    assert store.snapshots.newest is not None
    assert store.snapshots.newest.sequence < 3
