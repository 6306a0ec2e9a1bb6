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
from mempool.types.sizes import key_page_bytes, owned_bytes, row_page_bytes, slot_bytes, state_names

from .schemas import PLAIN

CPU = torch.device("cpu")


@pytest.mark.parametrize("rule", STATE_NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("changes", [{}, {"keys": FlatKeySpec(key_dim=3)}, {"value_dim": 37, "block_dim": 8}])
def test_rows_weigh_what_a_shard_says(rule: str, dtype: Any, changes: dict[str, Any]) -> None:
    schema = replace(PLAIN, dtype=dtype, master=dtype == "int8", **changes)
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
def test_what_a_placement_gives_a_shard_weighs_what_it_takes_there(layout: Any) -> None:
    schema = resolve(
        TableConfig(name="a", num_slots=24**2, value_dim=100, dtype="int8", keys=ProductKeys(heads=3, key_dim=6))
    )
    found = plan(None, range(3), num_row_pages=schema.num_row_pages, num_blocks=2, num_key_pages=3, layout=layout)
    placement = Placement(table_id=0, epoch=1, owners=found.owners, key_owners=found.key_owners)
    for shard in range(4):
        storage = Storage(schema, shard=shard, device=CPU)
        page_tables = 4 * schema.num_row_pages * len(np.unique(found.owners == shard, axis=0))
        assert 0 <= storage.initial_bytes(placement) - owned_bytes(schema, placement, shard) <= page_tables
    assert key_page_bytes(schema) == 4 * 24 * 6
