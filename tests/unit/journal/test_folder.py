"""The folder of a shard: its owner, its lock, and everything it may be instead."""

import json
import os
from pathlib import Path

import pytest
from fakefiles import FakeFiles, PowerCut

from mempool.errors import ConfigError, DataLoss, MempoolError, StorageFailed
from mempool.journal import DiskFiles, Files, ShardFolder


def _open(files: Files, path: str, *, pool: str = "facts", pool_id: str = "id-1", shard: int = 2) -> ShardFolder:
    return ShardFolder(files, path, pool=pool, pool_id=pool_id, shard=shard, wall=lambda: 1234.5)


def _contents(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "LOCK"}


def test_it_is_made_once_and_known_again(tmp_path: Path) -> None:
    with _open(DiskFiles(), str(tmp_path / "deep" / "memory")) as folder:
        assert folder.is_new
        assert folder.path == str(tmp_path / "deep/memory/facts/shard-2")
        assert os.path.isdir(folder.journal)
        assert os.path.isdir(folder.snapshots)
    with _open(DiskFiles(), str(tmp_path / "deep/memory")) as folder:
        assert not folder.is_new
        assert folder.created == 1234.5
    said = json.loads((tmp_path / "deep/memory/facts/shard-2/format.json").read_text())
    assert said == {"version": 1, "pool_id": "id-1", "shard": 2, "created": 1234.5}


def test_two_processes_are_kept_apart_by_name(tmp_path: Path) -> None:
    with (
        _open(DiskFiles(), str(tmp_path)),
        pytest.raises(
            StorageFailed,
            match=rf"shard-2/LOCK is locked by process {os.getpid()} on .*: that is this .*path",
        ),
    ):
        _open(DiskFiles(), str(tmp_path))
    _open(DiskFiles(), str(tmp_path)).close()


def test_another_pool_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    _open(DiskFiles(), str(tmp_path)).close()
    before = _contents(tmp_path)
    with pytest.raises(ConfigError, match=r"format\.json says that this is shard 2 of the pool with id 'id-1'.*'id-2'"):
        _open(DiskFiles(), str(tmp_path), pool_id="id-2")
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", DataLoss, "damaged"),
        (b"[]", DataLoss, "damaged"),
        (b'{"version": 1}', DataLoss, "damaged .*pool_id"),
        (b"\xff\x00", DataLoss, "damaged"),
        (b'{"version": 2, "other": 1}', ConfigError, "format version 2, and this mempool reads 1: a newer"),
        (b'{"version": 2, "pool_id": "id-1", "shard": 2, "created": 1}', ConfigError, "format version 2"),
        (b'{"version": 1, "pool_id": "id-1", "shard": 3, "created": 1}', ConfigError, "this is shard 3"),
    ],
)
def test_what_it_says_is_checked(tmp_path: Path, content: bytes, error: type[MempoolError], words: str) -> None:
    _open(DiskFiles(), str(tmp_path)).close()
    (tmp_path / "facts/shard-2/format.json").write_bytes(content)
    before = _contents(tmp_path)
    with pytest.raises(error, match=rf"facts/shard-2/format\.json .*{words}"):
        _open(DiskFiles(), str(tmp_path))
    assert _contents(tmp_path) == before


def test_a_folder_that_does_not_say_whose_it_is_is_left_alone(tmp_path: Path) -> None:
    _open(DiskFiles(), str(tmp_path)).close()
    (tmp_path / "facts/shard-2/format.json").unlink()
    with pytest.raises(DataLoss, match=r"format\.json is missing.*journal and snapshots"):
        _open(DiskFiles(), str(tmp_path))


@pytest.mark.parametrize("pool", ["", "..", "a/b", "/etc", "a\0b", "x" * 64, "ä", ".hidden", "a\n"])
def test_names_that_are_no_folders_are_refused(tmp_path: Path, pool: str) -> None:
    with pytest.raises(ConfigError, match="cannot have storage"):
        _open(DiskFiles(), str(tmp_path), pool=pool)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_none_are_refused(tmp_path: Path) -> None:
    for path in ("", "a\0b"):
        with pytest.raises(ConfigError, match="no path"):
            _open(DiskFiles(), path)
    with pytest.raises(ConfigError, match="no shard -1"):
        _open(DiskFiles(), str(tmp_path), shard=-1)
    with pytest.raises(ConfigError, match="1 to 256 characters"):
        _open(DiskFiles(), str(tmp_path), pool_id="")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageFailed, match=r"file.*no folder.*Set shard\.storage\.path"):
        _open(DiskFiles(), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageFailed, match=rf"{tmp_path}.*permission denied"):
        _open(DiskFiles(), str(tmp_path))


def test_a_crash_at_every_operation_of_making_it_leaves_one_that_opens() -> None:
    number = 0
    while True:
        number += 1
        files = FakeFiles(number)
        files.cut_power_at(number)
        try:
            _open(files, "disk")
        except PowerCut:
            pass
        else:
            break
        files.heal()
        files.power_cut()
        _open(files, "disk").close()
    assert number > 8
