"""The snapshots of a shard: its pages as they were behind one record of its journal, of which the newest one counts.

A snapshot writes the pages that changed, as one pack, and a manifest that says where all pages lie. It counts when its
manifest has its name, which is last. Who may change pages meanwhile, and what pages mean, is for others.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import islice
from types import TracebackType

import xxhash

from mempool.errors import DataLoss, StorageFailed
from mempool.journal.files import Bytes, File, Files, join, views_of
from mempool.journal.packs import (
    PACK_BYTES,
    Manifest,
    Place,
    check_pack_header,
    pack_header,
    pack_manifest,
    page_parts,
    unpack_manifest,
    unpack_page,
)
from mempool.journal.reading import NEW
from mempool.journal.records import RESTORE, Damaged, Owner, lost, sum_of

_NAME = re.compile(r"(\d{12})\.(pack|manifest)")
_RUN_BYTES = 4 * 2**20
"""Read at once, where pages lie behind one another."""


class Snapshots:
    """The snapshots in one folder.

    Args:
        folder: Its own; it is there.
        owner: Whose pages these are.
        least_used: A pack of which a smaller share is still needed is written again, so that it can go: what lies on
            the disk is at most so many times as much.

    Attributes:
        newest: The one that counts; None where there is none.

    Raises:
        DataLoss: Its manifest is damaged, or a pack is missing. Nothing was changed.
        ConfigError: It is another shard's or pool's, or of a newer format. Nothing was changed.
        StorageFailed: It cannot be read.
    """

    def __init__(self, files: Files, folder: str, *, owner: Owner, least_used: float = 0.5) -> None:
        self._files = files
        self._folder = folder
        self._owner = owner
        self._least_used = least_used
        found = [(match[2], int(match[1])) for name in files.names(folder) if (match := _NAME.fullmatch(name))]
        self._begun = max((sequence for _, sequence in found), default=0)
        newest = max((sequence for kind, sequence in found if kind == "manifest"), default=0)
        self.newest: Manifest | None = self._read_manifest(newest) if newest else None
        self._sizes: dict[int, int] = {}
        for pack in {place.pack for place in self.newest.pages.values()} if self.newest else ():
            if ("pack", pack) not in found:
                raise DataLoss(f"{self._path(pack, 'pack')} is missing, and pages lie in it. {RESTORE}.")
            self._sizes[pack] = self._check_pack(pack)

    @property
    def num_bytes(self) -> int:
        """Of all packs that are needed."""
        return sum(self._sizes.values())

    def begin(self, *, after: int) -> "Snapshot":
        """Begin a new one. One at a time.

        Args:
            after: The number of the journal's record up to which all is in its pages: ``Journal.last``.
        """
        self._begun += 1
        return Snapshot(self, self._begun, after=after)

    def pages(self, keys: Iterable[bytes] | None = None) -> Iterator[tuple[bytes, dict[str, memoryview]]]:
        """Each page of the newest one with its arrays, as they lie on the disk: in no order of the caller's. Arrays are
        views of memory that the next page may be read into.

        keys: Of those that are wanted, all of the newest one's; None: all.

        Raises:
            DataLoss: A page is damaged; file and offset are named.
        """
        if self.newest is not None:
            pages = self.newest.pages
            yield from self._read(pages if keys is None else {key: pages[key] for key in keys})

    def tidy(self) -> None:
        """Remove what no snapshot needs: manifests first, and durably, so that none is left without its packs.

        Raises:
            StorageFailed: Some is left.
        """
        sequence = self.newest.sequence if self.newest is not None else 0
        found = [(name, _NAME.fullmatch(name)) for name in self._files.names(self._folder)]
        for kind, kept in (("manifest", {sequence}), ("pack", set(self._sizes))):
            gone = [name for name, match in found if match and match[2] == kind and int(match[1]) not in kept]
            gone += [name for name, _ in found if kind == "pack" and name.endswith(NEW)]
            for name in gone:
                self._files.remove(join(self._folder, name))
            if gone and kind == "manifest":
                self._files.sync_folder(self._folder)

    # For Snapshot

    def _became(self, manifest: Manifest, sizes: dict[int, int]) -> None:
        self.newest, self._sizes = manifest, sizes
        with suppress(StorageFailed):  # the next one removes it
            self.tidy()

    def _sparse(self, kept: dict[bytes, Place]) -> set[int]:
        """Packs of which too little is needed still."""
        used = dict.fromkeys(self._sizes, 0)
        for place in set(kept.values()):  # several pages that are the same lie at one
            used[place.pack] += place.num_bytes
        return {pack for pack, num_bytes in used.items() if num_bytes < self._least_used * self._sizes[pack]}

    def _read(self, pages: Mapping[bytes, Place]) -> Iterator[tuple[bytes, dict[str, memoryview]]]:
        file: File | None = None
        opened, run, begin = 0, memoryview(b""), 0
        order = sorted(pages.items(), key=lambda item: (item[1].pack, item[1].offset))
        try:
            for number, (key, place) in enumerate(order):
                if file is None or opened != place.pack:
                    if file is not None:
                        file.close()
                    file, opened, run, begin = self._files.open(self._path(place.pack, "pack")), place.pack, run[:0], 0
                if place.offset + place.num_bytes > begin + len(run):
                    begin = place.offset
                    run = file.read_once(begin, _run_bytes(order, number))
                data = run[place.offset - begin :][: place.num_bytes]
                try:
                    if len(data) < place.num_bytes or xxhash.xxh3_64_intdigest(data) != place.checksum:
                        raise Damaged(f"the checksum of page {key!r} is wrong")
                    yield key, unpack_page(data)
                except Damaged as damage:
                    raise lost(file.path, place.offset, str(damage)) from None
        finally:
            if file is not None:
                file.close()

    def _read_manifest(self, sequence: int) -> Manifest:
        path = self._path(sequence, "manifest")
        with closing(self._files.open(path)) as file:
            data = file.read(0, file.size())
        try:
            manifest = unpack_manifest(data, self._owner, path)
            if manifest.sequence != sequence:
                raise Damaged(f"it is manifest {manifest.sequence}: it was renamed")
        except Damaged as damage:
            raise lost(path, 0, str(damage)) from None
        return manifest

    def _check_pack(self, sequence: int) -> int:
        path = self._path(sequence, "pack")
        with closing(self._files.open(path)) as file:
            try:
                check_pack_header(file.read(0, PACK_BYTES), self._owner, sequence, path)
            except Damaged as damage:
                raise lost(path, 0, str(damage)) from None
            return file.size()

    def _path(self, sequence: int, kind: str) -> str:
        return join(self._folder, f"{sequence:012d}.{kind}")


class Snapshot:
    """A snapshot that is being written. Left by an exception, or without ``finish``, it was never there.

    The life of it: ``write`` for each page that changed, ``keep`` for each that did not, ``same`` for each that another
    one of them is the same as, ``finish``.
    """

    def __init__(self, store: Snapshots, sequence: int, *, after: int) -> None:
        self._store = store
        self._after = after
        self._sequence = sequence  # its own, also where one before failed: a manifest may name that one's pack
        self._file: File | None = None
        self._end = 0
        self._pages: dict[bytes, Place] = {}
        self._kept: dict[bytes, Place] = {}
        self._same: dict[bytes, bytes] = {}

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def write(self, key: bytes, arrays: Sequence[tuple[str, Sequence[Bytes]]]) -> int:
        """Write a page; how many bytes that took.

        Args:
            key: Which page it is.
            arrays: Its arrays by name, in order, the bytes of each in parts. They are written before this returns.

        Raises:
            StorageFailed: This snapshot cannot be finished.
        """
        self._once(key)
        return self._write(key, *page_parts(key, [(name, views_of(parts)) for name, parts in arrays]))

    def keep(self, key: bytes) -> None:
        """A page is as it was in the newest snapshot. Raises KeyError where that has none."""
        if self._store.newest is None:
            raise KeyError(key)
        self._once(key)
        self._pages[key] = self._kept[key] = self._store.newest.pages[key]

    def same(self, key: bytes, other: bytes) -> None:
        """A page is the same as another one, which is written or kept: it lies there, too. Raises KeyError where that
        one is neither."""
        self._once(key)
        self._pages[key] = self._pages[other]
        self._same[key] = other

    def finish(self, head: bytes) -> Manifest:
        """Make it the newest one, durably; what it does not need goes.

        Args:
            head: What else is to be known, of any kind.

        Raises:
            StorageFailed: The old one counts.
        """
        store, files = self._store, self._store._files
        sparse = store._sparse(self._kept)
        again: dict[Place, list[bytes]] = defaultdict(list)
        for key, place in self._kept.items():
            if place.pack in sparse:
                again[place].append(key)
        for key, arrays in store._read({keys[0]: place for place, keys in again.items()}):
            parts = page_parts(key, [(name, [array]) for name, array in arrays.items()])
            place = self._kept[key]
            self._write(key, *parts)
            self._pages.update(dict.fromkeys(again[place], self._pages[key]))
        self._pages.update({key: self._pages[other] for key, other in self._same.items()})
        sizes = {place.pack: store._sizes[place.pack] for place in self._kept.values() if place not in again}
        if self._file is not None:
            self._file.sync()
            sizes[self._sequence] = self._end
        manifest = Manifest(self._sequence, self._after, bytes(head), self._pages)
        path = store._path(self._sequence, "manifest")
        with closing(files.open(path + NEW, new=True)) as file:
            file.write(pack_manifest(manifest, store._owner), 0)
            file.sync()
        files.sync_folder(store._folder)  # the pack has its name before the manifest has
        files.rename(path + NEW, path)
        files.sync_folder(store._folder)
        self._close()
        store._became(manifest, sizes)
        return manifest

    def abandon(self) -> None:
        """It was never there. Nothing happens where it is finished."""
        unfinished = self._file is not None
        self._close()
        if unfinished:
            with suppress(StorageFailed):
                self._store.tidy()

    def _write(self, key: bytes, parts: Sequence[Bytes], num_bytes: int) -> int:
        if self._file is None:
            self._file = self._store._files.open(self._store._path(self._sequence, "pack"), new=True)
            self._end = self._file.write([pack_header(self._store._owner, self._sequence)], 0)
        self._file.write(parts, self._end)
        self._pages[key] = Place(self._sequence, self._end, num_bytes, sum_of(parts))
        self._end += num_bytes
        return num_bytes

    def _once(self, key: bytes) -> None:
        if key in self._pages:
            raise ValueError(f"page {key!r} is in this snapshot already")

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(StorageFailed):
                file.close()


def _run_bytes(order: Sequence[tuple[bytes, Place]], first: int) -> int:
    """How much to read from page ``first`` on: it, and what lies behind it in the same pack, up to _RUN_BYTES."""
    begin = order[first][1]
    end = begin.offset + begin.num_bytes
    for _, place in islice(order, first + 1, None):
        if place.pack != begin.pack or place.offset != end or end + place.num_bytes - begin.offset > _RUN_BYTES:
            break
        end += place.num_bytes
    return end - begin.offset
