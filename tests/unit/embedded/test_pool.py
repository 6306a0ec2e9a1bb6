"""The embedded pool as a user meets it."""

import gc
import pickle
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

import mempool
from mempool import errors
from mempool.embedded import EngineLauncher
from mempool.wire.channels.loop import run


def _threads() -> set[threading.Thread]:
    """But those of the loop that all pools of a process share, and of its executor."""
    shared = ("mempool-io", "asyncio_")
    return {thread for thread in threading.enumerate() if not thread.name.startswith(shared)}


def test_it_serves_scales_and_ends_with_its_threads() -> None:
    before = _threads()
    with mempool.local(shards=2, name="mine") as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=100, value_dim=48))
        rows = table.rows(torch.arange(100))
        pool.rescale(3)
        assert torch.equal(table.rows(torch.arange(100)), rows)
        assert [shard.state for shard in pool.status().shards] == ["ready"] * 3
        assert pool.status().name == "mine"
    assert _threads() <= before
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
        table_id = table.schema.table_id
        pool.router.versions.saw(
            table_id, 1 + (pool.router.known_version(table_id) or 0)
        )  # what a restore of an older state would look like
        with pytest.raises(errors.DataLoss, match="version 1, and this client has seen version 2 acknowledged"):
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
        with pytest.raises(errors.InvalidRequest, match="in this process only"):
            pickle.dumps(table)


def _shard_threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.endswith(f"pool {name!r}")]


def test_a_pool_that_is_not_closed_ends_with_the_last_that_holds_it_and_is_warned_of() -> None:
    def trained() -> tuple[mempool.Table, torch.Tensor]:
        pool = mempool.local(shards=2, name="lost", timeout_s=60)
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=8))
        return table, table.gather(torch.tensor([[1, 2]]))

    gc.disable()  # no cycle holds it
    try:
        table, pooled = trained()
        gone = weakref.ref(table)
        del table
        pooled.sum().backward()  # a graph is enough
        assert len(_shard_threads("lost")) == 2
        with pytest.warns(ResourceWarning, match="embedded pool 'lost' was not closed"):
            del pooled
        assert gone() is None
        for thread in _shard_threads("lost"):
            thread.join(30.0)
        assert not _shard_threads("lost")
    finally:
        gc.enable()


def test_a_closed_pool_says_that_it_was_embedded() -> None:
    with mempool.local(name="mine", timeout_s=60) as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=8))
    with pytest.raises(errors.InvalidRequest) as raised:
        table.rows(torch.tensor([1]))
    assert str(raised.value) == (
        "embedded pool 'mine' is closed, and its tables ended with it; make another with mempool.local()."
    )


def test_its_engines_name_no_keys_of_a_config_that_there_is_not() -> None:
    launcher = EngineLauncher(device="cpu", pool="keyless")
    info = run(launcher.start(0), timeout_s=20)
    engine: Any = launcher.dial(info)
    try:
        assert not engine._budget.configured
    finally:
        run(launcher.stop(info), timeout_s=20)
