"""The seam between checkpoints and a place of files, what a path in it may be, and how its failures are told.

Paths are relative to the place, with "/" between names. What files mean is for others.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from mempool.errors import DataLoss, MempoolError, StorageFailed

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_MAX_PATH = 400

_ADVICE = {
    errno.ENOSPC: "Make room there, or give another place.",
    errno.EDQUOT: "Make room there, or give another place.",
    errno.EACCES: "Give this user the right to use it, or another place.",
    errno.EPERM: "Give this user the right to use it, or another place.",
    errno.EROFS: "It is mounted read-only: give another place.",
    errno.EIO: "The disk fails: give another place.",
}


class FileWriter(Protocol):
    """A file that is being written, from its beginning on."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append."""


class Store(Protocol):
    """A place of files. All methods raise StorageFailed where the place does not do what is asked.

    Attributes:
        url: What the user gave; messages name files by it.
    """

    @property
    def url(self) -> str: ...

    def create(self, path: str) -> AbstractContextManager[FileWriter]:
        """Write a file. It is there, whole and durable, once the context is left; left by an error, it is not.

        A place that cannot rename shows it earlier: nothing counts that no manifest names.
        """

    def put(self, path: str, data: bytes) -> None:
        """Write a small file at once, over an older one: readers see one or the other where the place can do that."""

    def read(self, path: str) -> bytes:
        """A small file, whole. Raises NotFound."""

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from an offset on. Raises DataLoss where the file is missing or ends before."""

    def list(self, folder: str = "") -> dict[str, int]:
        """Every file in a folder and the folders in it: path -> bytes. Nothing where there is no such folder."""

    def remove(self, path: str) -> None:
        """Remove a file, durably, and its folder when it was the last there; one that is gone is no error."""


def check_path(path: str) -> str:
    """The path. Raises DataLoss for one that could lead out of the place: it may be from a file that anybody made."""
    names = path.split("/")
    if len(path) > _MAX_PATH or not all(_NAME.fullmatch(name) for name in names):
        raise DataLoss(
            f"{path[:80]!r} is no path of a checkpoint's file: names of letters, digits, _ . - with / between them, at "
            f"most {_MAX_PATH} characters. Was the manifest written by mempool?"
        )
    return path


def place_of(url: str, path: str) -> str:
    """A file as messages name it."""
    return f"{url.rstrip('/')}/{path}" if path else url


def ends_early(url: str, path: str, *, wanted: int) -> DataLoss:
    """What is raised where a file is shorter than it was."""
    return DataLoss(
        f"{place_of(url, path)} ends before byte {wanted:_}: the file is cut off. Copy it again from where it is "
        f"whole, or restore another checkpoint"
    )


def is_missing(url: str, path: str) -> DataLoss:
    """What is raised where a file that should be there is not."""
    return DataLoss(
        f"{place_of(url, path)} is missing, and a checkpoint needs it. Copy it there again, or restore another "
        f"checkpoint"
    )


@contextmanager
def told(doing: str, url: str, path: str = "") -> Iterator[None]:
    """Tell failures of a place as StorageFailed. doing: "write", "read", ..."""
    try:
        yield
    except MempoolError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        advice = _ADVICE.get(error.errno or 0, "Is the place right, and can it be reached?")
        raise StorageFailed(
            f"cannot {doing} {place_of(url, path)}: {reason}. {advice}", errno=error.errno or 0
        ) from error
