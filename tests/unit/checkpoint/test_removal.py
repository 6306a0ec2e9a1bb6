"""Removal takes what nobody needs, and nothing else."""

from __future__ import annotations

import pytest

from mempool.checkpoint.commit import begin, names
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.looking import verify
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.removal import keep_newest, remove
from mempool.errors import DataLoss, InvalidRequest, NotFound
from tests.unit.checkpoint.contents import PLAIN, Content, write, write_part
from tests.unit.checkpoint.memory import MemoryStore


def chain(store: MemoryStore, count: int) -> list[str]:
    """Checkpoints of which each one changes one row page."""
    content = Content.random(PLAIN, seed=1)
    found = [write(store, [content], batch_bytes=1, file_bytes=1).name]
    for step in range(1, count):
        changed = Pages.none(PLAIN)
        changed.row_pages[step] = True
        content = content.changed(changed, step, step)
        found.append(write(store, [content], changed={"facts": changed}).name)
    return found


def test_files_that_a_kept_checkpoint_reads_stay() -> None:
    store = MemoryStore()
    taken = chain(store, 4)
    before = dict(store.files)
    removed = keep_newest(store, 2)
    assert removed.checkpoints == tuple(taken[:2])
    assert names(store.list()) == taken[2:]
    for name in taken[2:]:
        assert verify(store, name).damages == ()
    gone = set(before) - set(store.files)
    # The third reads pages 1 and 2 elsewhere; page 3, which the fourth wrote, is its own yet.
    assert sum(path.startswith(taken[0]) for path in gone) == 1 + 2
    assert [path for path in gone if path.startswith(taken[1])] == [f"{taken[1]}/manifest.json"]
    assert removed.files == len(gone)
    assert removed.num_bytes == sum(len(before[path]) for path in gone)


def test_one_in_the_making_is_left_alone_and_a_dead_one_is_cleaned() -> None:
    store = MemoryStore()
    content = Content.random(PLAIN, seed=1)
    write(store, [content])
    begun = begin(store, pool="run-7")
    write_part(store, begun, content, 0, Pages.all(PLAIN))
    making = [path for path in store.files if path.startswith(begun.name)]
    assert making
    keep_newest(store, 1)
    assert set(making) <= set(store.files)
    newest = write(store, [content]).name
    keep_newest(store, 1)
    assert {path.partition("/")[0] for path in store.files} == {newest}


def test_what_is_not_ours_stays() -> None:
    store = MemoryStore({"notes.txt": b"", "000000-deadbeef/notes.txt": b"", "model/weights.safetensors": b""})
    for _ in range(2):
        write(store, [Content.random(PLAIN, seed=1)])
    keep_newest(store, 1)
    assert {"notes.txt", "000000-deadbeef/notes.txt", "model/weights.safetensors"} <= set(store.files)


def test_nothing_is_removed_beside_a_manifest_that_cannot_be_read() -> None:
    store = MemoryStore()
    taken = chain(store, 3)
    path = f"{taken[1]}/manifest.json"
    store.files[path] = store.files[path].replace(b"facts", b"fects", 1)
    before = dict(store.files)
    with pytest.raises(DataLoss, match=f"{taken[1]}/manifest.json is damaged"):
        keep_newest(store, 2)
    assert store.files == before
    remove(store, taken[1])
    assert names(store.list()) == [taken[0], taken[2]]
    assert verify(store, taken[2]).damages == ()


def test_the_newest_stays() -> None:
    store = MemoryStore()
    chain(store, 2)
    with pytest.raises(InvalidRequest, match="keep=0: at least the newest"):
        keep_newest(store, 0)
    assert keep_newest(store, 5).checkpoints == ()
    with pytest.raises(NotFound, match="has no checkpoint 'x'"):
        remove(store, "x")


def test_the_last_one_can_be_removed_by_name() -> None:
    store = MemoryStore()
    write(store, [Content.random(PLAIN, seed=1)])
    remove(store, Checkpoint(store).manifest.name)
    assert store.files == {}
