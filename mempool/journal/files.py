"""The seam behind which a disk stands: a few methods that real files and the tests' failing disks both have.

Says what each must hold. What is written where is for others.
"""

import errno
import os
from collections.abc import Sequence
from typing import Protocol

from mempool.errors import StorageFailed

Bytes = bytes | bytearray | memoryview
"""What can be written as it is: contiguous, of single bytes; ``views_of`` makes that of any."""


class File(Protocol):
    """One open file.

    Attributes:
        path: Where it was opened.
    """

    path: str

    def write(self, buffers: Sequence[Bytes], at: int) -> int:
        """Write all of them one behind the other from byte ``at`` on, uncopied; how many bytes that was.

        Not durable before ``sync``: a power cut may lose any part of it, and leave another.

        Raises:
            StorageFailed: Any part of it may be written.
        """

    def begin_sync(self, at: int, num_bytes: int) -> None:
        """Have these bytes on their way to the disk, so that the next ``sync`` has less to do. Promises nothing."""

    def sync(self) -> None:
        """Make durable what was written, and the file's size. The file's name is its folder's: ``Files.sync_folder``.

        Raises:
            StorageFailed: What was written since the last sync may be durable or not, whatever a later sync says.
        """

    def read(self, at: int, num_bytes: int) -> bytes:
        """Bytes from ``at`` on; fewer only at the end of the file."""

    def read_once(self, at: int, num_bytes: int) -> memoryview:
        """As ``read``, of what is not read again soon: the system need not keep it in memory. The view is of memory
        that the next call reads into."""

    def size(self) -> int:
        """Bytes of the file."""

    def truncate(self, num_bytes: int) -> None:
        """Cut it to so many bytes. Not durable before ``sync``."""

    def close(self) -> None:
        """Idempotent. Makes nothing durable."""


class Lock(Protocol):
    """A lock that is held."""

    def release(self) -> None:
        """Idempotent."""


class Files(Protocol):
    """A file system. Paths have "/" between names. All methods raise StorageFailed."""

    def open(self, path: str, *, new: bool = False) -> File:
        """Open a file to read and write. new: it is made empty; whatever had that name is lost."""

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted; none where there is no such folder.

        Raises:
            StorageFailed: errno is ENOTDIR where it is no folder.
        """

    def make_folder(self, path: str) -> None:
        """Make a folder and those above it, where they are missing, durably."""

    def rename(self, path: str, to: str) -> None:
        """Give a file another name of the same folder, in one act; what had it is lost. Durable by ``sync_folder``."""

    def remove(self, path: str) -> None:
        """Remove a file. Durable by ``sync_folder``."""

    def sync_folder(self, path: str) -> None:
        """Make durable what files of a folder are called."""

    def lock(self, path: str, *, owner: str) -> Lock:
        """Lock a file, made where it is missing, against everybody else until ``release`` or the process's end.

        Raises:
            StorageFailed: errno is EWOULDBLOCK where somebody else holds it; the message has the ``owner`` they gave.
        """

    def free_bytes(self, path: str) -> int:
        """Room that is left where a folder stands."""


def join(folder: str, *names: str) -> str:
    """A path below a folder."""
    return "/".join((folder.rstrip("/"), *names))


def views_of(buffers: Sequence[Bytes]) -> list[memoryview]:
    """Any contiguous buffers, numpy's too, as they can be written: of single bytes; empty ones are left out."""
    views = [memoryview(buffer) for buffer in buffers]
    return [view.cast("B") for view in views if view.nbytes]


def storage_failed(error: OSError, path: str, doing: str) -> StorageFailed:
    """What the operating system said, in words: what was being done, to which file, and what to do.

    Args:
        doing: As in "could not ``doing`` PATH".
    """
    why, remedy = _WORDS.get(error.errno or 0, (os.strerror(error.errno) if error.errno else str(error), ""))
    message = f"could not {doing} {path}: {why}" + (f". {remedy}" if remedy else "")
    return StorageFailed(message, errno=error.errno or 0)


def is_locked(path: str, owner: str, *, here: bool = False) -> StorageFailed:
    """Somebody else has the lock. here: of this very process."""
    which = "two processes cannot use one folder. Stop the other one, or give this one"
    if here:
        which = "that is this process, which has it open already. Close that first (pool.close()), or give"
    return StorageFailed(
        f"{path} is locked by {owner or 'another process'}: {which} another path (shard.storage.path, or "
        "mempool.local's).",
        errno=errno.EWOULDBLOCK,
    )


_PATH = "set shard.storage.path, or mempool.local's path,"
_FULL = f"Make room there, or {_PATH} to a larger disk; it goes on by itself when there is room."
_PERMITTED = f"Make it readable and writable for this user, or {_PATH} to a folder that is."
_WORDS = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("this user's share of the disk is used up", _FULL),
    errno.EIO: (
        "the disk reports an input/output error",
        "It may be failing: look at the kernel's log (dmesg), and copy what is on it to another one.",
    ),
    errno.EROFS: (
        "the file system is read-only",
        "Mount it writable (a failing disk is often made read-only by the kernel: see dmesg), or set another path.",
    ),
    errno.EACCES: ("permission denied", _PERMITTED),
    errno.EPERM: ("operation not permitted", _PERMITTED),
    errno.ENOTDIR: (
        "it, or what it should lie in, is no folder",
        f"S{_PATH[1:]} to a folder.",
    ),
    errno.ENOENT: ("there is no such file", ""),
    errno.EMFILE: ("this process has too many open files", "Raise its limit (ulimit -n)."),
}
