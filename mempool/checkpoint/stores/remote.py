"""Files at an fsspec URL: object stores and others, each by the user's own fsspec package.

Nothing there is renamed: names are used once, and the manifest, written last, decides what counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mempool.checkpoint.stores.store import FileWriter, check_path, ends_early, is_missing, place_of, told
from mempool.errors import MempoolError, NotFound, StorageFailed


class FsspecStore:
    """A folder of an fsspec file system (Any: fsspec has no types of its own). As ``LocalStore``."""

    def __init__(self, url: str, file_system: Any, root: str, *, own_names: bool = False) -> None:
        self._own_names = own_names
        self._url = url
        self._files = file_system
        self._root = root.rstrip("/")

    @property
    def url(self) -> str:
        return self._url

    @contextmanager
    def create(self, path: str) -> Iterator[FileWriter]:
        target = self._file(path)
        with self._told("write", path):
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            file = self._files.open(target, "wb")
        try:
            yield _Told(self, file, path)
        except BaseException:
            with suppress(Exception):
                getattr(file, "discard", file.close)()
            with suppress(Exception):
                self._files.rm_file(target)
            raise
        with self._told("write", path):
            file.close()

    def put(self, path: str, data: bytes) -> None:
        target = self._file(path)
        with self._told("write", path):
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(target, data)

    def read(self, path: str) -> bytes:
        with self._told("read", path):
            try:
                return bytes(self._files.cat_file(self._file(path)))
            except FileNotFoundError:
                raise NotFound(f"{place_of(self.url, path)}: there is no such file") from None

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        with self._told("read", path):
            try:
                data = self._files.cat_file(self._file(path), start=offset, end=offset + len(buffer))
            except FileNotFoundError:
                raise is_missing(self.url, path) from None
        if len(data) != len(buffer):
            raise ends_early(self.url, path, wanted=offset + len(buffer))
        buffer[:] = data

    def list(self, folder: str = "") -> dict[str, int]:
        root = self._file(folder) if folder else self._root
        with self._told("read", folder):
            self._files.invalidate_cache()
            try:
                found = self._files.find(root, detail=True)
            except FileNotFoundError:
                return {}
        before = len(self._root) + 1
        return {name[before:]: int(info["size"]) for name, info in found.items() if name.startswith(f"{self._root}/")}

    def remove(self, path: str) -> None:
        target = self._file(path)
        with self._told("remove", path), suppress(FileNotFoundError):
            self._files.rm_file(target)
        with suppress(Exception):  # object stores have no folders, and others keep one that is not empty
            self._files.rmdir(target.rpartition("/")[0])

    def _file(self, path: str) -> str:
        return f"{self._root}/{path if self._own_names else check_path(path)}"

    @contextmanager
    def _told(self, doing: str, path: str) -> Iterator[None]:
        """Backends raise errors of their own kinds, which are no OSErrors."""
        try:
            with told(doing, self.url, path):
                yield
        except MempoolError:
            raise
        except Exception as error:
            where = place_of(self.url, path)
            raise StorageFailed(
                f"cannot {doing} {where}: {error!r}. Is the place right, and may you use it?"
            ) from error


class _Told:
    def __init__(self, store: FsspecStore, file: Any, path: str) -> None:
        self._store, self._file, self._path = store, file, path

    def write(self, data: bytes | memoryview) -> None:
        with self._store._told("write", self._path):
            self._file.write(data)
