"""Short payloads on the wire: a look-up, its gradients and a step lose what is said, and no more, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mempool.client import Table
from mempool.optim import SGD

from .conftest import Pools
from .reference import all_rows

NUM_SLOTS, VALUE_DIM, BLOCK_DIM = 200, 60, 16  # 4 column blocks, the last one narrower
LR = 0.5


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, L], weights [B, L] that bfloat16 has, dY [B, V]: of all sizes, and one bag without any."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(NUM_SLOTS, (30, 8), generator=generator)
    weights = torch.randn(30, 8, generator=generator).bfloat16().float()
    direction = torch.randn(30, VALUE_DIM, generator=generator)
    direction *= torch.logspace(-4, 2, 30)[torch.randperm(30, generator=generator), None]
    direction[3] = 0.0
    return ids, weights, direction


def off_by(wire_dtype: str, exact: Tensor) -> Tensor:
    """[B, V] float64: how far numbers may be off on the wire."""
    if wire_dtype == "bfloat16":
        return exact.abs() * 2.0**-8
    largest = torch.stack([part.abs().amax(dim=1) for part in exact.split(BLOCK_DIM, dim=1)], dim=1)
    scales = largest.repeat_interleave(BLOCK_DIM, dim=1)[:, :VALUE_DIM] / 448
    return torch.maximum(exact.abs() / 16, scales * 2.0**-10)


def step(table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled values, d_weights, and the rows after one step."""
    ids, weights, direction = inputs()
    weights.requires_grad_(True)
    pooled = table.gather(ids, weights)
    pooled.backward(direction)
    table.commit()
    assert weights.grad is not None
    return pooled.detach(), weights.grad, all_rows(table)


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_nothing_is_off_by_more_than_is_said(pools: Pools, wire_dtype: Any, layout: str) -> None:
    table = pools.table(
        shards=2, layout=layout, optimizer=SGD(lr=LR), num_slots=NUM_SLOTS,
        value_dim=VALUE_DIM, block_dim=BLOCK_DIM, page_slots=16,
    )  # fmt: skip
    before = all_rows(table).double()
    table.wire_dtype = wire_dtype
    pooled, weight_grads, after = step(table)

    ids, weights, direction = (tensor if tensor.dtype == torch.int64 else tensor.double() for tensor in inputs())
    chosen = before[ids]
    exact = (weights[..., None] * chosen).sum(dim=1)
    rounding = 1e-5 * (weights[..., None] * chosen).abs().sum(dim=1)  # of sums in float32
    lost = off_by(wire_dtype, exact) if layout == "columns" else 0.0  # sums of parts come whole
    assert bool(((pooled.double() - exact).abs() <= lost * 1.001 + rounding).all())

    lost = off_by(wire_dtype, direction)
    exact = torch.einsum("bv,blv->bl", direction, chosen)
    bound = torch.einsum("bv,blv->bl", lost * 1.001 + 1e-5 * direction.abs(), chosen.abs())
    assert bool(((weight_grads.double() - exact).abs() <= bound).all())

    flat = ids.reshape(-1)
    moved = LR * (weights[..., None] * direction[:, None]).reshape(-1, VALUE_DIM)
    exact = before.index_add(0, flat, -moved)
    bound = torch.zeros_like(before).index_add(
        0,
        flat,
        LR * (weights.abs()[..., None] * (lost * 1.001 + 1e-5 * direction.abs())[:, None]).reshape(-1, VALUE_DIM),
    )
    assert bool(((after.double() - exact).abs() <= bound + 1e-6 * exact.abs()).all())


def test_packed_rows_are_the_same_to_the_bit_however_columns_lie(pools: Pools) -> None:
    config: dict[str, Any] = {"num_slots": NUM_SLOTS, "value_dim": VALUE_DIM, "block_dim": BLOCK_DIM}
    found = []
    for shards in (1, 2, 4):
        table = pools.table(shards=shards, layout="columns", optimizer=SGD(lr=LR), **config)
        table.wire_dtype = "float8_e4m3fn"
        pooled, _, rows = step(table)
        found.append((pooled, rows))
    for pooled, rows in found[1:]:
        assert torch.equal(pooled, found[0][0])
        assert torch.equal(rows, found[0][1])


def test_a_gradient_that_is_not_finite_is_told_and_steps_nothing(pools: Pools) -> None:
    table = pools.table(shards=2, layout="columns", num_slots=NUM_SLOTS, value_dim=VALUE_DIM, block_dim=BLOCK_DIM)
    table.wire_dtype = "float8_e4m3fn"
    ids, weights, direction = inputs()
    weights.requires_grad_(True)
    direction[2, 17] = float("inf")
    table.gather(ids, weights).backward(direction)
    assert weights.grad is not None
    assert torch.equal(weights.grad.isnan().any(dim=1), torch.arange(30) == 2)
    table.discard()
