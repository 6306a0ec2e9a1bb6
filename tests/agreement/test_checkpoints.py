"""A pool that trains on while its checkpoint is written: what is restored is bit for bit what the tables were then."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mempool
from mempool.checkpoint import looking
from mempool.checkpoint.format.layout import PageGroup
from mempool.checkpoint.stores import open_store
from mempool.client import Table
from mempool.client.checkpoints import CheckpointHandle
from mempool.errors import AlreadyExists, DataLoss, DeadlineExceeded, InvalidRequest, NotFound
from mempool.optim import SGD, Adagrad, Adam, AdamW, RowWiseAdagrad, RowWiseAdam
from mempool.shard.saving import marks
from mempool.shard.saving.marks import Mark, Saving
from mempool.types import RestoreTables

from .conftest import Pools

SLOTS, DIM = 640, 24
WAIT_S = 30.0

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
        **{"name": name, "num_slots": SLOTS, "value_dim": DIM, "block_dim": 8, "page_slots": 16, "seed": 3}
        | CASES[case]
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
    assert [(each.table, each.version) for each in taken.tables] == [("facts", 4)]
    (restored,) = other.restore(tmp_path)
    pools.tables.append((other, restored))
    _equal(then, _state(restored))
    assert restored.step_count() == table.step_count() == 4
    _train(table, 3, seed=2)
    _train(restored, 3, seed=2)
    _equal(_state(table), _state(restored))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Of each part's groups, which are small here, all but the first are read out and written once it is set."""
    opened, read = threading.Event(), Saving._read
    begun: set[Mark] = set()

    async def gated(self: Saving, found: Mark, group: PageGroup | None) -> dict[str, Tensor]:
        while found in begun and not opened.is_set():
            await asyncio.sleep(0.005)
        begun.add(found)
        return await read(self, found, group)

    monkeypatch.setattr(Saving, "_read", gated)
    monkeypatch.setattr(marks, "_GROUP_BYTES", 4096)
    yield opened
    opened.set()


def _begun(pool: mempool.Pool, place: Path, **options: Any) -> CheckpointHandle:
    """A checkpoint whose moment is taken."""
    handle = pool.checkpoint(place, wait=False, **options)
    for _ in range(round(WAIT_S / 0.01)):
        if handle.progress.tables or handle.done:
            return handle
        time.sleep(0.01)
    raise AssertionError(handle.progress)


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_while_it_is_written_is_not_in_it(
    pools: Pools, case: str, tmp_path: Path, gate: threading.Event
) -> None:
    pool, other = pools.pool(3), pools.pool(2)
    table, twin = pool.create_table(_config("facts", case)), pools.pool(1).create_table(_config("facts", case))
    pools.tables += [(pool, table), (pools.pool(1), twin)]
    for one in (table, twin):
        _train(one, 5, seed=1)
    handle = _begun(pool, tmp_path, tables=["facts"])
    _train(table, 5, seed=2)
    if table.schema.keys is not None:
        keys = table.read_keys()
        table.write_keys(torch.zeros_like(keys))
    gate.set()
    assert handle.wait(WAIT_S).done
    (restored,) = other.restore(tmp_path)
    pools.tables.append((other, restored))
    _equal(_state(twin), _state(restored))
    for one in (twin, restored):
        _train(one, 5, seed=2)
    if table.schema.keys is not None:
        table.write_keys(keys)
    _equal(_state(table), _state(restored))
    _equal(_state(table), _state(twin))


def test_increments_have_what_changed_and_are_whole(pools: Pools, tmp_path: Path) -> None:
    with pools.fresh(3) as pool:
        table = pool.create_table(_config("facts", "Adam"))
        pool.create_table(_config("rest", "product keys"))
        _train(table, 2, seed=1)
        names = []
        for number in range(3):
            taken = pool.checkpoint(tmp_path, extra={"number": number})
            names.append(taken.name)
            then = _state(table)
            table.write(torch.arange(3) + 100 * number, torch.ones(3, DIM))
        found = looking.checkpoints(open_store(tmp_path))
        assert [each["name"] for each in found] == names
        assert found[1]["own_bytes"] < found[0]["own_bytes"] / 4
        assert looking.inspect(open_store(tmp_path))["extra"] == {"number": 2}
        pool.rescale(2)  # pages that moved are written again
        taken = pool.checkpoint(tmp_path, keep=2)
        assert not looking.verify(open_store(tmp_path), names[2]).damages
        assert [each["name"] for each in looking.checkpoints(open_store(tmp_path))] == [names[2], taken.name]
        (restored,) = pool.restore(tmp_path, checkpoint=names[2], tables=["facts"], name="facts-then")
        _equal(then, _state(restored))
        now = _state(table)
        _train(table, 1, seed=9)
        facts, _ = pool.restore(tmp_path, replace=True)
        _equal(now, _state(facts))
        assert sorted(each.name for each in pool.tables()) == ["facts", "facts-then", "rest"]
        assert facts is table, "what uses it goes on with what was restored"


