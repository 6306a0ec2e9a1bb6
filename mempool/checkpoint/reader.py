"""Reading a checkpoint's pages for any placement, whatever layout wrote them: in bounded batches, each page checked.

What takes the pages in is for others. A page whose checksum is wrong is never handed out.

Shapes: M row pages of a batch.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mempool.checkpoint.commit import missing_files, names, read_manifest
from mempool.checkpoint.format.json_values import Unfit
from mempool.checkpoint.format.layout import BATCH_BYTES, PageGroup, group_pages, places
from mempool.checkpoint.format.ledger_json import parse_ledger
from mempool.checkpoint.format.manifest import Manifest, TableState
from mempool.checkpoint.format.pages import CHECKSUM_BYTES, PageArray, Pages, blocks_of, wrong_pages
from mempool.checkpoint.stores import Store
from mempool.checkpoint.stores.store import place_of
from mempool.errors import DataLoss, InvalidRequest, NotFound
from mempool.types import Ledger, PageBatch, ProductKeySpec, TableSchema
from mempool.types.schema_differences import schema_differences

OF_THE_POOL = ("table_id", "name", "layout")
"""What a table may have otherwise where a checkpoint is restored into it: its number, its name, where its pages are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRange:
    """Pages of one array that lie side by side in one file.

    Attributes:
        array: Its name.
        block: Of row pages.
        pages: Row pages, or heads where ``block`` is None, in the order of the file.
        checksums: Of each of them.
    """

    file: str
    offset: int
    length: int
    array: str
    block: int | None
    pages: tuple[int, ...]
    checksums: bytes


class Checkpoint:
    """A checkpoint that is there whole, by the sizes of its files.

    Args:
        store: The place.
        name: The checkpoint; None for the newest.

    Raises:
        NotFound: There is none.
        DataLoss: A file is missing or short, or the manifest is damaged.
        InvalidRequest: It is of a newer format.
    """

    def __init__(self, store: Store, name: str | None = None) -> None:
        self.store = store
        self.manifest: Manifest = read_manifest(store, name)
        problems = missing_files(store, self.manifest)
        if problems:
            there = [other for other in names(store.list()) if other != self.manifest.name]
            raise DataLoss(
                f"checkpoint {self.manifest.name!r} of {store.url} is not whole: {len(problems)} of its "
                f"{len(self.manifest.files)} files: {'; '.join(problems[:3])}. Copy them there again, or restore "
                f"another checkpoint ({', '.join(there[-3:]) or 'there is none'})"
            )

    def table(self, name: str) -> "StoredTable":
        """One of its tables. Raises NotFound."""
        state = self.manifest.tables.get(name)
        if state is None:
            raise NotFound(
                f"checkpoint {self.manifest.name!r} has no table {name!r}; it has: {', '.join(self.manifest.tables)}"
            )
        return StoredTable(self.store, state)


