"""What is the same for all shards of an embedded pool is done once, whatever their number; nobody else writes to it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mempool
from mempool import kernels
from mempool.config import SGD

NUM_SLOTS, VALUE_DIM, BAGS, PAIRS = 96, 32, 6, 5
LR = 0.5


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[Counter[str]]:
    """How often kernels are called."""
    counts: Counter[str] = Counter()

    def counted(name: str, kernel: Any, *given: Any, **how: Any) -> Any:
        counts[name] += 1
        return kernel(*given, **how)

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(kernels, name, partial(counted, name, getattr(kernels, name)))
        yield counts


def _table(pool: mempool.Pool, layout: str) -> mempool.Table:
    block_dim = 16 if layout == "grid" else 4  # two by two, of four shards
    return pool.create_table(
        mempool.TableConfig(
            name=layout, num_slots=NUM_SLOTS, value_dim=VALUE_DIM, block_dim=block_dim, page_slots=16, layout=layout,
            optimizer=SGD(LR),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shards", "layout", "parts"), [(2, "columns", 1), (8, "columns", 1), (4, "rows", 4), (4, "grid", 2)]
)
def test_pairs_are_checked_and_sorted_once_for_all_columns(
    shards: int, layout: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """parts: Of the rows."""
    with mempool.local(shards=shards, device="cpu") as pool:
        table = _table(pool, layout)
        ids = torch.arange(BAGS * PAIRS).reshape(BAGS, PAIRS) * 3  # of all row pages
        weights = torch.rand(BAGS, PAIRS, requires_grad=True)
        with _counted(monkeypatch, "admit_bags", "sort_pairs", "weighted_sum") as counts:
            table.gather(ids, weights).sum().backward()
            table.commit()
        assert counts == {"admit_bags": parts, "sort_pairs": parts, "weighted_sum": shards}


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_what_shards_share_is_not_the_callers(wire_dtype: Any) -> None:
    """Who writes over ids and weights between the calls of a step changes nothing of it."""
    rows: list[Tensor] = []
    for overwrites in (False, True):
        with mempool.local(shards=4, device="cpu") as pool:
            table = _table(pool, "columns")
            table.wire_dtype = wire_dtype
            generator = torch.Generator().manual_seed(3)
            for _ in range(3):
                ids = torch.randint(NUM_SLOTS, (BAGS, PAIRS), generator=generator, dtype=torch.int32)
                weights = torch.rand(BAGS, PAIRS, generator=generator)
                values = table.gather(ids, weights)
                grads = torch.randn(BAGS, VALUE_DIM, generator=generator)
                if overwrites:
                    ids.fill_(7)
                    weights.fill_(1e9)
                values.backward(grads)
                if overwrites:
                    values.detach().fill_(1e9)
                    grads.fill_(1e9)
                table.commit()
            rows.append(table.rows(torch.arange(NUM_SLOTS)))
    assert torch.equal(*rows)