def test_a_restore_that_comes_again_late_takes_no_place_of_what_it_made(
    pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a connection that broke, by which it is sent anew: what was trained since stays."""
    with pools.fresh(1) as pool:
        table = pool.create_table(_config("facts", "SGD"))
        pool.checkpoint(tmp_path)
        before = _state(table)
        sent: list[RestoreTables] = []
        restore = pool._api.restore
        with monkeypatch.context() as patch:
            patch.setattr(pool._api, "restore", lambda request: (sent.append(request), restore(request))[1])
            (table,) = pool.restore(tmp_path, replace=True)
        _train(table, 1, seed=9)
        trained = _state(table)
        with pytest.raises(AlreadyExists, match="after this restore was asked for"):
            pool._connection.run(restore(sent[0]))
        _equal(trained, _state(pool.table("facts")))
        (table,) = pool.restore(tmp_path, replace=True)
        _equal(before, _state(table))


def test_all_tables_are_of_one_step_boundary(pools: Pools, tmp_path: Path) -> None:
    """A trainer steps two tables together while checkpoints are taken: both have as many steps in each of them."""
    with pools.fresh(3) as pool:
        tables = [pool.create_table(_config(name, "SGD")) for name in ("one", "two")]
        stop = threading.Event()
        steps = 0

        def train() -> None:
            nonlocal steps
            optimizer = mempool.optim.PoolOptimizer(tables)
            while not stop.is_set():
                for table in tables:
                    table.gather(torch.randint(SLOTS, (4, 3)), torch.ones(4, 3)).sum().backward()
                optimizer.step()
                steps += 1

        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            seen = []
            for _ in range(4):
                before, taken = steps, pool.checkpoint(tmp_path)
                one, two = (each.version for each in taken.tables)
                assert one == two >= before
                seen.append(one)
        finally:
            stop.set()
            trainer.join(WAIT_S)
        assert not trainer.is_alive()
        assert seen == sorted(seen)
        assert steps >= seen[-1]


def test_bad_places_and_names_change_nothing_and_say_what_to_do(pools: Pools, tmp_path: Path) -> None:
    pool = pools.pool(2)
    table = pools.table(num_slots=64, value_dim=8)
    for place in ("", "a\0b", "s3://a::b", "x" * 2000, "s3://a/../b", "S3 bucket://x", "no-such-scheme://x"):
        with pytest.raises(InvalidRequest):
            pool.checkpoint(place)
    for bad in (7, b"x", None):
        with pytest.raises(InvalidRequest):
            pool.checkpoint(bad)  # type: ignore[arg-type]
    for options in ({"keep": 0}, {"keep": True}, {"extra": {"a": object()}}, {"tables": []}, {"tables": [""]}):
        with pytest.raises(InvalidRequest):
            pool.checkpoint(tmp_path, **options)
    with pytest.raises(NotFound):
        pool.checkpoint(tmp_path, tables=["nothing"])
    with pytest.raises(NotFound, match="no checkpoint"):
        pool.restore(tmp_path)
    pool.checkpoint(tmp_path, tables=[table.name])
    with pytest.raises(AlreadyExists):
        pool.restore(tmp_path)
    with pytest.raises(NotFound, match="has no table"):
        pool.restore(tmp_path, tables=["nothing"])
    for options in ({"name": "bad name"}, {"layout": "spiral"}, {"name": "x", "tables": ["a", "b"]}, {"layout": 3}):
        with pytest.raises(InvalidRequest):
            pool.restore(tmp_path, **({"tables": [table.name]} | options))
    (file,) = list(tmp_path.glob("*/*.safetensors"))[:1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = _state(table)
    with pytest.raises(DataLoss, match=file.name):
        pool.restore(tmp_path, replace=True)
    _equal(before, _state(table))
    with pytest.raises(DataLoss, match=file.name):
        pool.restore(tmp_path, tables=[table.name], name="another")
    assert "another" not in [each.name for each in pool.tables()]
    with mempool.local(name="another", device="cpu") as another:
        another.create_table(mempool.TableConfig(name="x", num_slots=64, value_dim=8))
        with pytest.raises(InvalidRequest, match="another"):
            another.checkpoint(tmp_path)


def test_one_at_a_time_and_a_table_that_is_dropped_meanwhile(
    pools: Pools, tmp_path: Path, gate: threading.Event
) -> None:
    with pools.fresh(2) as pool:
        table = pool.create_table(_config("facts", "SGD"))
        handle = _begun(pool, tmp_path)
        with pytest.raises(InvalidRequest, match="under way"):
            pool.checkpoint(tmp_path / "other")
        with pytest.raises(DeadlineExceeded):
            handle.wait(0.01)
        moving = threading.Thread(target=pool.rescale, args=(3,))  # waits: pages stay where they are meanwhile
        moving.start()
        _train(table, 2, seed=1)
        assert len(pool.status().shards) == 2
        assert str(tmp_path) in pool.status().checkpoint
        gate.set()
        assert handle.wait(WAIT_S).held_s >= 0.0
        moving.join(WAIT_S)
        assert len(pool.status().shards) == 3
        assert pool.checkpoint(tmp_path).tables[0].version == 2
        pool.drop_table("facts")
        with pytest.raises(InvalidRequest, match="no tables"):
            pool.checkpoint(tmp_path)
