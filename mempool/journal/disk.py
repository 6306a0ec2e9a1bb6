"""``Files`` of this machine: the operating system's calls, and its errors in words."""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mempool.journal.files import Bytes, is_locked, storage_failed

_MOST_BUFFERS = 1024
"""Of one call: IOV_MAX of Linux."""
_MOST_OWNER_BYTES = 1024
_LET_GO_BYTES = 4 * 2**20

# Where there is no fdatasync, fsync does more than is needed.
_sync = getattr(os, "fdatasync", os.fsync)


class DiskFiles:
    """The files of this machine. Calls that a signal interrupts are made again (PEP 475)."""

    def open(self, path: str, *, new: bool = False) -> "DiskFile":
        """See ``Files``."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if new else 0)
        with _told("make" if new else "open", path):
            return DiskFile(path, os.open(path, flags, 0o666))

    def names(self, folder: str) -> list[str]:
        """See ``Files``."""
        with _told("list", folder):
            try:
                return sorted(os.listdir(folder))
            except FileNotFoundError:
                return []

    def make_folder(self, path: str) -> None:
        """See ``Files``."""
        missing = []
        while path and not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path.rstrip("/"))
        for folder in reversed(missing):
            with _told("make the folder", folder):
                try:
                    os.mkdir(folder)
                except FileExistsError as error:
                    if not os.path.isdir(folder):  # a file has that name
                        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
            self.sync_folder(os.path.dirname(folder.rstrip("/")) or ".")

    def rename(self, path: str, to: str) -> None:
        """See ``Files``."""
        with _told(f"rename to {os.path.basename(to)}", path):
            os.replace(path, to)

    def remove(self, path: str) -> None:
        """See ``Files``."""
        with _told("remove", path):
            os.unlink(path)

    def sync_folder(self, path: str) -> None:
        """See ``Files``."""
        with _told("sync the folder", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def lock(self, path: str, *, owner: str) -> "DiskLock":
        """See ``Files``."""
        with _told("lock", path):
            # flock: a lock of fcntl's other kind is gone when any part of this process closes the file.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    other = os.pread(descriptor, _MOST_OWNER_BYTES, 0).decode(errors="replace").strip()
                    raise is_locked(path, other, here=other == owner) from None
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{owner}\n".encode()[:_MOST_OWNER_BYTES], 0)
            except BaseException:
                os.close(descriptor)
                raise
            return DiskLock(descriptor)

    def free_bytes(self, path: str) -> int:
        """See ``Files``."""
        with _told("ask for the room of", path):
            found = os.statvfs(path)
            return found.f_bavail * found.f_frsize


class DiskFile:
    """An open file of this machine."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._read = memoryview(b"")
        self._kept_from = self._kept_to = 0  # what was read once and is in the system's cache still

    def write(self, buffers: Sequence[Bytes], at: int) -> int:
        """See ``File``."""
        left = [memoryview(buffer) for buffer in buffers if len(buffer)]
        begin, first = at, 0
        with _told("write to", self.path):
            while first < len(left):
                written = os.pwritev(self._opened(), left[first : first + _MOST_BUFFERS], at)
                at += written
                while first < len(left) and written >= left[first].nbytes:
                    written -= left[first].nbytes
                    first += 1
                if written:  # a part of one: the system stops where the disk is full, and says so at the next call
                    left[first] = left[first][written:]
        return at - begin

    def begin_sync(self, at: int, num_bytes: int) -> None:
        """See ``File``. Linux begins to write back what it is told not to keep."""
        self._do_not_keep(at, num_bytes)

    def sync(self) -> None:
        """See ``File``."""
        with _told("sync", self.path):
            _sync(self._opened())

    def read(self, at: int, num_bytes: int) -> bytes:
        """See ``File``."""
        parts = []
        with _told("read", self.path):
            while num_bytes and (part := os.pread(self._opened(), num_bytes, at)):
                parts.append(part)
                at += len(part)
                num_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_once(self, at: int, num_bytes: int) -> memoryview:
        """See ``File``."""
        if len(self._read) < num_bytes:
            self._read = memoryview(bytearray(num_bytes))
        found, done = self._read[:num_bytes], 0
        with _told("read", self.path):
            while done < num_bytes and (count := os.preadv(self._opened(), [found[done:]], at + done)):
                done += count
        self._read_to(at, at + done)
        return found[:done]

    def _read_to(self, begin: int, end: int) -> None:
        """A gigabyte that stays in the system's cache takes one of memory, which what others read often makes way for,
        and which a virtual machine gets from its host more slowly than a disk reads. So that is let go, in blocks: of
        memory that lies together the system lets go all, or searches every processor for who uses the rest.
        """
        if not self._kept_from <= begin <= self._kept_to:
            self._do_not_keep(self._kept_from, self._kept_to - self._kept_from)
            self._kept_from = begin // _LET_GO_BYTES * _LET_GO_BYTES
        self._kept_to = end
        over = end // _LET_GO_BYTES * _LET_GO_BYTES
        if over > self._kept_from:
            self._do_not_keep(self._kept_from, over - self._kept_from)
            self._kept_from = over

    def size(self) -> int:
        """See ``File``."""
        with _told("ask for the size of", self.path):
            return os.fstat(self._opened()).st_size

    def truncate(self, num_bytes: int) -> None:
        """See ``File``."""
        with _told("cut", self.path):
            os.ftruncate(self._opened(), num_bytes)

    def close(self) -> None:
        """See ``File``."""
        if self._descriptor is not None:
            self._do_not_keep(self._kept_from, self._kept_to - self._kept_from)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with _told("close", self.path):
                os.close(descriptor)

    def _do_not_keep(self, at: int, num_bytes: int) -> None:
        if num_bytes > 0 and hasattr(os, "posix_fadvise"):  # 0: all from there on
            with suppress(OSError):  # advice, and no more
                os.posix_fadvise(self._opened(), at, num_bytes, os.POSIX_FADV_DONTNEED)

    def _opened(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        return self._descriptor


class DiskLock:
    """A lock that this process holds."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """See ``Lock``."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # Closing is not enough: a process that was forked meanwhile, as a DataLoader's, has the same lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


@contextmanager
def _told(doing: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_failed(error, path, doing) from error
