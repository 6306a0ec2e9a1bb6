"""The place of a run's checkpoints: a ``Store`` on a simulated disk of its own, which all processes reach.

Files are written aside, synced and renamed as in a folder of this host (``LocalStore``), so that a power cut, a full
disk and one that fails do to them what they do to a shard's.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from random import Random
from types import TracebackType
from unittest import mock

from mempool.checkpoint import commit, writer
from mempool.checkpoint.format.manifest import Manifest, parse_manifest
from mempool.checkpoint.stores import opening
from mempool.checkpoint.stores.store import FileWriter, check_path, ends_early, is_missing, place_of
from mempool.errors import NotFound, StorageFailed
from mempool.journal.folder import ShardFolder
from tests.support.fakefiles import FakeFile, FakeFiles, parent

URL = "/place"


class Place:
    """A folder on a simulated disk; a ``Store``.

    Args:
        files: The disk.
        random: Gives names that nothing else has.
        on_manifest: Told each manifest as it is written, whether or not that ends well.
    """

    def __init__(self, files: FakeFiles, random: Random, *, on_manifest: Callable[[Manifest], None]) -> None:
        self.files = files
        self._random = random
        self._on_manifest = on_manifest

    @property
    def url(self) -> str:
        return URL

    def token_hex(self, num_bytes: int) -> str:
        return f"{self._random.getrandbits(8 * num_bytes):0{2 * num_bytes}x}"

    def create(self, path: str) -> AbstractContextManager[FileWriter]:
        return _Aside(self.files, self._path(path), f"{self._path(path)}.{self.token_hex(4)}.part")

    def put(self, path: str, data: bytes) -> None:
        if path.endswith("/manifest.json"):
            self._on_manifest(parse_manifest(data, path))
        with self.create(path) as file:
            file.write(data)

    def read(self, path: str) -> bytes:
        file = self._opened(path)
        if file is None:
            raise NotFound(f"{place_of(self.url, path)}: there is no such file")
        return file.read(0, file.size())

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        file = self._opened(path)
        if file is None:
            raise is_missing(self.url, path)
        data = file.read(offset, len(buffer))
        if len(data) < len(buffer):
            raise ends_early(self.url, path, wanted=offset + len(buffer))
        buffer[:] = data

    def list(self, folder: str = "") -> dict[str, int]:
        root = self._path(folder) + "/" if folder else URL + "/"
        self.files.names(root[:-1])  # which a disk may refuse
        return {
            path[len(URL) + 1 :]: len(self.files.content(path)) for path in self.files.paths() if path.startswith(root)
        }

    def remove(self, path: str) -> None:
        whole = self._path(path)
        if whole in self.files.paths():
            self.files.remove(whole)
            self.files.sync_folder(parent(whole))

    def _opened(self, path: str) -> FakeFile | None:
        whole = self._path(path)
        return self.files.open(whole) if whole in self.files.paths() else None

    def _path(self, path: str) -> str:
        return f"{URL}/{check_path(path)}"


class _Aside:
    """A file that is being written."""

    def __init__(self, files: FakeFiles, path: str, aside: str) -> None:
        self._files, self._path, self._aside = files, path, aside
        self._file: FakeFile | None = None
        self._at = 0

    def __enter__(self) -> "_Aside":
        self._files.make_folder(parent(self._path))
        self._file = self._files.open(self._aside, new=True)
        return self

    def write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._at += self._file.write([data], self._at)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if error is None:
                self._file.sync()
                self._files.rename(self._aside, self._path)
        except BaseException:
            self._discard()
            raise
        if error is not None:
            self._discard()
        else:
            self._files.sync_folder(parent(self._path))

    def _discard(self) -> None:
        with suppress(StorageFailed):
            self._files.remove(self._aside)


@contextmanager
def placed(place: Place) -> Iterator[None]:
    """Whoever opens a place of checkpoints meanwhile gets this one; names and dates are the seed's."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(opening, "_opened", return_value=place))
        for module in (commit, writer):
            stack.enter_context(mock.patch.object(module, "secrets", place))
        defaults = ShardFolder.__init__.__kwdefaults__
        assert defaults is not None
        stack.enter_context(mock.patch.dict(defaults, wall=lambda: 1.7e9))
        yield
