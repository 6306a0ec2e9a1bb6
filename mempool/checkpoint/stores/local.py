"""Files in a folder of this host: written aside, made durable, renamed."""

import ctypes
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mempool.checkpoint.stores.store import FileWriter, check_path, ends_early, is_missing, place_of, told
from mempool.errors import NotFound, StorageFailed

ASIDE = ".part"
"""How the name of a file ends that is not whole yet."""

_BEGIN_BYTES = 8 * 2**20
_SYNC_FILE_RANGE_WRITE = 2


class LocalStore:
    """A folder; it is made when the first file is written. As ``Store``.

    own_names: Paths are the user's own, not a manifest's: they may be any.
    """

    def __init__(self, root: str | Path, *, own_names: bool = False) -> None:
        self.root = Path(root).expanduser().absolute()
        self._own_names = own_names

    @property
    def url(self) -> str:
        return str(self.root)

    @contextmanager
    def create(self, path: str) -> Iterator[FileWriter]:
        target = self._file(path)
        aside = target.with_name(f"{target.name}.{secrets.token_hex(4)}{ASIDE}")
        with told("write", self.url, path):
            _make_folder(target.parent)
            file = open(aside, "xb", buffering=0)  # noqa: SIM115  # closed below
        try:
            with file:
                yield _Whole(self, file.fileno(), path)  # what fails there is not of the place
                with told("write", self.url, path):
                    os.fsync(file.fileno())
            with told("write", self.url, path):
                os.replace(aside, target)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise
        with told("write", self.url, path):
            _sync_folder(target.parent)

    def put(self, path: str, data: bytes) -> None:
        with self.create(path) as file:
            file.write(data)

    def read(self, path: str) -> bytes:
        with told("read", self.url, path):
            try:
                return self._file(path).read_bytes()
            except FileNotFoundError:
                raise NotFound(f"{place_of(self.url, path)}: there is no such file") from None

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        with told("read", self.url, path):
            try:
                file = open(self._file(path), "rb", buffering=0)  # noqa: SIM115  # so that only opening is caught
            except FileNotFoundError:
                raise is_missing(self.url, path) from None
            with file:
                file.seek(offset)
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done:])
                    if not count:
                        raise ends_early(self.url, path, wanted=offset + len(buffer))
                    done += count

    def list(self, folder: str = "") -> dict[str, int]:
        root = self._file(folder) if folder else self.root
        with told("read", self.url, folder):
            if root.exists() and not root.is_dir():
                raise StorageFailed(f"{root} is a file, and checkpoints are kept in a folder: give another place")
            found: dict[str, int] = {}
            for where, _, names in os.walk(root, onerror=_raise_unless_gone):
                for name in names:
                    file = Path(where, name)
                    try:
                        found[file.relative_to(self.root).as_posix()] = file.stat().st_size
                    except FileNotFoundError:  # removed meanwhile, or a link to nothing
                        continue
            return found

    def remove(self, path: str) -> None:
        file = self._file(path)
        with told("remove", self.url, path):
            file.unlink(missing_ok=True)
            if file.parent.is_dir():
                _sync_folder(file.parent)
            for folder in file.parents:
                if folder == self.root or not folder.is_relative_to(self.root):
                    break
                try:
                    folder.rmdir()
                except OSError:  # something is left there
                    break

    def _file(self, path: str) -> Path:
        return self.root / (path if self._own_names else check_path(path))


class _Whole:
    """Writes all it is given: the system may take less at once."""

    def __init__(self, store: LocalStore, descriptor: int, path: str) -> None:
        self._url, self._descriptor, self._path = store.url, descriptor, path
        self._written = self._begun = 0

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        with told("write", self._url, self._path):
            while len(rest):
                count = os.write(self._descriptor, rest)
                self._written += count
                rest = rest[count:]
        if self._written - self._begun >= _BEGIN_BYTES:
            _begin_sync(self._descriptor, self._begun, self._written - self._begun)
            self._begun = self._written


def _begin_sync(descriptor: int, offset: int, count: int) -> None:
    """Let the system begin with these bytes: the sync at the end, which alone counts, has less to wait for."""
    begin = getattr(_libc(), "sync_file_range", None)  # Linux
    if begin is not None:
        begin(descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A new name is durable once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
