"""Forks and resets over gRPC: three shards, two clients, one of which finds that a table has become another one."""

from collections.abc import Iterator

import pytest
import torch

import mempool
from mempool import errors, optim
from mempool.client import Pool, Table
from tests.unit.client.grpc_pool import GrpcPoolHere

SLOTS = 512
ALL = torch.arange(SLOTS)


@pytest.fixture
def here() -> Iterator[GrpcPoolHere]:
    made = GrpcPoolHere(shards=3)
    yield made
    made.close()


@pytest.fixture
def pool(here: GrpcPoolHere) -> Iterator[Pool]:
    with mempool.connect(here.address) as made:
        yield made


def step(table: Table, number: int) -> None:
    ids = torch.randint(0, SLOTS, (16, 4), generator=torch.Generator().manual_seed(number))
    table.gather(ids).square().sum().backward()
    table.commit()


def held(table: Table) -> tuple[torch.Tensor, ...]:
    return table.rows(ALL), table.state(ALL)["values.sum"], torch.tensor(table.step_count())


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


def test_a_fork_and_a_reset_over_grpc(here: GrpcPoolHere, pool: Pool) -> None:
    config = mempool.TableConfig(
        name="facts", num_slots=SLOTS, value_dim=192, page_slots=32, optimizer=optim.Adagrad(lr=0.1)
    )
    table = pool.create_table(config)
    for number in range(3):
        step(table, number)
    then, before = held(table), table.fork("before")
    assert same(held(before), then)
    with mempool.connect(here.address) as other:
        elsewhere = other.table("facts")
        late = elsewhere.gather(torch.tensor([[1, 2]]))
        for number in range(3, 6):
            step(table, number)
        wanted = held(table)
        trial = other.table("before").fork("trial")
        assert same(held(trial), then)
        assert same(held(before), then)
        table.reset(to="before")
        assert same(held(table), then)

        def go_on() -> None:
            late.sum().backward()
            elsewhere.commit()

        with pytest.raises(errors.MempoolError):
            go_on()
        assert same(held(other.reopen("facts")), then)
        for number in range(3, 6):
            step(elsewhere, number)
        assert same(held(table), wanted)
        assert same(held(before), then)
    shards = pool.status().shards
    assert sum(each.shared_bytes for shard in shards for each in shard.tables if each.name == "trial") > 0


def test_a_fork_is_refused_by_a_shard_that_does_not_hold_what_it_is_of(here: GrpcPoolHere, pool: Pool) -> None:
    """Half a fork is no table: the name is free again, and what it was to be of goes on."""
    table = pool.create_table(mempool.TableConfig(name="facts", num_slots=SLOTS, value_dim=192, page_slots=32))
    then = table.rows(ALL)
    here.stop_shard(1)
    with pytest.raises(errors.Unavailable):
        table.fork("trial")
    here.restart_shard(1)
    with pytest.raises(errors.DataLoss):
        table.fork("trial")
    assert [each.name for each in pool.tables()] == ["facts"]
    assert then.shape == (SLOTS, 192)
