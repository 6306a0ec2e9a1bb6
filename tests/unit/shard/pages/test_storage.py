"""What is asked of a table by slot id: the same bits whatever arenas its pages lie in."""

import numpy as np
import pytest
import torch

from mempool.shard.pages.named_arrays import LAST_STEP, SCALES
from mempool.shard.pages.storage import Storage
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec, TableSchema
from mempool.types.bags import Bags
from tests.contract.bags import make_bags
from tests.contract.driver import make_schema
from tests.contract.layouts import LAYOUTS

from .whole_tables import CPU, contents, make_table, placement_of, same_bits

SCHEMAS = {
    "float32": make_schema(optimizer=OptimizerSpec(algorithm="adam", lr=0.1), keys=FlatKeySpec(key_dim=5)),
    "bfloat16": make_schema(
        dtype="bfloat16", master=True, optimizer=OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1)
    ),
    "float8": make_schema(dtype="float8_e4m3fn", optimizer=OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1)),
    "dense": make_schema(optimizer=OptimizerSpec(algorithm="adamw", lr=0.1, dense=True)),
}
IDS = torch.tensor([49, 0, 7, 8, 7, 31, 32, 48, 16])


def _shares(schema: TableSchema, layout: str) -> list[Storage]:
    return [make_table(schema, layout, shard=shard) for shard in range(3)]


def _owned(schema: TableSchema, table: Storage, name: str, ids: torch.Tensor) -> torch.Tensor:
    """[M, W of the whole row] bool: what this shard has."""
    array = table.arrays[name]
    every = tuple(range(schema.num_blocks))
    owned = torch.zeros(len(ids), array.width(every), dtype=torch.bool)
    for row, slot in enumerate(ids.tolist()):
        blocks = tuple(np.flatnonzero(table.owned[slot // schema.page_slots]).tolist())
        owned[row, torch.from_numpy(array.places(blocks, every))] = True
    return owned


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_reading_is_the_same_bits_wherever_pages_lie(schema: TableSchema, layout: str) -> None:
    whole = make_table(schema)
    generator = torch.Generator().manual_seed(1)
    for name in whole.arrays:
        if name not in (SCALES, LAST_STEP):
            rows = torch.randn(50, whole.row_width(name), generator=generator)
            rows[::3] = -0.0
            whole.write(name, torch.arange(50), rows)
    for table in _shares(schema, layout):
        if not table.blocks:
            continue
        for name, array in table.arrays.items():
            columns = torch.from_numpy(array.places(table.row_blocks(name), tuple(range(3))))
            expected = whole.read(name, torch.arange(50))
            if name not in (SCALES, LAST_STEP):
                table.write(name, torch.arange(50), expected[:, columns])
        for name, array in table.arrays.items():
            columns = torch.from_numpy(array.places(table.row_blocks(name), tuple(range(3))))
            expected = torch.where(_owned(schema, table, name, IDS), whole.read(name, IDS), 0)[:, columns]
            assert same_bits({name: table.read(name, IDS)}, {name: expected})
            assert table.read(name, IDS[:0]).shape == (0, len(columns))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_sums_and_gradients_of_shares_are_those_of_the_whole(layout: str) -> None:
    schema = SCHEMAS["float32"]
    raw = make_bags(3)
    bags = Bags(raw.ids, raw.weights, raw.offsets)
    grads = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    whole = make_table(schema)
    values = whole.read("values", bags.ids).double()
    bag_of = torch.repeat_interleave(torch.arange(4), bags.offsets.diff())
    expected = (values * grads.double()[bag_of]).sum(1)
    sums, found = torch.zeros(4, 10), torch.zeros(len(bags.ids))
    for table in _shares(schema, layout):
        columns = torch.cat(
            [torch.arange(10)[slice(*schema.block_columns(block))] for block in table.blocks] or [IDS[:0]]
        )
        sums[:, columns] += table.pooled(bags)
        found += table.weight_grad(bags, grads[:, columns].contiguous())
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    pooled = torch.zeros(4, 10, dtype=torch.float64).index_add_(0, bag_of, values * raw.weights.double()[:, None])  # type: ignore[union-attr]
    assert torch.allclose(sums.double(), pooled, rtol=1e-5, atol=1e-6)
    if layout == "one":
        assert torch.equal(make_table(schema).weight_grad(bags, grads), found)


def test_a_share_without_blocks_gives_no_gradient() -> None:
    bags = Bags(IDS, None, torch.tensor([0, len(IDS)]))
    empty = make_table(SCHEMAS["float32"], "one", shard=2)
    assert torch.equal(empty.weight_grad(bags, torch.empty(1, 0)), torch.zeros(len(IDS)))


def test_pages_are_counted_once_not_at_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = make_schema(num_slots=49, keys=ProductKeySpec(heads=3, key_dim=6))
    table = make_table(schema, "mixed", key_owners=[0, 1, 0])
    mine = int((np.array(LAYOUTS["mixed"]) == 0).sum())
    assert (table.num_pages, table.num_lost) == (mine + 2, 0)
    with monkeypatch.context() as patch:
        patch.setattr(table, "lost", None)
        patch.setattr(table, "owned", None)
        assert (table.num_pages, table.num_lost) == (mine + 2, 0)
    table.lose_all()
    assert (table.num_pages, table.num_lost) == (0, mine + 2)
    table.own(placement_of("columns", key_owners=[1, 1, 1]))
    assert table.num_lost == int((np.array(LAYOUTS["mixed"])[:, 0] == 0).sum())


@pytest.mark.parametrize("layout", ["one", "columns", "mixed"])
def test_bytes_are_promised_to_the_byte(layout: str) -> None:
    schema = make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=3, key_dim=6))
    placement = placement_of(layout, key_owners=[0, 1, 0])
    promised = Storage(schema, shard=0, device=CPU).initial_bytes(placement)
    assert make_table(schema, layout, key_owners=[0, 1, 0]).num_bytes == promised


def test_arenas_of_nothing_are_dropped() -> None:
    table = make_table(SCHEMAS["float32"])
    table.arena((0, 2))
    before = contents(table)
    table.drop_idle_arenas()
    assert list(table.arenas) == [(0, 1, 2)]
    assert same_bits(contents(table), before)


@pytest.mark.timeout(60)  # one by one, as it was, it took minutes
def test_keys_of_many_heads_are_read_and_written_as_one_by_one() -> None:
    num_heads = 4096
    schema = make_schema(num_slots=1, value_dim=4, block_dim=4, keys=ProductKeySpec(heads=num_heads, key_dim=2))
    table = make_table(schema, [[0]], key_owners=[head % 2 for head in range(num_heads)])  # half of them are here
    generator = torch.Generator().manual_seed(7)
    heads = torch.randint(num_heads, (2**20,), generator=generator)
    rows = torch.randn(len(heads), 2, generator=generator)
    table.write("keys", heads, rows)
    last = dict(zip(heads.tolist(), range(len(heads)), strict=True))
    every = torch.stack([rows[last[head]] if head % 2 == 0 else torch.zeros(2) for head in range(num_heads)])
    assert torch.equal(torch.cat([table.read("keys", torch.tensor([head])) for head in range(num_heads)]), every)
    assert torch.equal(table.read("keys", heads), every[heads])
    table.write("keys", heads[:0], rows[:0])
    assert torch.equal(table.read("keys", heads), every[heads])
