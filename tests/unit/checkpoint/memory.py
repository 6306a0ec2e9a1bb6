"""A place of files in memory, which dies at the n-th thing that it is asked to do, as a machine may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mempool.checkpoint.stores import FileWriter, check_path
from mempool.checkpoint.stores.store import ends_early, is_missing
from mempool.errors import NotFound, StorageFailed


class Died(BaseException):
    """The process is no more: nothing after it runs."""


class MemoryStore:
    """As ``Store``.

    Attributes:
        files: What is there.
        dies_at: Dies in the n-th change, having done it in part; None: never.
        fails_at: The n-th change fails, as on a disk that is full for a moment; None: none does.
        changes: So far.
        renames: Files are there once they are whole; otherwise they grow in sight.
    """

    def __init__(self, files: dict[str, bytes] | None = None, *, renames: bool = True) -> None:
        self.files = files if files is not None else {}
        self.dies_at: int | None = None
        self.fails_at: int | None = None
        self.changes = 0
        self.renames = renames

    @property
    def url(self) -> str:
        return "memory"

    @contextmanager
    def create(self, path: str) -> Iterator[FileWriter]:
        check_path(path)
        seen = f"{path}.0badcafe.part" if self.renames else path
        file = _File(self, seen)
        self.change()
        self.files[seen] = b""
        try:
            yield file
            self.change()
            self.files[path] = self.files.pop(seen)
        except Died:
            raise
        except BaseException:
            self.files.pop(seen, None)
            raise

    def put(self, path: str, data: bytes) -> None:
        with self.create(path) as file:
            file.write(data)

    def read(self, path: str) -> bytes:
        if check_path(path) not in self.files:
            raise NotFound(f"{path}: there is no such file")
        return self.files[path]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        if check_path(path) not in self.files:
            raise is_missing(self.url, path)
        data = self.files[path][offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise ends_early(self.url, path, wanted=offset + len(buffer))
        buffer[:] = data

    def list(self, folder: str = "") -> dict[str, int]:
        return {path: len(data) for path, data in self.files.items() if path.startswith(f"{folder}/" if folder else "")}

    def remove(self, path: str) -> None:
        self.change()
        self.files.pop(check_path(path), None)

    def change(self) -> None:
        self.changes += 1
        if self.dies_at is not None and self.changes >= self.dies_at:
            raise Died
        if self.changes == self.fails_at:
            raise StorageFailed("no space left")


class _File:
    def __init__(self, store: MemoryStore, path: str) -> None:
        self._store, self._path = store, path

    def write(self, data: bytes | memoryview) -> None:
        try:
            self._store.change()
        except Died:
            self._store.files[self._path] += bytes(data)[: len(data) // 2]
            raise
        self._store.files[self._path] += bytes(data)
