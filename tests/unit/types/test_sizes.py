"""Bytes by schema are the bytes a shard takes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mempool.config import ProductKeys, TableConfig, resolve
from mempool.kernels import STATE_NAMES
from mempool.placement import plan
from mempool.shard.pages.storage import Storage
from mempool.types import FlatKeySpec, OptimizerSpec, Placement
from mempool.types.sizes import (
    PAGE_TABLE_BYTES,
    bytes_by_owner,
    key_page_bytes,
    row_page_bytes,
    slot_bytes,
    state_names,
)

from .schemas import PLAIN

CPU = torch.device("cpu")


@pytest.mark.parametrize("rule", STATE_NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("changes", [{}, {"keys": FlatKeySpec(key_dim=3)}, {"value_dim": 37, "block_dim": 8}])
def test_rows_weigh_what_a_shard_says(rule: str, dtype: Any, changes: dict[str, Any]) -> None:
    schema = replace(PLAIN, dtype=dtype, master=dtype == "int8", usage=dtype in ("int8", "bfloat16"), **changes)
    dense = rule == "adamw" and dtype != "bfloat16"  # there is no other
    algorithm: Any = rule.removesuffix("_momentum")
    optimizer = OptimizerSpec(algorithm=algorithm, lr=0.1, dense=dense, momentum=0.5 if algorithm != rule else 0.0)
    schema = replace(schema, optimizer=optimizer)
    storage = Storage(schema, shard=0, device=CPU)
    everything = tuple(range(schema.num_blocks))
    assert row_page_bytes(schema) == storage.page_bytes(everything)
    assert state_names(optimizer) == STATE_NAMES[rule]
    for blocks in (everything[:1], everything[1:], everything[-1:]):
        width, first = schema.width(blocks), int(0 in blocks)
        per_slot = slot_bytes(schema, width=width, blocks=len(blocks), first=first)
        assert per_slot * schema.page_slots == storage.page_bytes(blocks)


@pytest.mark.parametrize("layout", ["columns", "rows", "grid", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_an_assignment_gives_a_shard_weighs_what_it_takes_there(layout: Any, dtype: Any) -> None:
    keys = ProductKeys(heads=3, key_dim=6)
    schema = resolve(TableConfig(name="a", num_slots=24**2, value_dim=100, dtype=dtype, block_dim=40, keys=keys))
    rows, blocks = schema.num_row_pages, schema.num_blocks
    found = plan(None, range(4), num_row_pages=rows, num_blocks=blocks, num_key_pages=3, layout=layout)
    placement = Placement(table_id=0, epoch=1, owners=found.owners, key_owners=found.key_owners)
    held = bytes_by_owner(schema, found.owners, found.key_owners)
    assert tuple(held) == placement.shards
    for shard in range(4):
        taken = Storage(schema, shard=shard, device=CPU).initial_bytes(placement)
        page_tables = PAGE_TABLE_BYTES * rows * len(np.unique(found.owners == shard, axis=0))
        filled_up = 0 if dtype == "float32" else 18 * rows * schema.page_slots  # to 16 bytes a row
        assert 0 <= taken - held.get(shard, 0) <= page_tables + filled_up
    assert key_page_bytes(schema) == 4 * 24 * 6


def test_a_large_assignment_is_weighed_in_one_pass() -> None:
    large = replace(PLAIN, num_slots=2**20, page_slots=1, stride=2**10, value_dim=1, block_dim=1)
    owners = (np.arange(2**20, dtype=np.int32) % 1000)[:, None]
    held = bytes_by_owner(large, owners, np.empty(0, dtype=np.int32))
    assert len(held) == 1000
    assert held[999] == 8 * 1048
