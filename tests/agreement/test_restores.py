"""A checkpoint of four shards in pools of one, three and eight, by columns and by rows: bit for bit, all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mempool
from mempool.client import Table
from mempool.optim import SGD, Adagrad, Adam, AdamW

from .conftest import Pools
from .test_checkpoints import _equal, _state, _train

TABLES: dict[str, dict[str, Any]] = {
    "int8": {"optimizer": Adagrad(0.1), "dtype": "int8"},
    "float8-keys": {
        "optimizer": SGD(0.1, momentum=0.9),
        "dtype": "float8_e4m3fn",
        "num_slots": 256,
        "keys": mempool.ProductKeys(heads=4, key_dim=8),
    },
    "master": {"optimizer": Adam(0.01), "dtype": "bfloat16", "master": True, "keys": mempool.FlatKeys(key_dim=8)},
    "dense": {"optimizer": AdamW(0.01, weight_decay=0.1, dense=True)},
}


def _versions(pool: mempool.Pool, tables: list[Table]) -> dict[str, tuple[int, int]]:
    """Version and step count of each."""
    seen = {table.name: table.version for shard in pool.status().shards for table in shard.tables}
    return {table.name: (seen[table.name], table.step_count()) for table in tables}


@pytest.mark.parametrize("taken_by", ["columns", "rows"])
def test_four_shards_are_restored_into_any(pools: Pools, taken_by: str, tmp_path: Path) -> None:
    pool = pools.pool(4)
    tables = []
    for name, fields in TABLES.items():
        fixed = {"num_slots": 300, "value_dim": 56, "block_dim": 8, "page_slots": 16, "layout": taken_by}
        tables.append(pool.create_table(mempool.TableConfig(**{"name": name} | fixed | fields)))
        pools.tables.append((pool, tables[-1]))
        _train(tables[-1], 3, seed=len(name))
        tables[-1].write(torch.arange(3), torch.ones(3, 56))
    pool.checkpoint(tmp_path, tables=TABLES)
    then = {table.name: _state(table) for table in tables}
    versions = _versions(pool, tables)
    for shards in (1, 3, 8):
        for layout in ("columns", "rows"):
            other = pools.pool(shards)
            restored = other.restore(tmp_path, layout=layout)
            pools.tables += [(other, table) for table in restored]
            assert [table.schema.layout for table in restored] == [layout] * len(TABLES)
            for table in restored:
                _equal(then[table.name], _state(table))
            assert _versions(other, list(restored)) == versions
            for _ in restored:
                home, table = pools.tables.pop()
                home.drop_table(table.name)
