"""Counts of use of a pool on a disk: killed or closed, and opened again, none is lost and none is counted twice."""

from pathlib import Path

import pytest
import torch
from killed_copies import left_by_a_kill
from torch import Tensor

import mempool
from mempool.client import Pool, Table
from mempool.nn import PEERLayer
from mempool.shard.durable.store import Store

SLOTS = 200
KEYS = mempool.FlatKeys(key_dim=4)
TABLES = (
    mempool.TableConfig(name="facts", num_slots=SLOTS, value_dim=24, block_dim=8, usage=True, keys=KEYS),
    mempool.TableConfig(
        name="dense",
        num_slots=SLOTS,
        value_dim=8,
        dtype="int8",
        master=True,
        usage=True,
        optimizer=mempool.optim.AdamW(lr=0.1, dense=True),
    ),
    mempool.TableConfig(name="experts", num_slots=14**2, value_dim=12, layout="rows", usage=True),
)


def step(tables: list[Table], layer: PEERLayer, number: int) -> None:
    random = torch.Generator().manual_seed(number)
    for table in tables[:2]:
        ids = (150 * torch.rand(8, 5, generator=random) ** 2).long()
        table.gather(ids, torch.rand(8, 5, generator=random)).square().sum().backward()
        table.commit()
    layer(torch.randn(6, 6, generator=random)).square().sum().backward()
    tables[2].commit()
    if number == 3:
        for table in tables[:2]:
            table.reinit(noise=0.1, seed=number)
            table.reinit([0, 1, 2], from_=[197, 198, 199], force=True)  # which have a past to lose


def held(tables: list[Table]) -> dict[str, Tensor]:
    found = {}
    for table in tables:
        counts, every = table.usage(range(table.num_slots)), torch.arange(table.num_slots)
        arrays = {"uses": counts.uses, "last use": counts.last_use, "rows": table.rows(every), **table.state(every)}
        found |= {f"{table.name} {name}": rows for name, rows in arrays.items()}
    return found | {"keys": tables[0].read_keys()}


def opened(pool: Pool) -> tuple[list[Table], PEERLayer]:
    tables = [pool.create_table(config, exist_ok=True) for config in TABLES]
    torch.manual_seed(5)
    return tables, PEERLayer(6, table=tables[2], heads=2, topk=3, key_dim=4)


@pytest.mark.parametrize("snapshots", [False, True], ids=["journal", "snapshots"])
def test_what_was_counted_outlives_the_process(
    tmp_path: Path, snapshots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mempool.local(shards=2) as pool:
        tables, layer = opened(pool)
        for number in range(1, 7):
            step(tables, layer, number)
        never_died = held(tables)
    assert never_died["experts uses"].sum() == 6 * 6 * 2 * 3
    assert 0 < never_died["facts uses"].sum() < 6 * 8 * 5
    if snapshots:
        monkeypatch.setitem(Store.__init__.__kwdefaults__, "journal_limit", 2**15)
    with mempool.local(tmp_path / "0", shards=2) as pool:
        tables, layer = opened(pool)
        for number in range(1, 7):
            step(tables, layer, number)
            if number in (2, 3, 5):
                left_by_a_kill(tmp_path / "0", tmp_path / str(number))
    for number in (2, 3, 5, 6):
        with mempool.local(tmp_path / str(0 if number == 6 else number)) as pool:
            tables, layer = opened(pool)
            for later in range(number + 1, 7):
                step(tables, layer, later)
            found = held(tables)
            for name, rows in never_died.items():
                assert torch.equal(found[name], rows), f"{name}, of a pool that was killed after step {number}"
