"""How many shards a pool is meant to have, in its shards' folders; and what is removed of those."""

import os
import shutil
from pathlib import Path

import pytest

from mempool.errors import StorageFailed
from mempool.journal import DiskFiles
from mempool.rayhost.state.kept import (
    Wanted,
    drop_kept,
    kept_folders,
    kept_shards,
    read_wanted,
    remove_kept,
    write_wanted,
)


def folder(path: Path, shard: int) -> Path:
    """A shard's, with something in it."""
    made = path / "facts" / f"shard-{shard}"
    (made / "journal").mkdir(parents=True)
    (made / "journal" / "000000000001.segment").write_bytes(b"bytes")
    return made


def test_how_many_are_wanted_is_kept(tmp_path: Path) -> None:
    folder(tmp_path, 2)
    assert read_wanted(str(tmp_path), "facts", 2) is None
    for wanted in (Wanted(1, 3), Wanted(2, 5)):
        write_wanted(str(tmp_path), "facts", 2, wanted)
        assert read_wanted(str(tmp_path), "facts", 2) == wanted


@pytest.mark.parametrize("text", ["", "{", "[]", '{"number": 1}', '{"number": "x", "shards": 2}'])
def test_what_is_damaged_is_passed_over(tmp_path: Path, text: str) -> None:
    (folder(tmp_path, 0) / "wanted.json").write_text(text)
    assert read_wanted(str(tmp_path), "facts", 0) is None


def test_a_shards_folder_is_removed_as_a_whole(tmp_path: Path) -> None:
    assert not remove_kept(str(tmp_path), "facts", 0)
    folder(tmp_path, 0), folder(tmp_path, 11)
    (tmp_path / "facts" / "gone-half").mkdir()  # of a process that died at it
    assert kept_shards(str(tmp_path), "facts") == (0, 11)
    assert remove_kept(str(tmp_path), "facts", 0)
    assert sorted(path.name for path in (tmp_path / "facts").iterdir()) == ["shard-11"]
    said: list[str] = []
    drop_kept(str(tmp_path), "facts", say=said.append)
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_what_another_shard_removes_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    removed = shutil.rmtree

    def overtaken(path: str, **options: bool) -> None:
        monkeypatch.setattr(shutil, "rmtree", removed)
        removed(Path(path) if whole else Path(path, "journal"), **options)
        raise FileNotFoundError("another process was here")

    folder(tmp_path, 0)
    monkeypatch.setattr(shutil, "rmtree", overtaken)
    assert remove_kept(str(tmp_path), "facts", 0)
    assert list((tmp_path / "facts").iterdir()) == []


def test_what_a_process_uses_is_not_removed(tmp_path: Path) -> None:
    used = folder(tmp_path, 0)
    lock = DiskFiles().lock(str(used / "LOCK"), owner="somebody")
    try:
        with pytest.raises(StorageFailed, match="somebody"):
            remove_kept(str(tmp_path), "facts", 0)
    finally:
        lock.release()
    assert (used / "journal" / "000000000001.segment").read_bytes() == b"bytes"


def test_folders_tell_themselves_apart_and_when_they_were_changed(tmp_path: Path) -> None:
    for shard, changed_s in ((0, 5), (1, 9)):
        made = folder(tmp_path, shard)
        (made / "format.json").write_text("the same")
        os.utime(made / "format.json", (1, 1))
        os.utime(made / "journal", (2, 2))
        os.utime(made / "journal" / "000000000001.segment", (changed_s, changed_s))
    (tmp_path / "facts" / "shard-2").mkdir()  # of a shard that died before it had begun
    found = kept_folders(str(tmp_path), "facts")
    assert {shard: kept.changed_ns for shard, kept in found.items()} == {0: 5 * 10**9, 1: 9 * 10**9}
    assert found[0].mark != found[1].mark
    os.symlink(tmp_path, tmp_path / "mounted")
    assert kept_folders(str(tmp_path / "mounted"), "facts") == found
    write_wanted(str(tmp_path), "facts", 1, Wanted(1, 3))
    assert kept_folders(str(tmp_path), "facts")[1].wanted == Wanted(1, 3)
    assert kept_folders(str(tmp_path / "nowhere"), "facts") == {}