class StoredTable:
    """The pages of one table in a checkpoint."""

    def __init__(self, store: Store, state: TableState) -> None:
        self._store = store
        self.state = state
        self._places = places(state.schema, state.batches)

    def ledger(self) -> Ledger | None:
        """What was applied of whom, as ``ledger_json`` keeps it; None where nothing is. Raises DataLoss for others."""
        if self.state.ledger is None:
            return None
        try:
            return parse_ledger(self.state.ledger)
        except Unfit as error:
            raise DataLoss(f"the checkpoint's table {self.state.schema.name!r} has no ledger: {error}") from None

    def check_schema(
        self,
        schema: TableSchema,
        *,
        arrays: Collection[PageArray] | None = None,
        aside: Collection[str] = OF_THE_POOL,
    ) -> None:
        """Whether the pages are those of such a table.

        Args:
            schema: Of the table that would take them.
            arrays: Of its pages; None where the schema says enough.
            aside: Fields that may differ.

        Raises:
            InvalidRequest: They are not; with every field that differs.
        """
        found = list(schema_differences(self.state.schema, schema, aside=aside))
        if found:
            fields = ", ".join(f"{d.path} is {d.first!r} there and {d.second!r} here" for d in found)
            raise InvalidRequest(
                f"the checkpoint's table {self.state.schema.name!r} is no table {schema.name!r}: {fields}. Make the "
                f"table as the checkpoint's is, or restore it under another name"
            )
        if arrays is not None and set(arrays) != set(self.state.arrays):
            there, here = (sorted(array.name for array in those) for those in (self.state.arrays, arrays))
            raise InvalidRequest(
                f"pages of the checkpoint's table {self.state.schema.name!r} have the arrays {there}, and {here} are "
                f"expected: another version of mempool wrote them. Restore with that one"
            )

    def num_bytes(self, pages: Pages) -> int:
        """What ``batches`` reads of some pages in all."""
        return sum(group.num_bytes(self.state.schema, self.state.arrays) for group in self._groups(pages, BATCH_BYTES))

    def ranges(self, pages: Pages, *, arrays: Collection[str] | None = None) -> Iterator[PageRange]:
        """What has to be read of which files for some pages, in the order in which ``batches`` reads it."""
        pages.check(self.state.schema)
        for group in self._groups(pages, BATCH_BYTES):
            for array in self._arrays(group, arrays):
                yield from self._ranges_of(array, group)

    def batches(
        self,
        pages: Pages,
        *,
        arrays: Collection[str] | None = None,
        batch_bytes: int = BATCH_BYTES,
        reused: int = 0,
    ) -> Iterator[PageBatch]:
        """Read pages, checked.

        Args:
            pages: Which; for a shard: ``Pages.of_shard(assignment, shard)``.
            arrays: Names of those to read; None for all.
            batch_bytes: What is in memory together, about.
            reused: The memory of a batch is that of the one which comes so many later, too; 0: each has its own.

        Yields:
            Row pages of one set of blocks, or key pages, each page in one batch; table_id and version are those of the
            checkpoint.

        Raises:
            DataLoss: A page is damaged; with its file and place.
        """
        pages.check(self.state.schema)
        buffers = _Buffers(reused)
        for group in self._groups(pages, batch_bytes):
            buffers.turn()
            yield PageBatch(
                table_id=self.state.schema.table_id,
                row_pages=np.array(group.rows, dtype=np.int64),
                blocks=group.blocks,
                key_pages=group.heads,
                arrays={array.name: self._read(array, group, buffers) for array in self._arrays(group, arrays)},
                version=self.state.version,
            )

    def _groups(self, pages: Pages, batch_bytes: int) -> Iterator[PageGroup]:
        return group_pages(self.state.schema, self.state.arrays, pages, batch_bytes=batch_bytes)

    def _arrays(self, group: PageGroup, names: Collection[str] | None) -> Iterator[PageArray]:
        for array in self.state.arrays:
            there = bool(group.heads) if array.per == "head" else bool(blocks_of(array, group.blocks))
            if there and (names is None or array.name in names):
                yield array

    def _read(self, array: PageArray, group: PageGroup, buffers: "_Buffers") -> Tensor:
        schema, dtype = self.state.schema, getattr(torch, array.dtype)
        if array.per == "head":
            keys = schema.keys
            assert isinstance(keys, ProductKeySpec)
            out = buffers.take(array.name, (len(group.heads), 2, schema.stride, keys.key_dim // 2), dtype)
            for run in self._ranges_of(array, group):
                read = torch.empty(run.length, dtype=torch.uint8)
                self._fill(run, read)
                out[_places(run, group.heads)] = read.view(dtype).view(len(run.pages), *out.shape[1:])
            return out
        blocks = blocks_of(array, group.blocks)
        columns = [array.columns(schema, block) for block in blocks]
        firsts = dict(zip(blocks, np.cumsum([0, *columns[:-1]]).tolist(), strict=True))
        out = buffers.take(array.name, (len(group.rows), schema.page_slots, sum(columns)), dtype)
        for run in self._ranges_of(array, group):
            assert run.block is not None
            first, width = firsts[run.block], array.columns(schema, run.block)
            at = _places(run, group.rows)
            if isinstance(at, slice) and width == out.shape[2]:  # as it lies in the file
                self._fill(run, out[at].view(-1).view(torch.uint8))
                continue
            read = buffers.scratch(run.length)
            self._fill(run, read)
            read = read.view(dtype)
            out[at, :, first : first + width] = read.view(len(run.pages), schema.page_slots, width)
        return out.view(len(group.rows) * schema.page_slots, sum(columns))

    def _fill(self, run: PageRange, into: Tensor) -> None:
        """Read a range into so many bytes, checked."""
        buffer = into.numpy().data
        self._store.read_into(run.file, run.offset, buffer)
        check_pages(self._store, run, buffer)

    def _ranges_of(self, array: PageArray, group: PageGroup) -> Iterator[PageRange]:
        """The ranges of one array of a group, in as few pieces as the files have them."""
        if array.per == "head":
            heads = np.array(group.heads, dtype=np.int64)
            yield from self._runs(array, None, heads, self._places.key_batch[heads], self._places.key_at[heads])
            return
        rows = np.array(group.rows, dtype=np.int64)
        for block in blocks_of(array, group.blocks):
            yield from self._runs(array, block, rows, self._places.batch[rows, block], self._places.at[rows, block])

    def _runs(
        self, array: PageArray, block: int | None, pages: np.ndarray, batch: np.ndarray, at: np.ndarray
    ) -> Iterator[PageRange]:
        order = np.lexsort((at, batch))
        pages, batch, at = pages[order], batch[order], at[order]
        cuts = np.flatnonzero((np.diff(batch) != 0) | (np.diff(at) != 1)) + 1
        page_bytes = array.page_bytes(self.state.schema, block or 0)
        for first, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(pages)], strict=True):
            held = self.state.batches[int(batch[first])]
            pieces = held.tensors[array.name]
            piece = pieces[0 if block is None else blocks_of(array, held.blocks).index(block)]
            begin = int(at[first])
            yield PageRange(
                file=held.file,
                offset=piece.offset + begin * page_bytes,
                length=(end - first) * page_bytes,
                array=array.name,
                block=block,
                pages=tuple(pages[first:end].tolist()),
                checksums=piece.checksums[CHECKSUM_BYTES * begin : CHECKSUM_BYTES * (begin + end - first)],
            )


