"""Keys that a table trains, rows of a table of their own, as a file has them beside the values: one tensor."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mempool.checkpoint.exchange.layouts import FLAT_KEYS, HEAD_KEYS, VALUES
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.format.tensor_file import TensorEntry
from mempool.checkpoint.reader import StoredTable
from mempool.types import OwnKeySpec, TableSchema
from mempool.types.keys import Grouping, grouping_of


def key_entry(schema: TableSchema) -> TensorEntry:
    """The tensor of a table of keys: [num_slots, key_dim], or [heads, ways, n, key_dim / ways]; of hierarchical keys
    [groups + num_slots, key_dim], groups first."""
    keys, width = schema.keys, schema.value_dim
    assert isinstance(keys, OwnKeySpec)
    if keys.sections == 1:
        return TensorEntry(name=FLAT_KEYS, dtype="float32", shape=(keys.rows, width))
    return TensorEntry(name=HEAD_KEYS, dtype="float32", shape=(keys.sections // keys.ways, keys.ways, keys.rows, width))


def key_rows(table: StoredTable, *, batch_bytes: int) -> Iterator[Tensor]:
    """Rows of that tensor, in order, of a table of keys in a checkpoint."""
    schema = table.state.schema
    keys, pages = schema.keys, Pages.all(schema)
    assert isinstance(keys, OwnKeySpec)
    grouping = grouping_of(keys, schema.num_slots)
    if grouping is not None:
        yield from _grouped_rows(table, grouping, batch_bytes=batch_bytes)
        return
    shape = key_entry(schema).shape[1:]
    per_row = 1 if keys.sections == 1 else keys.ways * keys.rows
    section, at, left = schema.num_slots // keys.sections, 0, torch.empty(0, schema.value_dim)
    for batch in table.batches(pages, arrays=(VALUES,), batch_bytes=batch_bytes):
        some = batch.arrays[VALUES][: schema.num_slots - at]
        slots = torch.arange(at, at + len(some))
        at += len(some)
        left = torch.cat((left, some[slots % section < keys.rows]))  # the others fill sections up
        whole = len(left) // per_row * per_row
        yield left[:whole].view(-1, *shape)
        left = left[whole:]


def _grouped_rows(table: StoredTable, grouping: Grouping, *, batch_bytes: int) -> Iterator[Tensor]:
    """Keys of groups, and then of slots: which lie among each other, so the pages are read twice."""
    for of_groups in (True, False):
        at = 0
        for batch in table.batches(Pages.all(table.state.schema), arrays=(VALUES,), batch_bytes=batch_bytes):
            some = batch.arrays[VALUES][: grouping.num_rows - at]
            rows = torch.arange(at, at + len(some))
            at += len(some)
            yield some[(rows % grouping.pitch == 0) == of_groups]
