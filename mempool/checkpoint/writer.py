"""One writer's part of a checkpoint: some pages of one table, streamed into safetensors files of bounded size.

Which pages, at which version, and who commits the parts is for others. In memory is one batch of pages at a time.
"""

import secrets
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mempool.checkpoint.format.json_values import span_text
from mempool.checkpoint.format.layout import BATCH_BYTES, FILE_BYTES, PageGroup, group_files, group_pages
from mempool.checkpoint.format.manifest import Part, TableState
from mempool.checkpoint.format.pages import CHECKSUM_BYTES, Batch, PageArray, Pages, Piece, StoredFile, blocks_of
from mempool.checkpoint.format.tensor_file import TensorEntry, header_of
from mempool.checkpoint.stores import FileWriter, Store
from mempool.errors import InvalidRequest
from mempool.types import ProductKeySpec, TableSchema


class PartWriter:
    """Writes the pages of one writer; use it with ``with``, and left by an error it leaves no file that counts.

        with PartWriter(store, "000001-ab12cd34", "shard-3", schema=schema, ...) as writer:
            for group in writer.groups():
                writer.write(arrays_of_these_pages(group))
        part = writer.part()

    Args:
        store: The place.
        checkpoint: The checkpoint's name, from ``begin``.
        writer: Who writes; unique among the writers of the table.
        schema: The table's.
        arrays: Of its pages.
        version: The table version that all the pages have: they are as they were between two steps.
        step_count: As the optimizer counts.
        owned: The pages that this writer answers for: every page of the table is one writer's.
        changed: Those of them that changed since ``since``: only these are written. None: all are.
        since: The base of the checkpoint, that the other pages are read from.
        since_version: The table's version in that base.
        batch_bytes, file_bytes: What is in memory together, and what a file has, about.

    Attributes:
        num_bytes, written_bytes: Of pages, in all and so far.
    """

    def __init__(
        self,
        store: Store,
        checkpoint: str,
        writer: str,
        *,
        schema: TableSchema,
        arrays: tuple[PageArray, ...],
        version: int,
        step_count: int,
        owned: Pages,
        changed: Pages | None = None,
        since: str | None = None,
        since_version: int = 0,
        batch_bytes: int = BATCH_BYTES,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        owned.check(schema)
        written = owned
        if changed is not None:
            changed.check(schema)
            written = Pages(owned.row_pages & changed.row_pages, owned.key_pages & changed.key_pages)
        if (changed is None) != (since is None):
            raise InvalidRequest("give `changed` and `since` together, or neither to write all pages")
        self._store = store
        self._checkpoint, self._writer = checkpoint, writer
        self._since, self._since_version = since, since_version
        self._schema = schema
        self._version, self._step_count = version, step_count
        self._arrays = arrays
        self._owned = owned
        # Elements of more bytes first: they stay aligned. Those of heads' keys are in batches of their own.
        self._row_arrays = sorted((a for a in arrays if a.per != "head"), key=lambda a: -a.page_bytes(schema, 0))
        self._head_arrays = [array for array in arrays if array.per == "head"]
        groups = list(group_pages(schema, arrays, written, batch_bytes=batch_bytes))
        self.num_bytes = sum(group.num_bytes(schema, arrays) for group in groups)
        self.written_bytes = 0
        self._files_left = group_files(schema, arrays, iter(groups), file_bytes=file_bytes)
        # A writer that is tried again writes files of its own: the one before may be writing yet.
        name = schema.name.replace(":", ".")  # of a table of keys
        self._stem = f"{checkpoint}/{name}.{writer}.{secrets.token_hex(4)}"
        self._files: dict[str, StoredFile] = {}
        self._batches: list[Batch] = []
        self._open: _DataFile | None = None
        self._groups = groups
        self._left_in_file: deque[PageGroup] = deque()
        self._groups_left = len(groups)

    def groups(self) -> Iterator[PageGroup]:
        """The pages to hand to ``write``, one group after another; they may be read out ahead of it."""
        yield from self._groups

    def write(self, arrays: Mapping[str, Tensor]) -> None:
        """Write the first group that is not written yet.

        Args:
            arrays: As a ``PageBatch`` of these pages has them: [M * page_slots, columns of its blocks], and the keys of
                heads [len(heads), 2, n, key_dim / 2].

        Raises:
            InvalidRequest: They are not those arrays.
            StorageFailed: The place is full, or fails.
        """
        if not self._groups_left:
            raise InvalidRequest("write() is called once for each group of pages")
        file = self._open or self._opened()
        group = self._left_in_file[0]
        expected = self._head_arrays if group.heads else [a for a in self._row_arrays if blocks_of(a, group.blocks)]
        if set(arrays) != {array.name for array in expected}:
            raise InvalidRequest(
                f"pages of table {self._schema.name!r} came with {sorted(arrays)}, and "
                f"{sorted(array.name for array in expected)} are written"
            )
        checked = [(array, self._checked(array, arrays[array.name], group)) for array in expected]
        tensors = {array.name: tuple(self._pieces(array, tensor, group, file)) for array, tensor in checked}
        self._batches.append(
            Batch(file=file.path, rows=group.rows, blocks=group.blocks, heads=group.heads, tensors=tensors)
        )
        self.written_bytes += group.num_bytes(self._schema, self._arrays)
        self._left_in_file.popleft()
        self._groups_left -= 1
        if not self._left_in_file:
            self._files[file.path], self._open = file.close(), None

    def part(self) -> Part:
        """What was written, once everything is. Raises InvalidRequest before."""
        if self._groups_left:
            raise InvalidRequest(f"part {self._writer!r} of table {self._schema.name!r} is not written whole yet")
        return Part(
            checkpoint=self._checkpoint,
            writer=self._writer,
            owned=self._owned,
            since=self._since,
            since_version=self._since_version,
            files=dict(self._files),
            table=TableState(
                schema=self._schema,
                version=self._version,
                step_count=self._step_count,
                ledger=None,
                arrays=self._arrays,
                batches=tuple(self._batches),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.discard()
            self._open = None

    def _opened(self) -> "_DataFile":
        """The next file, with the groups that it is to have."""
        groups = next(self._files_left)
        path = f"{self._stem}.{len(self._files):04d}.safetensors"
        entries = [entry for index, group in enumerate(groups) for entry in self._entries(index, group)]
        metadata = {
            "table": self._schema.name,
            "version": str(self._version),
            **{f"batch{index}": _described(group) for index, group in enumerate(groups)},
        }
        self._open = _DataFile(self._store, path, header_of(entries, metadata))
        self._left_in_file.extend(groups)
        return self._open

    def _entries(self, index: int, group: PageGroup) -> Iterator[TensorEntry]:
        """The tensors of a group, in the order in which ``write`` writes them."""
        for array in self._head_arrays if group.heads else self._row_arrays:
            for block, shape in self._shapes(array, group):
                where = "" if array.per in ("head", "slot") else f".block{block}"
                yield TensorEntry(name=f"batch{index}.{array.name}{where}", dtype=array.dtype, shape=shape)

    def _shapes(self, array: PageArray, group: PageGroup) -> Iterator[tuple[int, tuple[int, ...]]]:
        if array.per == "head":
            keys = self._schema.keys
            assert isinstance(keys, ProductKeySpec)
            yield 0, (len(group.heads), 2, self._schema.stride, keys.key_dim // 2)
            return
        for block in blocks_of(array, group.blocks):
            yield block, (len(group.rows) * self._schema.page_slots, array.columns(self._schema, block))

    def _checked(self, array: PageArray, tensor: Tensor, group: PageGroup) -> Tensor:
        shapes = [shape for _, shape in self._shapes(array, group)]
        shape = shapes[0] if array.per == "head" else (shapes[0][0], sum(columns for _, columns in shapes))
        if tuple(tensor.shape) != shape or tensor.dtype != getattr(torch, array.dtype):
            raise InvalidRequest(
                f"array {array.name!r} of table {self._schema.name!r} came as {tensor.dtype} {tuple(tensor.shape)}, "
                f"and is {array.dtype} {shape}"
            )
        return tensor.detach().cpu()

    def _pieces(self, array: PageArray, tensor: Tensor, group: PageGroup, file: "_DataFile") -> Iterator[Piece]:
        if array.per == "head":
            yield file.write(tensor, array.page_bytes(self._schema, 0))
            return
        first = 0
        for block in blocks_of(array, group.blocks):
            end = first + array.columns(self._schema, block)
            yield file.write(tensor[:, first:end], array.page_bytes(self._schema, block))
            first = end


class _DataFile:
    """A file in the making: its header is written, its tensors follow."""

    def __init__(self, store: Store, path: str, header: bytes) -> None:
        self.path = path
        self._context = ExitStack()
        self._file: FileWriter = self._context.enter_context(store.create(path))
        self._header = header
        self._size = 0
        try:
            self._append(header)
        except BaseException as error:
            self.discard(error)
            raise

    def write(self, tensor: Tensor, page_bytes: int) -> Piece:
        """Append a tensor of pages."""
        offset = self._size
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        checksums = b"".join(
            zlib.crc32(data[first : first + page_bytes]).to_bytes(CHECKSUM_BYTES)
            for first in range(0, len(data), page_bytes)
        )
        self._append(data)
        return Piece(offset=offset, checksums=checksums)

    def close(self) -> StoredFile:
        """The file is there, whole and durable."""
        self._context.close()
        return StoredFile(size=self._size, header_bytes=len(self._header), header_checksum=zlib.crc32(self._header))

    def discard(self, error: BaseException | None = None) -> None:
        """The file will not be there."""
        error = error or _Discarded()
        try:
            self._context.__exit__(type(error), error, None)
        except BaseException as raised:
            if raised is not error:
                raise

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._size += len(data)


class _Discarded(Exception):
    pass


def _described(group: PageGroup) -> str:
    """Which pages a batch has, for who reads the file without its manifest."""
    if group.heads:
        return f"heads {span_text(group.heads)}"
    return f"row pages {span_text(group.rows)} of blocks {span_text(group.blocks)}"
