"""Places of files: one contract for a folder, for fsspec and for the tests' own; and how failures are told."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores import Store, open_store
from mempool.checkpoint.stores.local import LocalStore
from mempool.checkpoint.stores.remote import FsspecStore
from mempool.errors import DataLoss, InvalidRequest, NotFound, StorageFailed
from tests.unit.checkpoint.contents import PLAIN, Content, read, spread, write
from tests.unit.checkpoint.memory import MemoryStore


@pytest.fixture(params=["folder", "file", "fsspec", "in memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    place = f"memory://{secrets.token_hex(4)}/place"
    match request.param:
        case "folder":
            yield open_store(tmp_path / "place")
        case "file":
            yield open_store(f"file://{tmp_path}/place")
        case "fsspec":
            yield open_store(place)
            fsspec.filesystem("memory").store.clear()
        case _:
            yield MemoryStore()


def test_files_are_written_read_listed_and_removed(store: Store) -> None:
    assert store.list() == {}
    with store.create("a/b.bin") as file:
        file.write(b"0123")
        file.write(memoryview(b"456789"))
    store.put("c.json", b"{}")
    store.put("c.json", b"{ }")
    assert store.list() == {"a/b.bin": 10, "c.json": 3}
    assert store.list("a") == {"a/b.bin": 10}
    assert store.list("none") == {}
    assert (store.read("a/b.bin"), store.read("c.json")) == (b"0123456789", b"{ }")
    buffer = bytearray(4)
    store.read_into("a/b.bin", 3, memoryview(buffer))
    assert buffer == b"3456"
    store.read_into("a/b.bin", 3, memoryview(bytearray()))
    store.remove("a/b.bin")
    store.remove("a/b.bin")
    assert store.list() == {"c.json": 3}


def test_what_is_not_there_is_said(store: Store) -> None:
    store.put("short", b"0123")
    with pytest.raises(NotFound, match="none: there is no such file"):
        store.read("none")
    with pytest.raises(DataLoss, match="short ends before byte 5"):
        store.read_into("short", 1, memoryview(bytearray(4)))
    with pytest.raises(DataLoss, match="none is missing"):
        store.read_into("none", 0, memoryview(bytearray(4)))


def test_a_file_left_by_an_error_is_not_there(store: Store) -> None:
    def fail() -> None:
        with store.create("a/b.bin") as file:
            file.write(b"0123")
            raise error

    for error in (KeyError("x"), ConnectionError("the caller's own")):
        with pytest.raises(type(error), match=r"x|own") as raised:
            fail()
        assert raised.value is error
    assert store.list() == {}


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/.", ".", "a\x00", "a/ b", "a\\b", "é"]
)
def test_no_path_leads_out_of_the_place(store: Store, path: str) -> None:
    for act in (store.read, store.remove, lambda path: store.put(path, b"")):
        with pytest.raises(DataLoss, match="is no path of a checkpoint's file"):
            act(path)


def test_checkpoints_are_kept_in_any_place(store: Store) -> None:
    content = Content.random(PLAIN, seed=1)
    write(store, [content], shards=2)
    assert read(Checkpoint(store), "facts", spread(PLAIN, 1)).same(content)


def test_places_are_told_apart(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    assert open_store(f"file://{tmp_path}/a b").url == f"{tmp_path}/a b"
    assert isinstance(open_store("memory://x"), FsspecStore)
    for place, told in [
        ("", "is empty"),
        ("nothing://x", "nothing"),
        ("file://x", "not absolute"),
        ("s3://x/y", "s3fs"),
    ]:
        with pytest.raises(InvalidRequest, match=told):
            open_store(place)


def test_a_place_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFailed, match="file is a file, and checkpoints are kept in a folder"):
        open_store(tmp_path / "file").list()
    with pytest.raises(StorageFailed, match=r"cannot write .*file/x: .*\. Is the place right"):
        open_store(tmp_path / "file").put("x", b"")


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, "Make room"), (errno.EROFS, "read-only"), (errno.EIO, "fails")]
)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fails_is_said_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str, call: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    store = LocalStore(tmp_path)
    store.put("a/older", b"older")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        sentence = rf"cannot write {tmp_path}/a/new: {os.strerror(number)}\. .*{told}"
        with pytest.raises(StorageFailed, match=sentence) as raised:
            store.put("a/new", b"new")
    assert raised.value.errno == number
    assert store.list() == {"a/older": 5}


def test_a_write_that_is_taken_in_part_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    store = LocalStore(tmp_path)
    store.put("x", b"0123456789")
    assert store.read("x") == b"0123456789"


def test_a_folder_goes_with_its_last_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "place")
    store.put("a/x", b"")
    store.put("a/y", b"")
    store.remove("a/x")
    assert (tmp_path / "place" / "a").is_dir()
    store.remove("a/y")
    assert [path.name for path in (tmp_path / "place").iterdir()] == []


class Refusing:
    """A file system whose backend raises an error of its own kind."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError("403 Forbidden")

        return refuse


def test_a_backends_own_errors_are_told() -> None:
    store = FsspecStore("s3://bucket/run", Refusing(), "bucket/run")
    for act in (store.list, lambda: store.read("x"), lambda: store.put("x", b""), lambda: store.remove("x")):
        with pytest.raises(StorageFailed, match=r"cannot \w+ s3://bucket/run.*403 Forbidden.*Is the place right"):
            act()


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the system, in order."""
    done: list[str] = []

    def noted(name: str, what: Any) -> Any:
        real = getattr(os, name)

        def call(*given: Any) -> Any:
            done.append(what(*given))
            return real(*given)

        return call

    def synced(descriptor: int) -> str:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return f"sync {target.relative_to(tmp_path) if target.is_dir() else 'the file'}"

    monkeypatch.setattr(os, "write", noted("write", lambda *_: "write"))
    monkeypatch.setattr(os, "fsync", noted("fsync", synced))
    monkeypatch.setattr(os, "replace", noted("replace", lambda *_: "rename"))
    monkeypatch.setattr(os, "unlink", noted("unlink", lambda path, **_: f"remove {Path(path).name}"))
    return done


def test_a_file_is_durable_before_it_is_seen_and_its_name_after(tmp_path: Path, done: list[str]) -> None:
    """What a power cut leaves: the older file or the new one, whole."""
    LocalStore(tmp_path / "place").put("a/x", b"0123")
    assert done == ["sync place", "sync .", "write", "sync the file", "rename", "sync place/a"]


def test_what_is_removed_first_does_not_come_back_without_the_rest(tmp_path: Path, done: list[str]) -> None:
    """After a power cut: a manifest whose files are gone."""
    store = LocalStore(tmp_path / "place")
    store.put("a/manifest.json", b"0")
    store.put("a/x", b"1")
    done.clear()
    store.remove("a/manifest.json")
    store.remove("a/x")
    assert done == ["remove manifest.json", "sync place/a", "remove x", "sync place/a"]
