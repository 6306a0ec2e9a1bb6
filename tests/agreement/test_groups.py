"""Ranks that step together train what one process trains on the whole batch."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mempool
from mempool.client import Pool
from mempool.wire.channels import line_channel
from mempool.wire.channels.loop import run
from tests.agreement.ranks import Ranks, push
from tests.unit.client.grpc_pool import GrpcPoolHere

SLOTS, DIM, STEPS = 96, 24, 6
OPTIMIZERS = {
    "sgd": mempool.optim.SGD(lr=0.3),
    "adagrad": mempool.optim.Adagrad(lr=0.2),
    "adam": mempool.optim.Adam(lr=0.05),
    "adamw": mempool.optim.AdamW(lr=0.05, dense=True),
}


@pytest.fixture
def here() -> Iterator[GrpcPoolHere]:
    pool = GrpcPoolHere(shards=2)
    yield pool
    pool.close()


def config(name: str, optimizer: object) -> mempool.TableConfig:
    return mempool.TableConfig(name=name, num_slots=SLOTS, value_dim=DIM, seed=5, optimizer=optimizer)


def trained_alone(name: str, optimizer: object, *, world_size: int, scale: float) -> torch.Tensor:
    with mempool.local(shards=1) as pool:
        table = pool.create_table(config(name, optimizer))
        for step in range(STEPS):
            push(table, step, rank=0, world_size=1)
            table.commit(grad_scale=scale / world_size)
        return table.rows(range(SLOTS))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_what_one_process_trains(here: GrpcPoolHere, name: str, world_size: int) -> None:
    optimizer = OPTIMIZERS[name]
    with Ranks(here, [config(name, optimizer)], world_size=world_size) as ranks:

        def train(rank: int, pool: Pool) -> None:
            table = pool.table(name)
            for step in range(STEPS):
                push(table, step, rank=rank, world_size=world_size)
                assert table.commit() == 1

        ranks.each(train)
        table = ranks.pools[0].table(name)
        assert table.link.version() == STEPS
        trained = table.rows(range(SLOTS))
    alone = trained_alone(name, optimizer, world_size=world_size, scale=1.0)
    assert (trained - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize("flat", [False, True])
def test_keys_in_the_pool_are_trained_by_all_ranks_too(here: GrpcPoolHere, flat: bool) -> None:
    of_keys = mempool.optim.AdamW(lr=0.05, dense=True)
    keys = (
        mempool.FlatKeys(key_dim=8, optimizer=of_keys)
        if flat
        else mempool.ProductKeys(heads=2, key_dim=8, optimizer=of_keys)
    )
    config = mempool.TableConfig(name="keyed", num_slots=100, value_dim=8, seed=5, keys=keys)

    def train(table: mempool.Table, rank: int, world_size: int) -> None:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            queries = torch.randn(12, *((8,) if flat else (2, 8)), generator=generator)
            loss = table.lookup(queries.chunk(world_size)[rank], 4).values.square().sum()
            (loss * world_size).backward()
            assert table.commit() == 2

    with Ranks(here, [config], world_size=2) as ranks, mempool.local() as alone:
        ranks.each(lambda rank, pool: train(pool.table("keyed"), rank, 2))
        ours = ranks.pools[0].table("keyed")
        table = alone.create_table(config)
        train(table, 0, 1)
        for found, expected in ((ours.read_keys(), table.read_keys()), (ours.rows(range(100)), table.rows(range(100)))):
            assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert ours.keys.link.version() == ours.link.version() == STEPS


def trained(world_size: int, optimizer: object, *, shards: int = 2, during: object = None) -> torch.Tensor:
    here = GrpcPoolHere(shards=shards)
    try:
        with Ranks(here, [config("facts", optimizer)], world_size=world_size) as ranks:

            def train(rank: int, pool: Pool) -> None:
                table = pool.table("facts")
                for step in range(STEPS):
                    for micro in range(2):
                        push(table, 2 * step + micro, rank=rank, world_size=world_size)
                    table.commit()
                    if during is not None and rank == 0:
                        during(step, pool)

            ranks.each(train)
            return ranks.pools[0].table("facts").rows(range(SLOTS))
    finally:
        here.close()


def test_the_bits_do_not_depend_on_who_comes_first() -> None:
    first, second = (trained(3, OPTIMIZERS["adagrad"]) for _ in range(2))
    assert torch.equal(first, second)


def test_pages_that_move_meanwhile_change_nothing() -> None:
    def rescale(step: int, pool: Pool) -> None:
        if step in (1, 3):
            pool.rescale(4 if step == 1 else 3)

    moved = trained(2, OPTIMIZERS["adam"], during=rescale)
    assert torch.equal(moved, trained(2, OPTIMIZERS["adam"]))


def test_the_norm_is_of_the_whole_group(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("facts", OPTIMIZERS["sgd"])], world_size=2) as ranks, mempool.local() as alone:
        table = alone.create_table(config("facts", OPTIMIZERS["sgd"]))
        push(table, 0, rank=0, world_size=1)
        expected = table.prepare(norm_order=1.0)
        assert expected is not None

        def train(rank: int, pool: Pool) -> tuple[float, float]:
            push(pool.table("facts"), 0, rank=rank, world_size=2)
            prepared = pool.table("facts").prepare(norm_order=1.0)
            assert prepared is not None
            assert (prepared.finite, prepared.updates) == (True, 1)
            pool.table("facts").commit(grad_scale=0.5)
            return prepared.squared_norm, prepared.norm

        first, second = ranks.each(train)
        assert first == second
        assert first[0] == pytest.approx(expected.squared_norm / 4, rel=1e-6)
        assert first[1] == pytest.approx(expected.norm / 2, rel=1e-6)
        table.commit(grad_scale=0.25)
        rows = ranks.pools[1].table("facts").rows(range(SLOTS))
        assert (rows - table.rows(range(SLOTS))).norm() <= 1e-6 * rows.norm()


def test_a_rank_without_updates_takes_part_and_none_is_no_step(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("facts", OPTIMIZERS["sgd"])], world_size=2) as ranks:

        def train(rank: int, pool: Pool) -> list[int]:
            table = pool.table("facts")
            counts = [table.commit()]
            if rank == 1:
                push(table, 0, rank=0, world_size=1)
            return [*counts, table.commit()]

        assert ranks.each(train) == [[0, 0], [0, 1]]
        assert ranks.pools[0].table("facts").link.version() == 1


def test_a_commit_of_a_group_waits_for_one_more_call_than_one_alone(
    here: GrpcPoolHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    call = line_channel.LineChannel.call

    async def counted(channel: Any, method: Any, *arguments: Any, **options: Any) -> Any:
        calls[method.name] += 1
        return await call(channel, method, *arguments, **options)

    monkeypatch.setattr(line_channel.LineChannel, "call", counted)
    with Ranks(here, [config("facts", OPTIMIZERS["sgd"])], world_size=2) as ranks:

        def train(rank: int, pool: Pool) -> None:
            for step in range(STEPS):
                push(pool.table("facts"), step, rank=rank, world_size=2)
                pool.table("facts").commit()

        ranks.each(train)
        run(ranks.pools[0].table("facts").link.session.coordinator.applied([]), 10.0)
    # Each rank's arrival is waited for, the leader's word is not. Joining, and lives that go on, are a few.
    assert 3 * STEPS <= calls["Meet"] <= 3 * STEPS + 8
    assert calls["Prepare"] == 2 * STEPS  # two owners
    assert calls["Commit"] == 2 * STEPS + 2  # each rank has ended what was before it, as it joined
