"""Forks of a pool on a disk: killed or closed, and opened again, all are what they were, and share what they shared."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from durable_trainer import contents, differences
from torch import Tensor

import mempool
from mempool import optim
from mempool.client import Pool
from mempool.shard.durable.store import Store
from mempool.wire.channels.loop import run
from tests.support.forking_trainer import FORKS, JOURNAL_LIMIT_BYTES, NAMES, play

ROOT = Path(__file__).parents[3]
SLOTS, WIDTH = 4096, 64


def all_of(pool: Pool) -> dict[str, Tensor]:
    return contents(sorted(pool.tables(), key=lambda table: table.name))


def test_killed_and_opened_again_tables_and_forks_are_what_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With snapshots before and after the forks."""
    command = [sys.executable, "-m", "tests.support.forking_trainer", str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(3)]
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert said == ["trained", "forked", "done"]
    with mempool.local(shards=2) as pool:
        play(pool)
        never_died = all_of(pool)
    monkeypatch.setitem(Store.__init__.__kwdefaults__, "journal_limit", JOURNAL_LIMIT_BYTES)
    with mempool.local(tmp_path) as pool:
        assert differences(all_of(pool), never_died) == []
        for name in NAMES:
            pool.table(name).reset(to=f"{name}-trial")
        pool.drop_table(FORKS[0])
    with mempool.local(tmp_path) as pool:
        found = all_of(pool)
    assert {name.partition("/")[0] for name in found} == {*NAMES, *FORKS[1:], "left"}
    for name in NAMES:
        for key in [key for key in found if key.startswith(f"{name}/")]:
            trial = never_died[key.replace(f"{name}/", f"{name}-trial/")]
            assert differences({key: found[key]}, {key: trial}) == []


def shared(pool: Pool, name: str) -> int:
    return sum(table.shared_bytes for shard in pool.status().shards for table in shard.tables if table.name == name)


def take_snapshots(pool: Pool) -> None:
    engines = pool._connection._on_close.__self__._engines  # type: ignore[union-attr]
    for engine in engines.values():
        assert run(engine._taking.take(), timeout_s=20)


def step(table: mempool.Table, number: int) -> None:
    ids = torch.randint(0, SLOTS, (16, 2), generator=torch.Generator().manual_seed(number))
    table.gather(ids).square().sum().backward()
    table.commit()


def test_what_was_shared_is_shared_again_and_lies_on_the_disk_once(tmp_path: Path) -> None:
    given = mempool.TableConfig(
        name="facts", num_slots=SLOTS, value_dim=WIDTH, page_slots=64, optimizer=optim.Adagrad(lr=0.1)
    )
    size = 2 * SLOTS * WIDTH * 4
    with mempool.local(tmp_path, shards=1) as pool:
        table = pool.create_table(given)
        step(table, 0)
        take_snapshots(pool)
        trial = table.fork("trial")
        table.fork("other")
        trial.fork("untouched")
        step(trial, 1), step(table, 2)
        took = pool.status()
        before, then = {name: shared(pool, name) for name in ("trial", "other")}, all_of(pool)
        assert took.shards[0].num_bytes > 4 * size
    for snapshot in (True, True, False):
        with mempool.local(tmp_path) as pool:
            assert differences(all_of(pool), then) == []
            for name in before:  # the rows of "other" that only the table has written to are other ones there, too
                assert shared(pool, name) == before[name] > 0.7 * size
            assert shared(pool, "untouched") > 0.7 * size
            if snapshot:
                take_snapshots(pool)
    packs = sum(path.stat().st_size for path in tmp_path.rglob("*.pack"))
    assert packs < 3 * size, "of four tables"
    with mempool.local(tmp_path) as pool:
        pool.drop_table("facts")
        take_snapshots(pool)
    del then["facts/values"], then["facts/values.sum"], then["facts/steps"]
    with mempool.local(tmp_path) as pool:
        assert differences(all_of(pool), then) == []
        assert shared(pool, "other") > 0.7 * size, "with the first of the forks"
