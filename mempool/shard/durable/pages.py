"""The pages of a shard as a snapshot has them: their keys, their bytes, and back into arenas."""

import struct
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool.errors import DataLoss
from mempool.journal import Snapshots
from mempool.journal.records import RESTORE
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.named_arrays import HEAD_KEYS, Blocks

_PAGE = struct.Struct("<QIH")  # table, row page, how many blocks; then these
_HEADS = struct.Struct("<Q")
Places = dict[bytes, tuple[Arena, int]]
"""Of each page of a snapshot: its arena, and which page that is there."""
_LARGE_BYTES = 64 * 2**20
"""Smaller arenas get their memory as they are written to."""


def page_key(table_id: int, row_page: int, blocks: Blocks) -> bytes:
    """The key of a row page with these blocks."""
    return _PAGE.pack(table_id, row_page, len(blocks)) + np.asarray(blocks, dtype="<u4").tobytes()


def heads_key(table_id: int) -> bytes:
    """The key of all product keys of a table that are here."""
    return _HEADS.pack(table_id)


def heads_arrays(table: HostedTable) -> list[tuple[str, Tensor]]:
    """The product keys that are here, and whose they are: copies, on the CPU."""
    heads = torch.tensor(table.storage.heads, dtype=torch.int64)
    return [("heads", _bytes_of(heads)), (HEAD_KEYS, _bytes_of(table.storage.head_keys))]


Rows = dict[tuple[int, Blocks], npt.NDArray[np.int64]]
"""Of each table and its blocks: the row pages of a snapshot, ascending."""


def rows_of(snapshots: Snapshots, tables: Mapping[int, HostedTable]) -> Rows:
    """Which pages the newest snapshot has.

    Raises:
        DataLoss: A page is of a table that the snapshot does not have, or one is missing.
    """
    rows: dict[tuple[int, Blocks], list[int]] = defaultdict(list)
    for key in () if snapshots.newest is None else snapshots.newest.pages:
        if len(key) != _HEADS.size:
            table_id, row_page, blocks = _page_of(key)
            rows[table_id, blocks].append(row_page)
    here: dict[int, int] = defaultdict(int)
    for (table_id, blocks), found in rows.items():
        if table_id not in tables:
            raise DataLoss(f"the newest snapshot has pages of table {table_id}, and no such table")
        here[table_id] += len(found) * len(blocks)
    for table_id, table in tables.items():
        owned = int((table.view.placement.owners == table.info.shard).sum())
        if here[table_id] != owned and not table.storage.num_lost:
            raise DataLoss(
                f"the newest snapshot has {here[table_id]:,} pages of table {table.view.schema.name!r}, of which "
                f"{owned:,} are this shard's. {RESTORE}."
            )
    return {of: np.sort(np.asarray(found, dtype=np.int64)) for of, found in rows.items()}


def place_pages(rows: Rows, tables: Mapping[int, HostedTable]) -> Places:
    """Where in the arenas of these tables their pages go: rows are found there from now on, and filled by
    ``restore_pages``."""
    places: Places = {}
    for (table_id, blocks), row_pages in rows.items():
        if table_id in tables:
            arena = tables[table_id].storage.arena(blocks)
            taken = arena.take(len(row_pages))
            arena.publish(row_pages, taken)
            for row_page, place in zip(row_pages.tolist(), taken.tolist(), strict=True):
                places[page_key(table_id, row_page, blocks)] = arena, place
    return places


def populate(places: Places) -> None:
    """Have the system give memory to these arenas, where that is much: at once, not page by page as they are filled."""
    for arena in {arena for arena, _ in places.values()}:
        if arena.num_bytes >= _LARGE_BYTES:
            arena.populate()


def restore_pages(snapshots: Snapshots, tables: Mapping[int, HostedTable], places: Places) -> dict[Arena, int]:
    """Fill these pages of the newest snapshot, and the product keys of all its tables. Returns each arena with its
    ``writes`` then.

    Raises:
        DataLoss: A page is damaged.
    """
    arenas = {arena: arena.raw for arena, _ in places.values()}
    with ExitStack() as writing:
        for arena in arenas:
            pages = torch.tensor([place for owner, place in places.values() if owner is arena], device=arena.device)
            writing.enter_context(arena.writing(pages=pages))
        for key, arrays in snapshots.pages([*places, *_heads_of(snapshots, tables)]):
            if key in places:
                arena, place = places[key]
                for name, stored in arenas[arena].items():
                    _fill(stored[place], arrays[name])
            else:
                _restore_heads(tables[_HEADS.unpack(key)[0]], arrays)
    return {arena: arena.writes for arena in arenas}


def _heads_of(snapshots: Snapshots, tables: Mapping[int, HostedTable]) -> list[bytes]:
    pages = () if snapshots.newest is None else snapshots.newest.pages
    return [key for table_id in tables if (key := heads_key(table_id)) in pages]


def _restore_heads(table: HostedTable, arrays: Mapping[str, memoryview]) -> None:
    heads = tuple(np.frombuffer(arrays["heads"], dtype=np.int64).tolist())
    storage = table.storage
    keys = torch.empty((len(heads), *storage.head_keys.shape[1:]), dtype=torch.float32, device=storage.device)
    _fill(keys, arrays[HEAD_KEYS])
    storage.set_head_keys(heads, keys)


def _page_of(key: bytes) -> tuple[int, int, Blocks]:
    table_id, row_page, _ = _PAGE.unpack_from(key)
    return table_id, row_page, tuple(np.frombuffer(key, dtype="<u4", offset=_PAGE.size).tolist())


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return flat.to("cpu", copy=True)


def _fill(into: Tensor, data: memoryview) -> None:
    """Bytes into a tensor that is contiguous."""
    if into.numel():
        flat, read = into.view(-1).view(torch.uint8), np.frombuffer(data, dtype=np.uint8)
        if flat.device.type == "cpu":
            np.copyto(flat.numpy(), read)
        else:
            flat.copy_(torch.from_numpy(read.copy()))
