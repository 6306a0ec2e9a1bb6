"""Killed at any moment, a checkpoint or a removal leaves older checkpoints whole, and nothing that is not cleaned."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mempool.checkpoint.commit import names
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.looking import checkpoints, verify
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.removal import keep_newest, remove
from mempool.checkpoint.stores import Store
from mempool.errors import StorageFailed
from tests.unit.checkpoint.contents import FLAT, PLAIN, PRODUCT, Content, read, spread, write
from tests.unit.checkpoint.memory import Died, MemoryStore

TABLES = tuple(replace(schema, num_slots=36, value_dim=9, stride=6) for schema in (PRODUCT, FLAT))


def some_pages(seed: int) -> dict[str, Pages]:
    found = {}
    for schema in TABLES:
        pages = Pages.none(schema)
        pages.row_pages[seed % 5 :: 5] = True
        pages.key_pages[seed % 3 :: 3] = True
        found[schema.name] = pages
    return found


def history(steps: int) -> list[list[Content]]:
    """The tables at each checkpoint."""
    moments = [[Content.random(schema, seed=1) for schema in TABLES]]
    for step in range(1, steps):
        changed = some_pages(step)
        moments.append([old.changed(changed[old.schema.name], 10 + step, step) for old in moments[-1]])
    return moments


MOMENTS = history(4)


def take(store: Store, step: int) -> None:
    write(store, MOMENTS[step], shards=2, changed=some_pages(step) if step else None, batch_bytes=1500, file_bytes=4000)


Known = dict[tuple[int, ...], tuple[int, list[bytes]]]
"""Very bytes that were checked before, by their ids, and the step they are of."""


def kept(store: Store, path: str) -> bytes:
    """The bytes themselves, where they are in memory."""
    return store.files[path] if isinstance(store, MemoryStore) else store.read(path)


def check(store: Store, known: Known) -> list[int]:
    """Every checkpoint that is there is whole, and as it was taken. Returns the steps of theirs."""
    steps = []
    for name in names(store.list()):
        checkpoint = Checkpoint(store, name)
        held = [kept(store, path) for path in (f"{name}/manifest.json", *checkpoint.manifest.files)]
        these = tuple(map(id, held))
        if these in known:
            steps.append(known[these][0])
            continue
        step = checkpoint.manifest.tables["paths"].version
        steps.append(step)
        assert verify(store, name).damages == ()
        for content in MOMENTS[step]:
            assert read(checkpoint, content.schema.name, spread(content.schema, 1)).same(content)
        known[these] = step, held
    return steps


def scenario(store: Store, done: list[str]) -> None:
    """Two more checkpoints and a removal; done: what was acknowledged of it."""
    take(store, 2)
    done.append("taken 2")
    keep_newest(store, 2)
    done.append("kept 2")
    take(store, 3)
    done.append("taken 3")
    keep_newest(store, 1)
    done.append("kept 1")


@pytest.mark.parametrize("renames", [True, False])
def test_every_crash_leaves_what_was_whole(renames: bool) -> None:
    before = MemoryStore(renames=renames)
    take(before, 0)
    take(before, 1)
    undisturbed = MemoryStore(dict(before.files), renames=renames)
    scenario(undisturbed, [])
    assert undisturbed.changes > 30

    known: Known = {}
    for dies_at in range(1, undisturbed.changes + 1, 1 if renames else 3):
        store = MemoryStore(dict(before.files), renames=renames)
        store.dies_at = dies_at
        done: list[str] = []
        with pytest.raises(Died):
            scenario(store, done)
        store.dies_at = None
        for found in checkpoints(store):
            if "problem" in found:  # a manifest that was cut off in sight: it was never acknowledged
                assert not renames
                remove(store, found["name"])
        steps = check(store, known)
        assert steps, f"died at {dies_at}: nothing is left"
        assert {"taken 2": 2, "taken 3": 3}.get(next((d for d in reversed(done) if "taken" in d), ""), 1) in steps

        # It goes on: another checkpoint, and what the dead left is cleaned.
        write(store, MOMENTS[3], shards=1)
        keep_newest(store, 1)
        assert check(store, known) == [3]
        manifest = Checkpoint(store).manifest
        assert set(store.files) == {*manifest.files, f"{manifest.name}/manifest.json"}


def test_every_failure_leaves_what_was_whole_and_the_next_try_does_it() -> None:
    before = MemoryStore()
    take(before, 0)
    take(before, 1)
    undisturbed = MemoryStore(dict(before.files))
    scenario(undisturbed, [])
    known: Known = {}
    for fails_at in range(1, undisturbed.changes + 1, 3):
        store = MemoryStore(dict(before.files))
        store.fails_at = fails_at
        done: list[str] = []
        with pytest.raises(StorageFailed, match="no space left"):
            scenario(store, done)
        assert not any(path.endswith(".part") for path in store.files)
        assert {"taken 2": 2, "taken 3": 3}.get(next((d for d in reversed(done) if "taken" in d), ""), 1) in check(
            store, known
        )
        write(store, MOMENTS[3], shards=2)
        keep_newest(store, 1)
        assert check(store, known) == [3]
        assert {path.partition("/")[0] for path in store.files} == {Checkpoint(store).manifest.name}


def test_a_killed_process_leaves_what_was_whole_in_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.unit.checkpoint.killed", str(tmp_path), "9"]
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


def test_an_error_in_writing_leaves_no_file() -> None:
    store = MemoryStore()
    content = Content.random(PLAIN, seed=1)
    content.rows["values"] = content.rows["values"].double()
    with pytest.raises(Exception, match=r"came as torch.float64"):
        write(store, [content])
    assert store.files == {}
