"""The embedded pool as a user meets it."""

import pickle
import subprocess
import sys
import threading

import pytest
import torch

import mempool
from mempool import errors


def test_it_serves_scales_and_ends_with_its_threads() -> None:
    before = {thread for thread in threading.enumerate() if thread.name != "mempool-io"}
    with mempool.local(shards=2, name="mine") as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=100, value_dim=48))
        rows = table.rows(torch.arange(100))
        pool.rescale(3)
        assert torch.equal(table.rows(torch.arange(100)), rows)
        assert [shard.state for shard in pool.status().shards] == ["ready"] * 3
        assert pool.status().name == "mine"
    after = {thread for thread in threading.enumerate() if thread.name != "mempool-io"}
    assert after <= before
    with pytest.raises(errors.InvalidRequest, match="closed"):
        table.rows(torch.arange(3))


def test_values_do_not_depend_on_shards_or_layout() -> None:
    config = {"name": "facts", "num_slots": 333, "value_dim": 200, "seed": 11}
    rows = []
    for shards, layout in ((1, "auto"), (2, "columns"), (3, "rows"), (4, "grid"), (3, "auto")):
        with mempool.local(shards=shards) as pool:
            rows.append(pool.create_table(mempool.TableConfig(**config, layout=layout)).rows(torch.arange(333)))
    assert all(torch.equal(rows[0], other) for other in rows[1:])
    assert rows[0].std() == pytest.approx(200**-0.5, rel=0.02)


@pytest.mark.parametrize("shards", [0, -1, 2.5, True])
def test_no_pool_without_shards(shards: int) -> None:
    with pytest.raises(errors.InvalidRequest, match="at least 1 shard"):
        mempool.local(shards=shards)


def test_a_device_that_is_not_there_is_said() -> None:
    with pytest.raises(errors.ConfigError, match="device = 'cuda:99'"):
        mempool.local(device="cuda:99")


def test_without_the_server_packages_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import mempool\n"
        "try:\n    mempool.local()\n"
        "except mempool.errors.ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "pip install 'mempool[server]'" in done.stdout


def test_a_shard_that_lost_an_acknowledged_commit_is_not_believed() -> None:
    with mempool.local(shards=2) as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=128, layout="columns"))
        ids = torch.tensor([[1, 2]])
        table.gather(ids).sum().backward()
        table.commit()
        table.gather(ids)
        info = pool.status().shards[1].info
        engine = pool.router._dial(info)  # type: ignore[attr-defined]
        engine._tenancy._tables[table.schema.table_id].ledger.version -= 1  # what a restore of an older state would be
        with pytest.raises(errors.DataLoss, match="version 0, and this client has seen version 1 acknowledged"):
            table.gather(ids)


@pytest.mark.parametrize("keys", [mempool.FlatKeys(key_dim=16), mempool.ProductKeys(heads=2, key_dim=16)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_lookup_of_nothing_finds_nothing(keys: mempool.FlatKeys | mempool.ProductKeys, layout: str) -> None:
    with mempool.local(shards=2) as pool:
        config = mempool.TableConfig(name="keyed", num_slots=1024, value_dim=128, keys=keys, layout=layout)
        table = pool.create_table(config)
        shape = (0, 16) if isinstance(keys, mempool.FlatKeys) else (0, 2, 16)
        found = table.lookup(torch.empty(shape), topk=5)
        assert found.values.shape == (0, 128)
        assert found.ids.shape == (*shape[:-1], 5)


def test_a_table_is_not_pickled() -> None:
    with mempool.local() as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=8))
        with pytest.raises(errors.InvalidRequest, match="connect to the pool"):
            pickle.dumps(table)