class _Buffers:
    """Memory of batches: what is new each time is given by the system page by page, which takes longer than to read.

    Args:
        turns: A batch's serves again so many later; 0: never.
    """

    def __init__(self, turns: int) -> None:
        self._sets: list[dict[str, Tensor]] = [{} for _ in range(turns)]
        self._at = -1
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def turn(self) -> None:
        """Another batch begins."""
        self._at += 1

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for an array of this batch, with undefined contents."""
        if not self._sets:
            return torch.empty(shape, dtype=dtype)
        held, num_bytes = self._sets[self._at % len(self._sets)], math.prod(shape) * dtype.itemsize
        if name not in held or len(held[name]) < num_bytes:
            held[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return held[name][:num_bytes].view(dtype).view(shape)

    def scratch(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, until it is asked for again."""
        if len(self._scratch) < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return self._scratch[:num_bytes]


def _places(run: PageRange, pages: tuple[int, ...]) -> slice | list[int]:
    """Where the pages of a range are among ``pages``, ascending: as a slice where they are side by side there too."""
    first = bisect_left(pages, run.pages[0])
    if pages[first : first + len(run.pages)] == run.pages:
        return slice(first, first + len(run.pages))  # copied many times faster
    return [bisect_left(pages, page) for page in run.pages]


def check_pages(store: Store, run: PageRange, data: memoryview) -> None:
    """Raises DataLoss where a page of a range is not what was written."""
    wrong = wrong_pages(run.checksums, data)
    if wrong:
        page_bytes = len(data) // len(run.pages)
        place = run.offset + wrong[0] * page_bytes
        which = (
            f"head {run.pages[wrong[0]]}" if run.block is None else f"row page {run.pages[wrong[0]]}, block {run.block}"
        )
        raise DataLoss(
            f"{place_of(store.url, run.file)} is damaged at bytes {place:_} to {place + page_bytes - 1:_}: "
            f"{run.array!r} of {which} has another checksum. Copy the file again from where it is whole, or restore "
            f"another checkpoint"
        )
