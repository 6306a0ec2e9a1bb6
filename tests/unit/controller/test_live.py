"""Rescales while a trainer goes on: nothing lost, nothing doubled, nobody stuck."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

import mempool

from .bench import Bench, config


@pytest.fixture(params=["columns", "rows", "auto"])
def bench(request: pytest.FixtureRequest) -> Iterator[tuple[Bench, str]]:
    with Bench(3, round_bytes=60_000) as bench:
        yield bench, request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("keys", [None, mempool.FlatKeys(key_dim=16), mempool.ProductKeys(heads=3, key_dim=16)])
def test_tables_of_every_dtype_and_kind_of_keys_move(dtype: str, keys: object) -> None:
    with Bench(2) as bench:
        table = bench.pool.create_table(
            config(num_slots=24**2, layout="auto", dtype=dtype, keys=keys, optimizer=mempool.optim.AdamW(lr=0.1))
        )
        ids = torch.arange(24**2)
        values = table.rows(ids)
        queries = torch.randn(5, 3, 16) if isinstance(keys, mempool.ProductKeys) else torch.randn(5, 16)
        found = None if keys is None else table.lookup(queries, topk=4)
        for shards in (4, 1, 3):
            bench.pool.rescale(shards)
            assert torch.equal(table.rows(ids), values)
            if found is not None:
                assert torch.equal(table.lookup(queries, topk=4).ids, found.ids)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_training_through_many_rescales_is_local_training(bench: tuple[Bench, str]) -> None:
    pool, layout = bench[0].pool, bench[1]
    table = pool.create_table(config(layout=layout, value_dim=96, optimizer=mempool.optim.Adagrad(lr=0.1)))
    local = torch.nn.EmbeddingBag(600, 96, mode="sum", sparse=True)
    with torch.no_grad():
        local.weight.copy_(table.rows(torch.arange(600)))
    local_optimizer = torch.optim.Adagrad([local.weight], lr=0.1)
    stop = threading.Event()
    steps = 0
    failures: list[BaseException] = []

    def train() -> None:
        nonlocal steps
        generator = torch.Generator().manual_seed(1)
        try:
            while not stop.is_set():
                local_optimizer.zero_grad()
                for _ in range(1 + steps % 3):  # several updates a step: all must survive a move together
                    ids = torch.randint(600, (4, 6), generator=generator)
                    weights = torch.rand(4, 6, generator=generator)
                    target = torch.rand(4, 96, generator=generator)
                    (table.gather(ids, weights) - target).square().sum().backward()
                    (local(ids, per_sample_weights=weights) - target).square().sum().backward()
                table.prepare(want_norm=steps % 2 == 0)
                table.commit()
                local_optimizer.step()
                steps += 1
        except BaseException as error:
            failures.append(error)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for shards in (2, 4, 1, 3, 2, 4):
            # The first step may wait for a kernel to be compiled: a step at least between any two rescales.
            before, deadline = steps, time.monotonic() + 60
            while steps == before and not failures and time.monotonic() < deadline:
                time.sleep(0.001)
            pool.rescale(shards)
    finally:
        stop.set()
        trainer.join(60)
    assert not trainer.is_alive()
    assert not failures
    values, expected = table.rows(torch.arange(600)), local.weight.detach()
    assert steps > 5
    assert torch.linalg.norm(values - expected) <= 1e-5 * torch.linalg.norm(expected)
    for shard in pool.status().shards:
        for status in shard.tables:
            assert status.pages == 0 or status.updates_applied == table.counters.updates_committed
            assert status.pages == 0 or status.version == steps
