"""A pool that trains on while its checkpoint is written: what is restored is bit for bit what the tables were then."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mempool
from mempool.client import Table
from mempool.optim import SGD, Adagrad, Adam, AdamW, RowWiseAdagrad, RowWiseAdam

from .conftest import Pools

SLOTS, DIM = 640, 24

CASES: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": SGD(0.1, momentum=0.9), "dtype": "bfloat16"},
    "SGD of int8": {"optimizer": SGD(0.1), "dtype": "int8"},
    "Adagrad": {"optimizer": Adagrad(0.1), "dtype": "float8_e4m3fn"},
    "row-wise Adagrad": {"optimizer": RowWiseAdagrad(0.1)},
    "Adam": {"optimizer": Adam(0.01), "dtype": "bfloat16", "master": True},
    "row-wise Adam": {"optimizer": RowWiseAdam(0.01), "dtype": "bfloat16", "keys": mempool.FlatKeys(key_dim=8)},
    "dense AdamW": {"optimizer": AdamW(0.01, weight_decay=0.1, dense=True)},
    "dense AdamW, grid": {
        "optimizer": AdamW(0.01, weight_decay=0.1, dense=True),
        "dtype": "bfloat16",
        "master": True,
        "layout": "grid",
    },
    "product keys": {
        "optimizer": AdamW(0.01),
        "num_slots": 256,
        "keys": mempool.ProductKeys(heads=4, key_dim=8),
        "layout": "rows",
    },
}


def _config(name: str, case: str) -> mempool.TableConfig:
    return mempool.TableConfig(
        **{"name": name, "num_slots": SLOTS, "value_dim": DIM, "block_dim": 8, "page_slots": 16, "seed": 3} | CASES[case]
    )


def _train(table: Table, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(table.num_slots, (6, 5), generator=generator)
        weights = torch.rand(6, 5, generator=generator).requires_grad_(True)
        pooled = table.gather(ids, weights)
        pooled.backward(torch.randn(pooled.shape, generator=generator))  # the same, however rows are spread
        table.commit()


def _state(table: Table) -> dict[str, Tensor]:
    everything = torch.arange(table.num_slots)
    state = {"values": table.rows(everything), **table.state(everything)}
    return state | ({} if table.schema.keys is None else {"keys": table.read_keys()})


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        same = torch.equal(tensor.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        assert same, name


@pytest.mark.parametrize("case", CASES)
def test_a_restored_table_is_bit_for_bit_what_was_and_trains_on_as_that_does(
    pools: Pools, case: str, tmp_path: Path
) -> None:
    pool, other = pools.pool(3), pools.pool(2)
    table = pool.create_table(_config("facts", case))
    pools.tables.append((pool, table))
    _train(table, 4, seed=1)
    taken = pool.checkpoint(tmp_path, tables=["facts"])
    then = _state(table)
    assert taken.done and [(each.table, each.version) for each in taken.tables] == [("facts", 4)]
    (restored,) = other.restore(tmp_path)
    pools.tables.append((other, restored))
    _equal(then, _state(restored))
    assert restored.step_count() == table.step_count() == 4
    _train(table, 3, seed=2)
    _train(restored, 3, seed=2)
    _equal(_state(table), _state(restored))
