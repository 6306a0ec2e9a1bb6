"""Bags that have no pairs on a shard are not sent to it, nor answered by it: bytes, sums and gradients."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

import mempool
from mempool import optim
from mempool.client.routing.attempt import Attempt
from mempool.types import StepId
from mempool.types.bags import Bags
from mempool.wire.channels.loop import run
from tests.unit.client.grpc_pool import GrpcPoolHere

SHARDS, WIDTH = 4, 12
IDS = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:48].unsqueeze(1)


@pytest.fixture(scope="module", params=["embedded", "gRPC", "lines"])
def pool(request: pytest.FixtureRequest) -> Iterator[mempool.Pool]:
    if request.param == "embedded":
        with mempool.local(shards=SHARDS) as pool:
            yield pool
        return
    served = GrpcPoolHere(shards=SHARDS, near=request.param == "lines")
    try:
        with mempool.connect(served.address) as pool:
            yield pool
    finally:
        served.close()


def table_of(pool: mempool.Pool, layout: str) -> mempool.Table:
    return pool.create_table(
        mempool.TableConfig(
            name=layout, num_slots=64, value_dim=WIDTH, block_dim=WIDTH, page_slots=4, layout=layout,
            optimizer=optim.Adagrad(lr=0.1), seed=3,
        )
    )  # fmt: skip


def test_one_pair_bags_train_as_if_a_shard_had_the_table(pool: mempool.Pool) -> None:
    rows, whole = table_of(pool, "rows"), table_of(pool, "columns")  # of one block: of one shard
    grads = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1))

    def step(table: mempool.Table) -> tuple[Tensor, Tensor]:
        weights = (torch.arange(48.0).unsqueeze(1) / 48).requires_grad_()
        values = table.gather(IDS, weights)
        values.backward(grads)
        assert weights.grad is not None
        return values.detach(), weights.grad

    for _ in range(3):
        values, weight_grad = step(rows)
        expected, expected_grad = step(whole)
        assert torch.equal(values, expected)
        assert torch.equal(weight_grad, expected_grad)
        assert rows.commit() == whole.commit() == 1
    assert torch.equal(rows.rows(torch.arange(64)), whole.rows(torch.arange(64)))


@pytest.mark.parametrize("known", [True, False])
def test_sums_and_gradients_move_once_whatever_the_shards(pool: mempool.Pool, known: bool) -> None:
    table_id, router = pool.table("rows").schema.table_id, pool.router
    bags = Bags(ids=IDS.reshape(-1).to(torch.int32), weights=torch.ones(48), offsets=torch.arange(49))

    def moved() -> tuple[int, int]:
        sent, received = router.traffic.bytes_sent, router.traffic.bytes_received
        router.traffic.bytes_sent = router.traffic.bytes_received = 0
        return sent, received

    moved()
    values, record = run(router.gather(table_id, bags=bags, remember=known))
    named = 48 * (4 + 4) + (48 + SHARDS) * 8  # an id, a weight and an offset each, and an offset more of each shard
    assert moved() == (named, values.nbytes)
    step = StepId(group=f"{known}", rank=0, step=1)
    grads = torch.ones(48, WIDTH)
    update = partial(
        Attempt.update, record=record, grads=grads, step_id=step, sequence=1, hold=False, want_weight_grad=True
    )
    found = run(router.call(table_id, update))
    assert found is not None
    assert torch.allclose(found, values.sum(dim=1), rtol=1e-5, atol=1e-6)
    assert moved() == (grads.nbytes + (0 if known else named), found.nbytes)
