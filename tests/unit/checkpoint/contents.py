"""Whole tables in memory, of random bytes, as the pages of a checkpoint are made of and compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.checkpoint.commit import Begun, begin, commit
from mempool.checkpoint.format.layout import PageGroup
from mempool.checkpoint.format.manifest import Manifest, Part, parse_part, part_bytes
from mempool.checkpoint.format.pages import PageArray, Pages
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores import Store
from mempool.checkpoint.writer import PartWriter
from mempool.placement import Assignment, plan_table
from mempool.shard.pages.named_arrays import HEAD_KEYS, head_keys_shape, named_arrays
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec, TableSchema
from tests.unit.types.schemas import PLAIN as SCHEMA

PLAIN = replace(SCHEMA, table_id=7, block_dim=6, page_slots=8, optimizer=OptimizerSpec(algorithm="adam", lr=0.1))
PRODUCT = replace(PLAIN, name="paths", table_id=8, keys=ProductKeySpec(heads=3, key_dim=4))
FLAT = replace(PLAIN, name="cities", table_id=9, dtype="int8", rounding="stochastic", keys=FlatKeySpec(key_dim=5))


def page_arrays(schema: TableSchema) -> tuple[PageArray, ...]:
    """The arrays that a shard has of such a table."""
    found = [
        PageArray(
            name=array.name,
            per=array.per,
            dtype=str(array.dtype).removeprefix("torch."),
            width=array.width((0,)) if array.per == "slot" else 0,
        )
        for array in named_arrays(schema)
    ]
    if schema.num_key_pages:
        found.append(PageArray(name=HEAD_KEYS, per="head", dtype="float32"))
    return tuple(found)


@dataclass
class Content:
    """A whole table. rows: array -> [P * page_slots, columns of all blocks]."""

    schema: TableSchema
    rows: dict[str, Tensor]
    heads: Tensor
    version: int = 0

    @staticmethod
    def random(schema: TableSchema, seed: int, version: int = 0) -> Content:
        rng = np.random.default_rng(seed)
        num_rows = schema.num_row_pages * schema.page_slots
        every = tuple(range(schema.num_blocks))
        rows = {array.name: _random(rng, (num_rows, array.width(every)), array.dtype) for array in named_arrays(schema)}
        shape = (schema.num_key_pages, *head_keys_shape(schema))
        return Content(schema, rows, _random(rng, shape, torch.float32), version)

    def changed(self, pages: Pages, seed: int, version: int) -> Content:
        """With other bytes in these pages."""
        other = Content.random(self.schema, seed, version)
        for name, rows in self.rows.items():
            mask = torch.from_numpy(self._mask(name, pages))
            other.rows[name] = torch.where(mask, other.rows[name], rows)
        keep = torch.from_numpy(~pages.key_pages)
        other.heads[keep] = self.heads[keep]
        return other

    def of(self, group: PageGroup) -> dict[str, Tensor]:
        """Its pages, as a shard exports them."""
        if group.heads:
            return {HEAD_KEYS: self.heads[list(group.heads)]}
        slots = np.concatenate([self._slots(row) for row in group.rows])
        found = {}
        for array in named_arrays(self.schema):
            columns = (
                array.places(group.blocks, tuple(range(self.schema.num_blocks))) if array.width(group.blocks) else []
            )
            if len(columns):
                found[array.name] = self.rows[array.name][slots][:, columns]
        return found

    def put(self, group: PageGroup, arrays: Mapping[str, Tensor]) -> None:
        """Take pages in."""
        if group.heads:
            self.heads[list(group.heads)] = arrays[HEAD_KEYS]
            return
        slots = torch.from_numpy(np.concatenate([self._slots(row) for row in group.rows]))
        for array in named_arrays(self.schema):
            if array.width(group.blocks):
                columns = torch.from_numpy(array.places(group.blocks, tuple(range(self.schema.num_blocks))))
                self.rows[array.name][slots[:, None], columns[None, :]] = arrays[array.name]

    def same(self, other: Content) -> bool:
        """Bit for bit."""
        return all(same_bits(self.rows[name], other.rows[name]) for name in self.rows) and same_bits(
            self.heads, other.heads
        )

    def _slots(self, row: int) -> Any:
        return np.arange(row * self.schema.page_slots, (row + 1) * self.schema.page_slots)

    def _mask(self, name: str, pages: Pages) -> Any:
        """[rows, columns] of an array: whether they are in these pages."""
        array = next(array for array in named_arrays(self.schema) if array.name == name)
        per_row = np.repeat(pages.row_pages, self.schema.page_slots, axis=0)
        columns = [per_row[:, [block]].repeat(array.width((block,)), axis=1) for block in range(self.schema.num_blocks)]
        return np.concatenate(columns, axis=1)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.contiguous().reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8)
    )


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    data = rng.bytes(math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def spread(schema: TableSchema, shards: int, layout: str = "auto") -> Assignment:
    return plan_table(replace(schema, layout=layout), None, range(shards))  # type: ignore[arg-type]


def write_part(
    store: Store,
    begun: Begun,
    content: Content,
    shard: int,
    owned: Pages,
    changed: Pages | None = None,
    **sizes: int,
) -> Part:
    """As a shard writes its part, and as it travels to whoever commits."""
    base = None if changed is None or begun.base is None else begun.base
    with PartWriter(
        store,
        begun.name,
        f"shard-{shard}",
        schema=content.schema,
        arrays=page_arrays(content.schema),
        version=content.version,
        step_count=content.version + 3,
        owned=owned,
        changed=changed if base is not None else None,
        since=None if base is None else base.name,
        since_version=0 if base is None else base.tables[content.schema.name].version,
        **sizes,  # type: ignore[arg-type]
    ) as writer:
        for group in writer.groups():
            writer.write(content.of(group))
    return parse_part(part_bytes(writer.part()))


def write(
    store: Store,
    contents: Sequence[Content],
    *,
    shards: int = 1,
    layout: str = "auto",
    changed: Mapping[str, Pages] | None = None,
    pool: str = "run-7",
    **sizes: int,
) -> Manifest:
    """A checkpoint of tables spread over shards; changed: table -> what changed since the newest one."""
    begun = begin(store, pool=pool, incremental=changed is not None)
    parts = []
    for content in contents:
        assignment = spread(content.schema, shards, layout)
        for shard in range(shards):
            owned = Pages.of_shard(assignment, shard)
            since = None if changed is None else changed.get(content.schema.name)
            parts.append(write_part(store, begun, content, shard, owned, since, **sizes))
    ledgers = {content.schema.name: {"version": content.version} for content in contents}
    return commit(store, begun, parts, ledgers=ledgers, extra={"epoch": 3}, written_by="mempool tests")


def read(checkpoint: Checkpoint, table: str, assignment: Assignment, **sizes: int) -> Content:
    """A table as its shards read it, put together again."""
    stored = checkpoint.table(table)
    schema = stored.state.schema
    found = Content.random(schema, 0, stored.state.version)
    for shard in np.union1d(assignment.owners, assignment.key_owners).tolist():
        for batch in stored.batches(Pages.of_shard(assignment, shard), **sizes):  # type: ignore[arg-type]
            group = PageGroup(rows=tuple(batch.row_pages.tolist()), blocks=batch.blocks, heads=batch.key_pages)
            found.put(group, batch.arrays)
    return found
