"""What pages consist of and where they lie in files: named arrays, batches of pages, the pages somebody wants.

Shapes: P row pages, C column blocks, H heads (key pages), M row pages of a batch.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mempool.checkpoint.format.tensor_file import ITEM_BYTES
from mempool.errors import InvalidRequest
from mempool.placement import Assignment
from mempool.types import ProductKeySpec, TableSchema

CHECKSUM_BYTES = 4
"""Of one page of one array: CRC-32 as zlib has it, big-endian."""

Per = Literal["element", "block", "slot", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageArray:
    """A named array of a table's pages: `<array>`, or `<array>.<state>`.

    Attributes:
        per: "element": as wide as the values; "block": one number per (slot, block); "slot": ``width`` columns, with
            block 0; "head": the product keys of a head.
        dtype: As shards hold it, by torch's name; elements of one byte as uint8.
    """

    name: str
    per: Per
    dtype: str
    width: int = 0

    def columns(self, schema: TableSchema, block: int) -> int:
        """Columns of its part of one page; 0 where it has none."""
        if self.per == "element":
            start, stop = schema.block_columns(block)
            return stop - start
        if self.per == "block":
            return 1
        return self.width if self.per == "slot" and block == 0 else 0

    def page_bytes(self, schema: TableSchema, block: int) -> int:
        """Bytes of its part of one page. block: Of no meaning to a head's keys."""
        if self.per == "head":
            keys = schema.keys
            return schema.stride * keys.key_dim * ITEM_BYTES[self.dtype] if isinstance(keys, ProductKeySpec) else 0
        return schema.page_slots * self.columns(schema, block) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor of a file. checksums: Of each of its pages, CHECKSUM_BYTES each."""

    offset: int
    checksums: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Pages that lie together in a file: ``rows`` x ``blocks``, or key pages.

    Attributes:
        tensors: Array -> its pieces: one per block that it has columns in, each [M * page_slots, columns]; of keys one,
            [len(heads), 2, n, key_dim / 2].
    """

    file: str
    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    tensors: Mapping[str, tuple[Piece, ...]]

    @property
    def num_pages(self) -> int:
        return len(self.rows) * len(self.blocks) + len(self.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A data file. header_checksum: CRC-32 of its first ``header_bytes``."""

    size: int
    header_bytes: int
    header_checksum: int


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Some of a table's pages. row_pages [P, C] bool; key_pages [H] bool."""

    row_pages: npt.NDArray[np.bool_]
    key_pages: npt.NDArray[np.bool_]

    @staticmethod
    def none(schema: TableSchema) -> "Pages":
        return Pages(
            np.zeros((schema.num_row_pages, schema.num_blocks), np.bool_), np.zeros(schema.num_key_pages, np.bool_)
        )

    @staticmethod
    def all(schema: TableSchema) -> "Pages":
        none = Pages.none(schema)
        return Pages(~none.row_pages, ~none.key_pages)

    @staticmethod
    def of_shard(assignment: Assignment, shard: int) -> "Pages":
        """Those that a shard owns under an assignment."""
        return Pages(assignment.owners == shard, assignment.key_owners == shard)

    def check(self, schema: TableSchema) -> None:
        """Raises InvalidRequest where they are not of such a table."""
        shapes = self.row_pages.shape, self.key_pages.shape
        if shapes != ((schema.num_row_pages, schema.num_blocks), (schema.num_key_pages,)):
            raise InvalidRequest(
                f"pages of shapes {shapes[0]} and {shapes[1]} are not those of table {schema.name!r}: it has "
                f"{schema.num_row_pages} x {schema.num_blocks} pages and {schema.num_key_pages} of keys"
            )

    def __len__(self) -> int:
        return int(self.row_pages.sum()) + int(self.key_pages.sum())


def blocks_of(array: PageArray, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the blocks in which a row array has columns, in the order of its pieces."""
    return tuple(block for block in blocks if array.per != "slot" or block == 0)


def arrays_of(arrays: tuple[PageArray, ...], batch: Batch) -> tuple[PageArray, ...]:
    """The arrays that a batch has pieces of."""
    return tuple(array for array in arrays if (batch.heads if array.per == "head" else blocks_of(array, batch.blocks)))


def wrong_pages(checksums: bytes, data: memoryview) -> Sequence[int]:
    """Which of the pages in ``data``, of one size, have other checksums than these."""
    count = len(checksums) // CHECKSUM_BYTES
    page_bytes = len(data) // count if count else 0
    return [
        index
        for index in range(count)
        if zlib.crc32(data[index * page_bytes : (index + 1) * page_bytes])
        != int.from_bytes(checksums[CHECKSUM_BYTES * index : CHECKSUM_BYTES * (index + 1)])
    ]
