"""One contract for real files and those of the tests; and what the tests' disk does that a real one does seldom."""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakefiles import FakeFiles, PowerCut

from mempool.errors import StorageFailed
from mempool.journal import DiskFiles, Files
from mempool.journal.files import join


@pytest.fixture(params=["disk", "fake"])
def here(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Files, str]:
    if request.param == "disk":
        return DiskFiles(), str(tmp_path)
    files = FakeFiles()
    files.make_folder("room")
    return files, "room"


def test_many_buffers_are_written_as_one(here: tuple[Files, str]) -> None:
    files, folder = here
    file = files.open(join(folder, "a"), new=True)
    parts = [bytes([n % 256]) * (n % 5) for n in range(3000)]  # more than one call of the system takes, empty ones too
    whole = b"".join(parts)
    assert file.write([memoryview(part) for part in parts], 7) == len(whole)
    assert file.read(0, 10**6) == bytes(7) + whole
    assert file.read(7 + len(whole) - 3, 10) == whole[-3:]
    assert file.read(10**6, 10) == b""
    assert file.size() == 7 + len(whole)
    file.sync()
    file.truncate(9)
    assert file.read(0, 100) == bytes(7) + whole[:2]
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(0, 1)


def test_what_is_read_once_is_what_was_written(here: tuple[Files, str]) -> None:
    files, folder = here
    file = files.open(join(folder, "a"), new=True)
    whole = os.urandom(3 * 2**16 + 17)
    file.write([whole], 0)
    places = [0, 1, 4095, 2**16 - 1, 2**16, 3 * 2**16, 3 * 2**16 + 5]
    for at, num_bytes in [(at, count) for at in places for count in (0, 1, 2, 2**16, 2**17 + 3, 10**6)]:
        assert bytes(file.read_once(at, num_bytes)) == whole[at : at + num_bytes], (at, num_bytes)
    assert not len(file.read_once(len(whole), 1))
    assert not len(file.read_once(10**6, 1))
    at = 0
    while part := bytes(file.read_once(at, 2**16 + 100)):  # one behind the other
        assert part == whole[at : at + 2**16 + 100]
        at += len(part)
    assert at == len(whole)
    assert bytes(file.read_once(4089, 9)) == whole[4089:4098]
    file.write([b"changed"], 4090)
    assert bytes(file.read_once(4089, 9)) == whole[4089:4090] + b"changed" + whole[4097:4098]
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read_once(10**6, 1)


def test_what_is_read_once_is_whole_where_the_system_gives_less_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system in a process of its own may."""
    file, read = DiskFiles().open(str(tmp_path / "a"), new=True), os.preadv
    whole = os.urandom(3 * 4096 + 17)
    file.write([whole], 0)
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: read(descriptor, [buffers[0][:4608]], at))
    for at, num_bytes in ((0, 3 * 4096), (4095, 6000), (1, len(whole))):
        assert bytes(file.read_once(at, num_bytes)) == whole[at : at + num_bytes], (at, num_bytes)
    file.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep what they want")
def test_what_is_read_once_is_not_kept_in_memory(tmp_path: Path) -> None:
    path, size = tmp_path / "a", 9 * 2**20
    file = DiskFiles().open(str(path), new=True)
    file.write([bytes(size)], 0)
    file.sync()
    file.begin_sync(0, size)  # what was written is not kept either
    if kept_pages(path):
        pytest.skip("this file system keeps all there is")
    for first in range(0, size, 2**20 + 7):
        assert not bytes(file.read_once(first, 2**20 + 7)).strip(b"\0")
    assert all(page >= 2 * 4 * 2**20 // mmap.PAGESIZE for page in kept_pages(path)), "blocks that were read are let go"
    file.close()
    assert kept_pages(path) == []


def kept_pages(path: Path) -> list[int]:
    """The pages of a file that the system has in memory. Reading them would have it read ahead."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        found = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0
        return [number for number, there in enumerate(found) if there & 1]


def test_files_keep_their_bytes_under_new_names(here: tuple[Files, str]) -> None:
    files, folder = here
    for name in ("b", "a"):
        with_bytes = files.open(join(folder, name), new=True)
        with_bytes.write([name.encode()], 0)
        with_bytes.close()
    assert files.names(folder) == ["a", "b"]
    files.rename(join(folder, "b"), join(folder, "a"))
    files.sync_folder(folder)
    assert files.names(folder) == ["a"]
    file = files.open(join(folder, "a"))
    assert file.read(0, 9) == b"b"
    file.close()
    files.open(join(folder, "a"), new=True).close()
    file = files.open(join(folder, "a"))
    assert file.size() == 0
    file.close()
    files.remove(join(folder, "a"))
    assert files.names(folder) == []


