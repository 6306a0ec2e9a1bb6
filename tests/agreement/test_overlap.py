"""What is started early, on every kind of pool: bitwise what the plain calls give, and steps train alike."""

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mempool.client import Table
from mempool.errors import MempoolError
from mempool.nn import MemoryLayer, PoolOptimizer
from mempool.optim import SGD, Adagrad
from tests.support.waiting import until

from .conftest import Pools
from .reference import all_rows

TABLE: dict[str, Any] = {"num_slots": 16**2, "value_dim": 16, "block_dim": 8, "shards": 2}


def two_tables(pools: Pools, **options: Any) -> tuple[Table, Table]:
    first, second = (pools.table(**TABLE | options) for _ in range(2))
    second.write(range(second.num_slots), all_rows(first))
    return first, second


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(0, 256, (33, 6), generator=generator), torch.randn(33, 6, generator=generator).requires_grad_())
        for _ in range(count)
    ]


@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_micro_batches_started_together_train_as_one_after_another(pools: Pools, layout: str) -> None:
    table, plain = two_tables(pools, layout=layout, page_slots=16, optimizer=Adagrad(lr=0.3))
    for step in range(2):
        ours, expected = batches(4), batches(4)
        pending = [table.gather_async(ids, weights) for ids, weights in ours]
        for each, (_, weights), (plain_ids, plain_weights) in zip(pending, ours, expected, strict=True):
            pooled, plain_pooled = each.result(), plain.gather(plain_ids, plain_weights)
            assert torch.equal(pooled, plain_pooled), step
            pooled.sin().sum().backward()
            plain_pooled.sin().sum().backward()
            assert torch.equal(weights.grad, plain_weights.grad)  # type: ignore[arg-type]
        assert table.commit() == plain.commit() == 4
        assert torch.equal(all_rows(table), all_rows(plain))


def test_prefetched_micro_batches_train_as_others(pools: Pools) -> None:
    table, plain = two_tables(pools, layout="columns", optimizer=SGD(lr=0.3))
    for _ in range(2):
        for ids, _ in batches(3):
            assert table.prefetch(ids)
        for ids, _ in batches(3):
            pooled, expected = table.gather(ids), plain.gather(ids)
            assert torch.equal(pooled, expected)
            pooled.sin().sum().backward()
            expected.sin().sum().backward()
        assert table.link.prefetched.num_bytes == 0
        table.commit()
        plain.commit()
        assert torch.equal(all_rows(table), all_rows(plain))


def test_a_pool_that_is_closed_meanwhile_answers_or_says_so(pools: Pools) -> None:
    with pools.fresh(2) as pool:
        table = pools.table(pool=pool, **TABLE)
        expected = table.gather(*batches(1)[0])
        pending = [table.gather_async(*batches(1)[0]) for _ in range(10)]
        given_up = [table.gather_async(*batches(1)[0]) for _ in range(10)]
        del given_up
        assert table.prefetch(batches(1)[0][0])
        pool.close()
        for each in pending:
            found: Tensor | None = None
            with contextlib.suppress(MempoolError):
                found = each.result()
            if found is not None:
                assert torch.equal(found, expected)
            else:
                with pytest.raises(MempoolError, match="closed"):
                    each.result()


def test_handles_that_nobody_finishes_leave_nothing_behind(pools: Pools) -> None:
    with pools.fresh(2) as pool:
        table = pools.table(pool=pool, **TABLE)
        for _ in range(3):
            for ids, weights in batches(8):
                table.gather_async(ids, weights)
        kept = [table.gather_async(ids, weights) for ids, weights in batches(8)]
        del kept
        gc.collect()
        until(lambda: not table.link._window.num_bytes)
        for _ in range(2):
            table.gather(batches(1)[0][0], remember=False)
        assert not any(shard.context_bytes for shard in pool.status().shards)
        assert not pool.router.remembered.shards()


def test_lookups_with_keys_in_the_pool(pools: Pools) -> None:
    import mempool

    for keys, tail in ((mempool.ProductKeys(heads=2, key_dim=8), (2, 8)), (mempool.FlatKeys(key_dim=8), (8,))):
        table = pools.table(**TABLE, keys=keys)
        queries = torch.randn(9, *tail)
        expected, pending = table.lookup(queries, topk=5), [table.lookup_async(queries, topk=5) for _ in range(3)]
        queries.zero_()
        for each in pending:
            for ours, part in zip(each.result(), expected, strict=True):
                assert torch.equal(ours, part)
            assert each.done()


class Block(nn.Module):
    """An FFN beside a memory, whose output is added before the next block's FFN: a skip-layer read."""

    def __init__(self, table: Table, *, early: bool) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.memory = MemoryLayer(16, table=table, heads=2, topk=4, key_dim=8, mem_gated=True)
        self.first, self.second = (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        finish: Callable[[], Tensor]
        if self.early:
            finish = self.memory.start(x).result
        else:

            def finish() -> Tensor:
                y: Tensor = self.memory(x)
                return y

        h = x + self.first(x)
        h = h + self.second(h)
        return h + finish()


def test_a_layer_that_is_started_early_trains_as_a_plain_one(pools: Pools) -> None:
    tables = two_tables(pools, layout="columns", optimizer=SGD(lr=0.3))
    blocks = [Block(table, early=early) for table, early in zip(tables, (True, False), strict=True)]
    optimizers = [(torch.optim.SGD(block.parameters(), lr=0.1), PoolOptimizer(block)) for block in blocks]
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x = torch.randn(21, 16, generator=generator)
        outputs = [block(x) for block in blocks]
        assert torch.equal(*outputs)
        for y, (dense, memory) in zip(outputs, optimizers, strict=True):
            y.sin().sum().backward()
            dense.step()
            memory.step()
            dense.zero_grad()
            memory.zero_grad()
        for ours, expected in zip(*(block.parameters() for block in blocks), strict=True):
            assert torch.equal(ours, expected)
        assert torch.equal(*(all_rows(table) for table in tables))
