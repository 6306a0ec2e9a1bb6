"""Placement changes no answer: bitwise by columns, to rounding by rows and grid; after training as before it.

What is stored after training is equal to the bit under any placement, stochastic rounding included.
"""

import pytest
import torch
from torch import Tensor

from mempool.client import Table
from mempool.config import Optimizer
from mempool.optim import SGD, Adagrad, Adam, AdamW, RowWiseAdagrad, RowWiseAdam

from .conftest import Pools
from .reference import all_rows, relative_error

NUM_SLOTS, VALUE_DIM, BLOCK_DIM = 500, 60, 16  # 4 column blocks, the last one narrower
STEPS = 3


def train(table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """The same few steps for every table: all pooled values [STEPS, B, V], all d_weights [STEPS, B, L], the rows."""
    generator = torch.Generator().manual_seed(23)
    pooled, weight_grads = [], []
    for _ in range(STEPS):
        ids = torch.randint(NUM_SLOTS, (40, 24), generator=generator)
        weights = torch.randn(40, 24, generator=generator).requires_grad_(True)
        direction = torch.randn(40, VALUE_DIM, generator=generator)
        values = table.gather(ids, weights)
        values.backward(direction)
        table.commit()
        pooled.append(values.detach())
        assert weights.grad is not None
        weight_grads.append(weights.grad)
    return torch.stack(pooled), torch.stack(weight_grads), all_rows(table)


# Every rule, and every kind of element under rules of elements and of whole blocks.
CASES = (
    *((optimizer(0.1), "float32") for optimizer in (SGD, Adagrad, RowWiseAdagrad, Adam, AdamW, RowWiseAdam)),
    *((optimizer(0.1), dtype) for dtype in ("bfloat16", "int8") for optimizer in (AdamW, RowWiseAdagrad)),
)


@pytest.mark.parametrize(("optimizer", "dtype"), CASES, ids=lambda value: getattr(value, "type", value))
def test_columns_are_bitwise_equal_for_one_two_and_four_shards(pools: Pools, optimizer: Optimizer, dtype: str) -> None:
    config = {"num_slots": NUM_SLOTS, "value_dim": VALUE_DIM, "block_dim": BLOCK_DIM, "dtype": dtype}
    if dtype != "float32":
        config["rounding"] = "nearest"  # the other depends on the table's name, and these are other tables
    one, one_weight_grads, one_rows = train(pools.table(shards=1, optimizer=optimizer, **config))
    for shards in (2, 4):
        table = pools.table(shards=shards, layout="columns", optimizer=optimizer, **config)
        pooled, weight_grads, rows = train(table)
        assert torch.equal(pooled, one)
        assert torch.equal(rows, one_rows)
        # Their sums over shards are in another order.
        assert relative_error(weight_grads, one_weight_grads) < 1e-6


def test_several_lookups_a_step_are_equal_to_the_bit_on_any_shards(pools: Pools) -> None:
    """Shards share what does not depend on their columns: of one look-up, of all of a step, of one that comes twice."""
    first: Tensor | None = None
    for shards, layout in ((1, "auto"), (3, "columns"), (4, "columns"), (4, "grid"), (2, "rows")):
        table = pools.table(
            shards=shards, layout=layout, optimizer=Adagrad(lr=0.1), num_slots=NUM_SLOTS, value_dim=VALUE_DIM,
            block_dim=BLOCK_DIM, page_slots=16,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        for step in range(STEPS):
            pooled = []
            for weighted in (True, False):
                ids = torch.randint(NUM_SLOTS, (20, 12), generator=generator)
                values = table.gather(ids, torch.randn(20, 12, generator=generator) if weighted else None)
                pooled.append(values)
                ids.fill_(step)  # the caller's own
            direction = torch.randn(20, VALUE_DIM, generator=generator)
            pooled[0].backward(direction, retain_graph=True)
            pooled[1].backward(-direction)
            if step:
                pooled[0].backward(direction / 2)
            table.commit()
        rows = all_rows(table)
        first = rows if first is None else first
        assert torch.equal(rows, first), (shards, layout)


@pytest.mark.parametrize("layout", ["rows", "grid"])
@pytest.mark.parametrize("shards", [2, 3, 4])
def test_rows_and_grid_are_equal_to_rounding(pools: Pools, layout: str, shards: int) -> None:
    config = {"num_slots": NUM_SLOTS, "value_dim": VALUE_DIM, "block_dim": BLOCK_DIM, "page_slots": 16}
    one, one_weight_grads, one_rows = train(pools.table(shards=1, optimizer=Adagrad(lr=0.1), **config))
    table = pools.table(shards=shards, layout=layout, optimizer=Adagrad(lr=0.1), **config)
    pooled, weight_grads, rows = train(table)
    assert relative_error(pooled, one) < 1e-6
    assert relative_error(weight_grads, one_weight_grads) < 1e-6
    assert torch.equal(rows, one_rows), "a slot's updates are summed in one order, wherever it is"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_stochastic_rounding_is_the_same_to_the_bit_on_any_shards_and_in_a_replay(pools: Pools, dtype: str) -> None:
    config = {"num_slots": NUM_SLOTS, "value_dim": VALUE_DIM, "block_dim": BLOCK_DIM, "page_slots": 16, "dtype": dtype}
    first: Tensor | None = None
    for shards, layout in [(1, "auto"), (1, "auto"), (3, "columns"), (3, "rows")]:
        table = pools.table(shards=shards, layout=layout, optimizer=Adagrad(lr=0.1), name="again", **config)
        rows = train(table)[2]
        pools.drop_tables()
        first = rows if first is None else first
        assert torch.equal(rows, first)
    for other in ({"name": "other"}, {"name": "again", "rounding": "nearest"}):
        rows = train(pools.table(shards=1, optimizer=Adagrad(lr=0.1), **config, **other))[2]
        assert not torch.equal(rows, first)
