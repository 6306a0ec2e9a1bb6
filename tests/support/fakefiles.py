"""``Files`` in memory, on a seed: a disk that keeps apart what was synced and what was not.

A power cut loses, tears or reorders what was not synced, and what files were called whose folder was not; any operation
can fail, or be the last one. Room runs out, bits flip. One seed is one history.
"""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from mempool.errors import StorageFailed
from mempool.journal.files import Bytes, is_locked, storage_failed

BLOCK_BYTES = 64
"""A power cut keeps or loses so much at once: less than a disk's sector, so that small files are torn too."""


class PowerCut(BaseException):
    """The machine is off: nothing after this happens."""


@dataclass
class _Change:
    """A write (or a cut, where data is None) since the last sync."""

    at: int
    data: bytes | None


@dataclass
class _Inode:
    durable: bytearray = field(default_factory=bytearray)
    now: bytearray = field(default_factory=bytearray)
    changes: list[_Change] = field(default_factory=list)


@dataclass
class _Naming:
    """A file given a name, or a name taken away, since the last sync of the folder."""

    path: str
    inode: _Inode | None
    gone: str | None = None


class FakeFiles:
    """A disk.

    Args:
        seed: Of what a power cut leaves.
        capacity_bytes: Its size.

    Attributes:
        operations: (name, path) of everything that was done.
        failing: The chance that an operation fails with EIO.
        on_cut: Told when the power goes in the middle of an operation.
    """

    def __init__(self, seed: int = 0, *, capacity_bytes: int = 2**40) -> None:
        self.random = Random(f"{seed}/disk")
        self.capacity_bytes = capacity_bytes
        self.operations: list[tuple[str, str]] = []
        self.failing = 0.0
        self.on_cut: Callable[[], None] = lambda: None
        self._files: dict[str, _Inode] = {}
        self._durable: dict[str, _Inode] = {}
        self._folders = {"", "."}
        self._namings: dict[str, list[_Naming]] = {}
        self._locks: dict[str, tuple[int, str]] = {}
        self._life = 0
        self._faults: dict[int, int] = {}
        self._cut_at: int | None = None

    # What a test does to the disk

    def fail(self, number: int, code: int) -> None:
        """The operation ``number`` from now (1: the next) fails with ``code``."""
        self._faults[len(self.operations) + number] = code

    def cut_power_at(self, number: int) -> None:
        """The power goes in the middle of the operation ``number`` from now: it raises PowerCut, as do all later."""
        self._cut_at = len(self.operations) + number

    def fill(self, room: int) -> None:
        """So many bytes of room are left."""
        self.capacity_bytes = self._used() + room

    def heal(self) -> None:
        """No more faults that were asked for; there is room."""
        self.failing = 0.0
        self.capacity_bytes = max(self.capacity_bytes, 2**40)
        self._faults.clear()
        self._cut_at = None

    def killed(self) -> None:
        """The process is dead, the machine goes on: what was written is there, locks are not."""
        self._cut_at = None
        self._life += 1
        self._locks.clear()

    def power_cut(self) -> None:
        """What is left is what was synced, and of the rest what the seed leaves. Locks are gone."""
        self.killed()
        for path, namings in sorted(self._namings.items()):
            self._names_left(namings)
            self._namings[path] = []
        self._files = dict(self._durable)
        for _, inode in sorted(self._files.items(), key=lambda item: item[0]):
            inode.durable, inode.changes = self._bytes_left(inode), []
            inode.now = bytearray(inode.durable)

    def flip(self, path: str, bit: int) -> None:
        """Flip one bit of a file, as a failing disk does."""
        inode = self._files[path]
        for data in (inode.now, inode.durable):
            if bit // 8 < len(data):
                data[bit // 8] ^= 1 << bit % 8

    def cut(self, path: str, num_bytes: int) -> None:
        """Cut a file durably."""
        inode = self._files[path]
        inode.now, inode.changes = inode.now[:num_bytes], []
        inode.durable = bytearray(inode.now)

    def forget(self, path: str) -> None:
        """A file is gone, durably."""
        del self._files[path]
        self._durable.pop(path, None)

    def content(self, path: str) -> bytes:
        """What a file has now."""
        return bytes(self._files[path].now)

    def paths(self) -> list[str]:
        """All files."""
        return sorted(self._files)

    def copy(self) -> "FakeFiles":
        """The same disk as it is now, durable as a whole, with nobody at it."""
        same = FakeFiles()
        same._folders = set(self._folders)
        for path, inode in self._files.items():
            same._files[path] = same._durable[path] = _Inode(bytearray(inode.now), bytearray(inode.now))
        return same

    # Files

    def open(self, path: str, *, new: bool = False) -> "FakeFile":
        self._did("open", path)
        if parent(path) not in self._folders:
            raise _error(errno.ENOENT, path, "make" if new else "open")
        if path in self._folders:
            raise _error(errno.EISDIR, path, "open")
        inode = self._files.get(path)
        if inode is None:
            if not new:
                raise _error(errno.ENOENT, path, "open")
            inode = self._files[path] = _Inode()
            self._named(path, _Naming(path, inode))
        elif new:
            inode.changes.append(_Change(0, None))
            inode.now.clear()
        return FakeFile(self, path, inode, self._life)

    def names(self, folder: str) -> list[str]:
        self._did("names", folder)
        if folder in self._files:
            raise _error(errno.ENOTDIR, folder, "list")
        found = {*self._files, *self._folders}
        return sorted(path.rpartition("/")[2] for path in found if path and parent(path) == folder)

    def make_folder(self, path: str) -> None:
        self._did("make_folder", path)
        while path and path not in self._folders:
            if path in self._files:
                raise _error(errno.ENOTDIR, path, "make the folder")
            self._folders.add(path)
            path = parent(path)

    def rename(self, path: str, to: str) -> None:
        self._did("rename", path)
        if path not in self._files:
            raise _error(errno.ENOENT, path, "rename")
        inode = self._files[to] = self._files.pop(path)
        self._named(to, _Naming(to, inode, gone=path))

    def remove(self, path: str) -> None:
        self._did("remove", path)
        if path not in self._files:
            raise _error(errno.ENOENT, path, "remove")
        del self._files[path]
        self._named(path, _Naming(path, None))

    def sync_folder(self, path: str) -> None:
        self._did("sync_folder", path)
        if path not in self._folders:
            raise _error(errno.ENOENT, path, "sync the folder")
        for naming in self._namings.pop(path, []):
            self._apply(naming)

    def lock(self, path: str, *, owner: str) -> "FakeLock":
        self._did("lock", path)
        if parent(path) not in self._folders:
            raise _error(errno.ENOENT, path, "lock")
        if path in self._locks:
            raise is_locked(path, self._locks[path][1])
        if path not in self._files:
            self._files[path] = self._durable[path] = _Inode()
        self._locks[path] = (self._life, owner)
        return FakeLock(self, path, self._life)

    def free_bytes(self, path: str) -> int:
        self._did("free_bytes", path)
        return max(0, self.capacity_bytes - self._used())

    # What they are made of

    def _did(self, what: str, path: str, half: Callable[[], None] = lambda: None) -> None:
        """Count an operation, and fail it where that was asked for; ``half`` does a part of it before."""
        self.operations.append((what, path))
        number = len(self.operations)
        if self._cut_at is not None and number >= self._cut_at:
            if number == self._cut_at:
                half()
                self.on_cut()
            raise PowerCut(f"in operation {number}: {what} {path}")
        code = self._faults.pop(number, None)
        if self.failing and what != "lock" and self.random.random() < self.failing:
            code = errno.EIO
        if code is not None:
            half()
            raise _error(code, path, what)

    def _used(self) -> int:
        return sum(len(inode.now) for inode in self._files.values())

    def _named(self, path: str, naming: _Naming) -> None:
        self._namings.setdefault(parent(path), []).append(naming)

    def _apply(self, naming: _Naming) -> None:
        if naming.gone is not None:
            self._durable.pop(naming.gone, None)
        if naming.inode is not None:
            self._durable[naming.path] = naming.inode
        else:
            self._durable.pop(naming.path, None)

    def _names_left(self, namings: list[_Naming]) -> None:
        """Mostly a first part of what was not synced, as a journaling file system leaves; else any part of it."""
        kept = self.random.randint(0, len(namings))
        anyhow = self.random.random() < 0.3
        for place, naming in enumerate(namings):
            if (self.random.random() < 0.5) if anyhow else place < kept:
                self._apply(naming)

    def _bytes_left(self, inode: _Inode) -> bytearray:
        """What a power cut leaves of a file: of each block that was written, what was there before or any later one."""
        data = bytearray(inode.durable)
        how = self.random.choice(("nothing", "everything", "prefix", "blocks", "blocks"))
        kept = self.random.randint(0, len(inode.changes))
        for place, change in enumerate(inode.changes):
            if how == "nothing" or (how == "prefix" and place > kept):
                break
            if change.data is None:
                if how != "blocks" or self.random.random() < 0.5:
                    del data[change.at :]
                continue
            written = change.data
            if how == "prefix" and place == kept:
                written = written[: self.random.randint(0, len(written))]
            if how == "blocks":
                self._blocks_left(data, change.at, written)
            else:
                _put(data, change.at, written)
        return data

    def _blocks_left(self, data: bytearray, at: int, written: bytes) -> None:
        share = self.random.random()
        if self.random.random() < 0.5:  # the size came through before the bytes: zeros
            data.extend(bytes(max(0, at + len(written) - len(data))))
        place = 0
        while place < len(written):
            stop = min(len(written), (at + place) // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES - at)
            if self.random.random() < share:
                _put(data, at + place, written[place:stop])
            place = stop


class FakeFile:
    """An open file of a ``FakeFiles``."""

    def __init__(self, files: FakeFiles, path: str, inode: _Inode, life: int) -> None:
        self.path = path
        self._files = files
        self._inode = inode
        self._life: int | None = life

    def write(self, buffers: Sequence[Bytes], at: int) -> int:
        data = b"".join(buffers)
        self._alive()
        files = self._files

        def half() -> None:
            self._put(at, data[: files.random.randint(0, len(data))])

        files._did("write", self.path, half)
        room = files.capacity_bytes - files._used() + len(self._inode.now) - at
        if room < len(data):
            self._put(at, data[: max(0, room)])
            raise _error(errno.ENOSPC, self.path, "write to")
        self._put(at, data)
        return len(data)

    def begin_sync(self, at: int, num_bytes: int) -> None:  # whether it reached the disk is the power cut's to say
        pass

    def sync(self) -> None:
        self._alive()
        inode = self._inode

        def half() -> None:  # what did not reach the disk is taken for clean: the next sync says yes to it
            inode.durable, inode.changes = self._files._bytes_left(inode), []

        self._files._did("sync", self.path, half)
        for change in inode.changes:
            if change.data is None:
                del inode.durable[change.at :]
            else:
                _put(inode.durable, change.at, change.data)
        inode.changes = []

    def read(self, at: int, num_bytes: int) -> bytes:
        self._alive()
        self._files._did("read", self.path)
        return bytes(self._inode.now[at : at + num_bytes])

    def read_once(self, at: int, num_bytes: int) -> memoryview:
        return memoryview(self.read(at, num_bytes))

    def size(self) -> int:
        self._alive()
        self._files._did("size", self.path)
        return len(self._inode.now)

    def truncate(self, num_bytes: int) -> None:
        self._alive()
        self._files._did("truncate", self.path)
        self._inode.now.extend(bytes(max(0, num_bytes - len(self._inode.now))))
        del self._inode.now[num_bytes:]
        self._inode.changes.append(_Change(num_bytes, None))

    def close(self) -> None:
        self._life = None

    def _put(self, at: int, data: bytes) -> None:
        if data:
            _put(self._inode.now, at, data)
            self._inode.changes.append(_Change(at, data))

    def _alive(self) -> None:
        if self._life is None:
            raise ValueError(f"{self.path} is closed")
        assert self._life == self._files._life, f"{self.path} was opened before the process died"


class FakeLock:
    """A lock of a ``FakeFiles``."""

    def __init__(self, files: FakeFiles, path: str, life: int) -> None:
        self._files, self._path, self._life = files, path, life

    def release(self) -> None:
        if self._files._locks.get(self._path, (None, ""))[0] == self._life:
            del self._files._locks[self._path]


def parent(path: str) -> str:
    """The folder of a path."""
    return path.rpartition("/")[0]


def _put(data: bytearray, at: int, written: bytes) -> None:
    data.extend(bytes(max(0, at - len(data))))
    data[at : at + len(written)] = written


def _error(code: int, path: str, doing: str) -> StorageFailed:
    return storage_failed(OSError(code, ""), path, doing)
