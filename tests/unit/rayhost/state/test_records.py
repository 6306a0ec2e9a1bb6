"""Records of pools: written, read, overwritten, unreadable."""

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mempool.config import Adam, ClusterConfig, PoolConfig, ProductKeys, TableConfig
from mempool.errors import ConfigError
from mempool.rayhost.state.records import (
    PoolRecord,
    forget_record,
    hand_over_ray,
    read_record,
    read_records,
    state_folder,
    write_record,
)

TABLE = TableConfig(
    name="facts", num_slots=1024, value_dim=64, keys=ProductKeys(heads=2, key_dim=16), optimizer=Adam(lr=0.01)
)


def record(name: str, ray_pid: int | None = None) -> PoolRecord:
    config = ClusterConfig(pool=PoolConfig(name=name, shards=2, shard_ports="7100-7199"), tables=[TABLE])
    return PoolRecord(name=name, address="127.0.0.1:7077", ray_address="127.0.0.1:6379", ray_pid=ray_pid, config=config)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_written_and_read() -> None:
    first = record("first", ray_pid=42)
    write_record(first)
    write_record(record("second"))
    assert read_record("first") == first
    assert [found.name for found in read_records()] == ["first", "second"]
    changed = replace(first, address="127.0.0.1:8000")
    write_record(changed)
    assert read_record("first") == changed
    forget_record("first")
    forget_record("first")
    assert read_record("first") is None
    assert [path.name for path in state_folder().iterdir()] == ["second.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "old"}', '{"name": "old", "config": {"pool": 3}}'])
def test_what_cannot_be_read_is_no_record(text: str) -> None:
    (state_folder() / "old.json").write_text(text)
    assert read_record("old") is None
    assert read_records() == []


def test_ray_is_handed_over() -> None:
    first = record("first", ray_pid=42)
    write_record(first)
    assert not hand_over_ray(first, "unknown")
    write_record(record("second"))
    assert hand_over_ray(first, "second")
    second = read_record("second")
    assert second is not None
    assert second.ray_pid == 42


def test_state_folder_without_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder() == tmp_path / "home" / ".local" / "state" / "mempool"
    assert state_folder().is_dir()


def test_a_record_is_read_where_the_pools_token_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPOOL_TOKEN", "a-token")
    config = ClusterConfig(pool=PoolConfig(name="open", shards=1, bind="0.0.0.0"))
    written = PoolRecord(name="open", address="h:7077", ray_address="127.0.0.1:6379", ray_pid=42, config=config)
    write_record(written)
    assert "a-token" not in (state_folder() / "open.json").read_text()
    monkeypatch.delenv("MEMPOOL_TOKEN")
    assert read_record("open") == written  # or `down` in another shell would leave Ray running


def test_reading_makes_no_folder_and_writing_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for state in (tmp_path / "none", tmp_path / "file"):  # where nothing is, and where nothing can be
        monkeypatch.setenv("XDG_STATE_HOME", str(state))
        assert read_record("first") is None
        assert read_records() == []
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="XDG_STATE_HOME"):
        write_record(record("first"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, timeout=10)
    if made.returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True, timeout=10)


def test_a_full_disk_is_named_and_leaves_the_record_as_it_was(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPOOL_STATE", str(tiny_disk))
    write_record(record("first", ray_pid=1))
    filler = tiny_disk / "filler"
    with contextlib.suppress(OSError):
        filler.write_bytes(bytes(1 << 20))
    with pytest.raises(ConfigError, match="no space left on device"):
        write_record(record("first", ray_pid=2))
    assert sorted(path.name for path in tiny_disk.iterdir()) == ["filler", "first.json"]
    found = read_record("first")
    assert found is not None
    assert found.ray_pid == 1


def test_only_its_owner_reads_a_record() -> None:
    write_record(record("first"))
    (path,) = state_folder().iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
