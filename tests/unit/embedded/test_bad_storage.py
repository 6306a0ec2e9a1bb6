"""What lies at a pool's path and is not what it should be: an error names file and remedy, and nothing is changed."""

import asyncio
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import mempool
from mempool import errors
from mempool.embedded import pool as opening
from mempool.embedded.memory import PoolFolder
from mempool.embedded.pool import EngineLauncher
from mempool.journal import DiskFiles
from mempool.shard.durable.store import Store
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run

CONFIG = mempool.TableConfig(name="facts", num_slots=64, value_dim=4)
PATH_OR = r"shard\.storage\.path, or mempool\.local's"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of two shards, kept, and a checkpoint of it beside it."""
    folder = tmp_path_factory.mktemp("good")
    with mempool.local(folder / "memory", shards=2) as pool:
        pool.create_table(CONFIG)
        pool.checkpoint(folder / "place")
    return folder


def edited(name: str, **fields: object) -> Callable[[Path], None]:
    def edit(pool: Path) -> None:
        said = json.loads((pool / name).read_text())
        (pool / name).write_text(json.dumps(said | fields))

    return edit


def instead(name: str) -> Callable[[Path], None]:
    def replace(pool: Path) -> None:
        shutil.rmtree(pool / name)
        (pool / name).write_text("mine")

    return replace


def gone(pattern: str) -> Callable[[Path], None]:
    return lambda pool: next(pool.glob(pattern)).unlink()


def flipped(pattern: str, at: int = 100) -> Callable[[Path], None]:
    def flip(pool: Path) -> None:
        file = next(pool.glob(pattern))
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)

    return flip


def swapped(pool: Path) -> None:
    for before, after in (("shard-0", "x"), ("shard-1", "shard-0"), ("x", "shard-1")):
        (pool / before).rename(pool / after)


BAD = [
    (instead("shard-1"), errors.StorageFailed, r"memory/local/shard-1: .* no folder\. Set " + PATH_OR),
    (edited("pool.json", version=2), errors.ConfigError, r"pool\.json is of format 2, .* take a later one"),
    (
        edited("shard-1/format.json", version=2),
        errors.ConfigError,
        r"format\.json .* a newer mempool .*" + PATH_OR,
    ),
    (edited("shard-1/format.json", pool_id="else"), errors.ConfigError, r"shard-1/format\.json .* 'else'.*" + PATH_OR),
    (gone("pool.json"), errors.DataLoss, r"pool\.json is missing, .* Restore that file"),
    (gone("shard-1/format.json"), errors.DataLoss, r"shard-1/format\.json is missing, .* Restore that file"),
    (swapped, errors.ConfigError, r"says that this is shard [01] .* is to use it"),
    (
        flipped("shard-1/journal/*.segment"),
        errors.DataLoss,
        r"segment is damaged at .* Restore the pool from",
    ),
    (gone("shard-1/journal/*.segment"), errors.DataLoss, r"are missing.* Restore the pool from a checkpoint"),
]


@pytest.mark.parametrize(("spoil", "error", "words"), BAD)
def test_what_is_amiss_is_named_and_left_alone(
    good: Path, tmp_path: Path, spoil: Callable[[Path], None], error: type[Exception], words: str
) -> None:
    memory = tmp_path / "memory"
    shutil.copytree(good / "memory", memory)
    spoil(memory / "local")
    before = contents(memory)  # but of a shard that is whole, whose life has begun
    for _ in range(2):  # and whoever comes next is told the same
        with pytest.raises(error, match=words):
            mempool.local(memory)
        assert contents(memory) == before


def test_a_second_pool_of_that_name_is_kept_out_and_told_whose_it_is(good: Path) -> None:
    with mempool.local(good / "memory"), pytest.raises(errors.StorageFailed, match=f"locked by process {os.getpid()} "):
        mempool.local(good / "memory")


@pytest.mark.skipif(os.getuid() != 0, reason="takes another user")
def test_a_folder_that_this_user_may_not_write_is_named() -> None:
    script = (
        "import os, sys, mempool, mempool.embedded.memory, mempool.journal\n"
        "os.setuid(65534)\n"
        "try: mempool.embedded.memory.PoolFolder(sys.argv[1], 'local')\n"
        "except mempool.errors.MempoolError as error: print(type(error).__name__, error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=60)
    said = f"StorageFailed could not make the folder {folder}/local: permission denied. Make it readable and writable"
    assert done.stdout.startswith(said), done.stdout + done.stderr


def edited_manifest(place: Path) -> None:
    file = next(place.glob("*/manifest.json"))
    file.write_text(re.sub(r'"value_dim": ?4', '"value_dim": 5', file.read_text()))


def cut_manifest(place: Path) -> None:
    file = next(place.glob("*/manifest.json"))
    file.write_bytes(file.read_bytes()[:100])


HALF = [
    (gone("*/manifest.json"), errors.NotFound, r"manifest\.json is missing: .* never finished, or was copied in part"),
    (gone("*/*.safetensors"), errors.DataLoss, r"safetensors is missing\. Copy them there again, or restore another"),
    (edited_manifest, errors.DataLoss, r"manifest\.json is damaged: its checksum is another one\. Copy it again"),
    (cut_manifest, errors.DataLoss, r"manifest\.json is damaged or cut off.* Copy it again"),
    (flipped("*/*.safetensors", -1), errors.DataLoss, r"safetensors is damaged.* Copy .* again"),
]


def test_half_a_checkpoint_is_named_and_makes_no_table(good: Path, tmp_path: Path) -> None:
    with mempool.local() as pool:
        for number, (spoil, error, words) in enumerate(HALF):
            place = Path(shutil.copytree(good / "place", tmp_path / str(number)))
            spoil(place)
            with pytest.raises(error, match=words):
                pool.restore(place)
            assert pool.tables() == ()


def test_a_table_of_another_schema_is_not_replaced(good: Path) -> None:
    with mempool.local() as pool:
        other = mempool.TableConfig(name="facts", num_slots=64, value_dim=8)
        table = pool.create_table(other)
        with pytest.raises(errors.AlreadyExists, match=r"value_dim is 8, not 4.* Restore it under another name"):
            pool.restore(good / "place", tables=["facts"], replace=True)
        assert pool.tables() == (table,)
        (restored,) = pool.restore(good / "place", tables=["facts"], name="facts2")
        assert restored.value_dim == 4


def test_what_a_removal_that_failed_has_left_is_in_the_way_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PoolFolder(str(tmp_path), "local")
    folder.keep_wanted(1)
    remove = DiskFiles.remove

    def make() -> None:
        run(folder.store(1).close(), timeout_s=20)

    def refuse_once(self: DiskFiles, path: str) -> None:
        monkeypatch.setattr(DiskFiles, "remove", remove)
        raise errors.StorageFailed(f"could not remove {path} of {self}", errno=errno.EIO)

    make()
    monkeypatch.setattr(DiskFiles, "remove", refuse_once)
    with pytest.raises(errors.StorageFailed):
        folder.remove(1)
    make()
    folder.remove(1)
    assert sorted(os.listdir(folder._folder)) == ["LOCK", "pool.json"]
    folder.close()


def test_a_pool_whose_opening_was_given_up_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, say: what a thread opens meanwhile is let go again."""
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()
    store = PoolFolder.store

    def slow(self: PoolFolder, shard: int, *, fresh: bool = False) -> Store:
        begun.set()
        assert go_on.wait(20)
        try:
            return store(self, shard, fresh=fresh)
        finally:
            done.set()

    def interrupted(coro: Coroutine[Any, Any, None], timeout_s: float | None = None) -> None:
        monkeypatch.setattr(opening, "run", run)
        opened = start(coro)
        assert begun.wait(20)
        opened.cancel()
        threading.Timer(0.1, go_on.set).start()
        raise KeyboardInterrupt(timeout_s)

    def start(coro: Coroutine[Any, Any, None]) -> "Future[None]":
        async def begin() -> "asyncio.AbstractEventLoop":
            return asyncio.get_running_loop()

        return asyncio.run_coroutine_threadsafe(coro, run(begin()))

    monkeypatch.setattr(PoolFolder, "store", slow)
    monkeypatch.setattr(opening, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mempool.local(tmp_path)
    assert done.wait(20)
    monkeypatch.undo()
    with mempool.local(tmp_path) as pool:
        assert pool.status().shards


class Broken:
    """An engine whose thread has ended, and whose disk refuses what is written last."""

    closed = False

    async def status(self) -> None:
        raise errors.ShardUnavailable("its thread has ended")

    async def close(self) -> None:
        self.closed = True
        raise errors.StorageFailed("the disk is full")


def test_shards_that_cannot_be_closed_well_are_closed_and_the_folder_is_let_go(tmp_path: Path) -> None:
    launcher = EngineLauncher(device="cpu", pool="p", folder=PoolFolder(str(tmp_path), "p"))
    engines = [Broken() for _ in range(3)]
    launcher._engines = dict(enumerate(engines))  # type: ignore[arg-type]
    with pytest.raises(errors.StorageFailed):
        run(launcher.stop(ShardInfo(shard=2, address="", incarnation=1)), timeout_s=20)
    assert engines[2].closed
    with pytest.raises(errors.StorageFailed):
        run(launcher.close(), timeout_s=20)
    assert engines[0].closed
    assert engines[1].closed
    PoolFolder(str(tmp_path), "p").close()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes, but those of locks, which name their last holder, and those of shard 0."""
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None
        for file in sorted(folder.rglob("*"))
        if file.name != "LOCK" and "shard-0/" not in str(file)
    }


@pytest.mark.parametrize("within", ["local", "local/shard-0"])
def test_no_pool_begins_within_the_folder_of_another(good: Path, within: str) -> None:
    before = sorted(good.rglob("*"))
    with pytest.raises(errors.ConfigError, match=re.escape(f"give {good / 'memory'}") + "$"):
        mempool.local(good / "memory" / within)
    assert sorted(good.rglob("*")) == before