def test_folders_are_made_with_those_above(here: tuple[Files, str]) -> None:
    files, folder = here
    deep = join(folder, "x", "y", "z")
    assert files.names(deep) == []
    files.make_folder(deep)
    files.make_folder(deep)
    assert files.names(join(folder, "x")) == ["y"]
    assert files.free_bytes(deep) > 0
    files.open(join(deep, "file"), new=True).close()
    with pytest.raises(StorageFailed, match=r"file.*no folder") as told:
        files.make_folder(join(deep, "file", "below"))
    assert told.value.errno == errno.ENOTDIR
    with pytest.raises(StorageFailed, match="no folder"):
        files.names(join(deep, "file"))


def test_what_is_not_there_is_named(here: tuple[Files, str]) -> None:
    files, folder = here
    for call in (files.open, files.remove, lambda path: files.rename(path, path + "2"), files.sync_folder):
        with pytest.raises(StorageFailed, match=r"could not .*/nothing: there is no such file") as told:
            call(join(folder, "nothing"))
        assert told.value.errno == errno.ENOENT


def test_a_lock_keeps_others_out_and_names_them(here: tuple[Files, str]) -> None:
    files, folder = here
    lock = files.lock(join(folder, "LOCK"), owner="process 17 on host")
    with pytest.raises(StorageFailed, match=r"locked by process 17 on host.*another path") as told:
        files.lock(join(folder, "LOCK"), owner="process 18 on host")
    assert told.value.errno == errno.EWOULDBLOCK
    lock.release()
    lock.release()
    files.lock(join(folder, "LOCK"), owner="process 18 on host").release()


def test_a_lock_that_is_released_is_free_whatever_was_forked_meanwhile(tmp_path: Path) -> None:
    lock = DiskFiles().lock(str(tmp_path / "LOCK"), owner="process 17")
    forked = os.dup(lock._descriptor or -1)  # as a child of this process has it
    lock.release()
    DiskFiles().lock(str(tmp_path / "LOCK"), owner="process 17").release()
    os.close(forked)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        "import os, sys; from mempool.journal import DiskFiles\n"
        "lock = DiskFiles().lock(sys.argv[1], owner=f'process {os.getpid()}'); print(os.getpid(), flush=True); input()"
    )
    path = str(tmp_path / "LOCK")
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        pid = int(other.stdout.readline())
        with pytest.raises(StorageFailed, match=rf"locked by process {pid}:"):
            DiskFiles().lock(path, owner="me")
        other.kill()
        other.wait(timeout=10)
        DiskFiles().lock(path, owner="me").release()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_says_so() -> None:
    file = DiskFiles().open("/dev/full")
    with pytest.raises(StorageFailed, match=r"could not write to /dev/full: the disk is full\. Make room") as told:
        file.write([b"x"], 0)
    assert told.value.errno == errno.ENOSPC
    file.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EIO, "input/output error.*dmesg"), (errno.EROFS, "read-only.*Mount"), (errno.ENOSPC, "full.*Make room")],
)
def test_failures_are_told_apart(code: int, words: str) -> None:
    files = FakeFiles()
    file = files.open("a", new=True)
    files.fail(1, code)
    with pytest.raises(StorageFailed, match=words) as told:
        file.write([b"x"], 0)
    assert told.value.errno == code


def test_a_power_cut_leaves_what_was_synced() -> None:
    lost = torn = 0
    for seed in range(200):
        files = FakeFiles(seed)
        file = files.open("a", new=True)
        file.write([b"1" * 100], 0)
        file.sync()
        files.sync_folder("")
        file.write([b"2" * 200], 100)
        files.open("b", new=True)
        files.power_cut()
        left = files.content("a")
        assert left[:100] == b"1" * 100
        assert set(left[100:]) <= set(b"\x002")
        lost += len(left) == 100
        torn += 0 < left[100:].count(b"2") < 200
    assert lost > 20
    assert torn > 20


def test_after_a_sync_that_failed_the_next_one_says_yes_to_what_is_lost() -> None:
    left = set()
    for seed in range(50):
        files = FakeFiles(seed)
        file = files.open("a", new=True)
        files.sync_folder("")
        file.write([b"x"], 0)
        files.fail(1, errno.EIO)
        with pytest.raises(StorageFailed, match="could not sync"):
            file.sync()
        file.sync()
        assert files.content("a") == b"x"
        files.power_cut()
        left.add(files.content("a"))
    assert left >= {b"", b"x"}


def test_nothing_goes_on_after_the_power_went() -> None:
    files = FakeFiles()
    files.cut_power_at(2)
    file = files.open("a", new=True)
    with pytest.raises(PowerCut):
        file.write([b"abc"], 0)
    files.power_cut()
    with pytest.raises(AssertionError, match="before the process died"):
        file.sync()
