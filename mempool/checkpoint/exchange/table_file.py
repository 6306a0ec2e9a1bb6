"""A table as one safetensors file, written as its rows come; from a checkpoint too, with no pool.

with TableFile("facts.safetensors", table_entries(schema)) as file:
    for rows in values_from_the_first_slot_on:
        file.write("values", rows)
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mempool.checkpoint.exchange.layouts import FLAT_KEYS, HEAD_KEYS, SCALES, VALUES
from mempool.checkpoint.exchange.trained_keys import key_entry, key_rows
from mempool.checkpoint.format.layout import BATCH_BYTES
from mempool.checkpoint.format.pages import PageArray, Pages
from mempool.checkpoint.format.schema_json import schema_json
from mempool.checkpoint.format.tensor_file import TensorEntry, header_of
from mempool.checkpoint.reader import StoredTable
from mempool.checkpoint.stores import FileWriter, open_file
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, ProductKeySpec, TableSchema

SCHEMA = "mempool.schema"
VERSION = "mempool.version"
"""Names of the file's own texts: the table's schema as JSON, and its version."""


def table_entries(schema: TableSchema) -> tuple[TensorEntry, ...]:
    """The tensors of a table's file, in the order in which they are written: values, and keys that the pool has."""
    found = [TensorEntry(name=VALUES, dtype=schema.dtype, shape=(schema.num_slots, schema.value_dim))]
    if schema.packed:
        found.append(TensorEntry(name=SCALES, dtype="float32", shape=(schema.num_slots, schema.num_blocks)))
    if isinstance(schema.keys, FlatKeySpec):
        found.append(TensorEntry(name=FLAT_KEYS, dtype="float32", shape=(schema.num_slots, schema.keys.key_dim)))
    if isinstance(schema.keys, ProductKeySpec):
        shape = (schema.keys.heads, 2, schema.stride, schema.keys.key_dim // 2)
        found.append(TensorEntry(name=HEAD_KEYS, dtype="float32", shape=shape))
    return tuple(found)


def table_metadata(schema: TableSchema, version: int) -> dict[str, str]:
    """What the file says of its table besides."""
    return {"format": "pt", SCHEMA: json.dumps(schema_json(schema)), VERSION: str(version)}


class TableFile:
    """A safetensors file in the making; it is there once the ``with`` is left without an error.

    Args:
        place: The file, a path or an fsspec URL.
        entries: Its tensors, in the order in which they will be written.
        metadata: Its own texts.
    """

    def __init__(
        self,
        place: str | os.PathLike[str],
        entries: Sequence[TensorEntry],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        store, name = open_file(place)
        self._where = os.fspath(place)
        self._entries = tuple(entries)
        self._header = header_of(self._entries, metadata or {})
        self._context: AbstractContextManager[FileWriter] = store.create(name)
        self._file: FileWriter | None = None
        self._at = 0
        self._rows = 0

    def __enter__(self) -> Self:
        self._file = self._context.__enter__()
        self._file.write(self._header)
        self._skip_full()
        return self

    def write(self, name: str, rows: Tensor) -> None:
        """Append rows to the tensor that is being written.

        Args:
            name: Of the first tensor that is not full.
            rows: [any number, ...], of its shape but for the first dimension and of its dtype; elements of one byte as
                uint8 too.

        Raises:
            InvalidRequest: They are of another tensor or shape, or too many.
            StorageFailed: The place is full, or fails.
        """
        assert self._file is not None, "used with `with`"
        entry = self._entries[self._at] if self._at < len(self._entries) else None
        if entry is None or entry.name != name:
            wanted = "nothing is left to write" if entry is None else f"{entry.name!r} comes first"
            raise InvalidRequest(f"{self._where}: rows of {name!r} were given, and {wanted}")
        dtype: torch.dtype = getattr(torch, entry.dtype)
        left = entry.shape[0] - self._rows
        fits = rows.dtype == dtype or (rows.dtype == torch.uint8 and dtype.itemsize == 1)
        if not fits or tuple(rows.shape[1:]) != entry.shape[1:] or not rows.dim() or len(rows) > left:
            raise InvalidRequest(
                f"{self._where}: {name!r} was given {rows.dtype} {list(rows.shape)}, and takes up to {left:_} rows of "
                f"{entry.dtype} {list(entry.shape[1:])}"
            )
        self._file.write(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._rows += len(rows)
        self._skip_full()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._at < len(self._entries):
            entry = self._entries[self._at]
            error = InvalidRequest(
                f"{self._where} is not whole, and was not kept: {self._rows:_} of {entry.shape[0]:_} rows of "
                f"{entry.name!r} were written"
            )
            self._context.__exit__(type(error), error, None)
            raise error
        self._context.__exit__(kind, error, traceback)

    def _skip_full(self) -> None:
        while self._at < len(self._entries) and self._rows == self._entries[self._at].shape[0]:
            self._at += 1
            self._rows = 0


def export_table(
    table: StoredTable,
    place: str | os.PathLike[str],
    *,
    keys: StoredTable | None = None,
    state: bool = False,
    batch_bytes: int = BATCH_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint's table as one safetensors file, a batch of pages in memory at a time.

    Args:
        table: Of a checkpoint.
        place: The file, a path or an fsspec URL.
        keys: Of the same checkpoint, the table of the keys that it trains, if it does: they are in the file as keys
            that nobody trains are.
        state: The optimizer's state too: `values.<state>`, [num_slots, value_dim], or [num_slots, column blocks] where
            it has one number per block.
        batch_bytes: What is in memory together, about.
        progress: Told the bytes that are written, and all there are.

    Raises:
        DataLoss: A page is damaged; no file is left then.
        StorageFailed: The place is full, or fails.
    """
    schema = table.state.schema
    entries = list(table_entries(schema))
    known = {entry.name for entry in entries}
    more = [array for array in table.state.arrays if array.name not in known]
    trained = None if keys is None else key_entry(keys.state.schema)
    entries += [] if trained is None else [trained]
    entries += [_state_entry(schema, array) for array in more] if state else []
    every, none = Pages.all(schema), Pages.none(schema)
    rows, heads = Pages(every.row_pages, none.key_pages), Pages(none.row_pages, every.key_pages)
    done, total = 0, sum(entry.num_bytes for entry in entries)
    with TableFile(place, entries, table_metadata(schema, table.state.version)) as file:
        for entry in entries:
            if keys is not None and entry is trained:
                parts = key_rows(keys, batch_bytes=batch_bytes)
            else:
                pages = heads if entry.name == HEAD_KEYS else rows
                parts = _rows(table, entry, pages, batch_bytes=batch_bytes)
            for some in parts:
                file.write(entry.name, some)
                done += some.nbytes
                if progress is not None:
                    progress(done, total)


def _rows(table: StoredTable, entry: TensorEntry, pages: Pages, *, batch_bytes: int) -> Iterator[Tensor]:
    left = entry.shape[0]
    for batch in table.batches(pages, arrays=(entry.name,), batch_bytes=batch_bytes):
        some = batch.arrays[entry.name][:left]  # the last page may have slots that the table has not
        left -= len(some)
        yield some


def _state_entry(schema: TableSchema, array: PageArray) -> TensorEntry:
    columns = sum(array.columns(schema, block) for block in range(schema.num_blocks))
    return TensorEntry(name=array.name, dtype=array.dtype, shape=(schema.num_slots, columns))
