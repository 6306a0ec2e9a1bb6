"""What heads choose is counted when its gradient is pushed, head by head."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mempool
from mempool.client import Pool
from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer, PEERLayer
from mempool.types.usage import Tally, usage_of

SLOTS = 64


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with mempool.local(shards=2) as made:
        yield made


@pytest.mark.parametrize("kind", ["memory", "experts"])
def test_each_head_counts_what_it_chose(pool: Pool, kind: str) -> None:
    torch.manual_seed(1)
    config = mempool.TableConfig(name=kind, num_slots=SLOTS, value_dim=16, layout="rows", usage=True)
    table = pool.create_table(config)
    make = MemoryLayer if kind == "memory" else PEERLayer
    layer = make(8, table=table, heads=3, topk=4, key_dim=4)
    with pytest.raises(InvalidRequest, match="does not count which slots its heads choose"):
        layer.usage()
    layer.count_usage = True
    assert layer.usage().all_heads.uses == 0
    expected = torch.zeros(3, SLOTS, dtype=torch.int64)
    for step in range(3):
        x = torch.randn(5, 2, 8)
        with torch.no_grad():
            layer(x)
        y, lookup = layer(x, return_lookup=True)
        if step == 1:
            layer.half()  # whose parameters are others from here on
            layer.float()
        y.square().sum().backward()
        table.commit()
        for head in range(3):
            expected[head] += torch.bincount(lookup.ids[..., head, :].flatten(), minlength=SLOTS)
    found = layer.usage()
    assert found.heads == tuple(usage_of(Tally.of(each.numpy())) for each in expected)
    assert found.all_heads == usage_of(Tally.of(expected.sum(0).numpy()))
    assert torch.equal(table.usage(range(SLOTS)).uses, expected.sum(0))
    twin = copy.deepcopy(layer)
    assert not twin.count_usage
    layer.count_usage = False
    with pytest.raises(InvalidRequest, match="does not count"):
        layer.usage()


def test_a_forward_pass_that_is_run_again_counts_once(pool: Pool) -> None:
    table = pool.create_table(mempool.TableConfig(name="again", num_slots=SLOTS, value_dim=16))
    layer = MemoryLayer(8, table=table, heads=2, topk=3, key_dim=4)
    layer.count_usage = True
    checkpoint(layer, torch.randn(4, 8), use_reentrant=False).sum().backward()
    layer.start(torch.randn(4, 8)).result().sum().backward()
    assert layer.usage().all_heads.uses == 2 * 4 * 2 * 3
