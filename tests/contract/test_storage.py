"""Stored elements: what they hold at first and after steps, the same bits under every placement and in a replay."""

import itertools

import pytest
import torch
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.kernels import PackedLayout, Paged, reference
from mempool.types import ExportPages, OptimizerSpec, TableSchema

from .bags import Bags, make_bags, reference_sums, relative_error
from .driver import Driver, make_schema, same
from .layouts import EXACT_LAYOUTS, LAYOUTS

NARROW = ("bfloat16", "float8_e4m3fn", "int8")
PACKED = NARROW[1:]
ADAM = OptimizerSpec(algorithm="adam", lr=0.05, eps=1e-8)


def _stored(values_NV: Tensor, schema: TableSchema) -> Tensor:
    """Float32 values as they are read once they were stored, rounded to nearest."""
    if schema.dtype == "bfloat16":
        return values_NV.to(torch.bfloat16)
    layout = PackedLayout(schema.dtype, width=schema.value_dim, block_dim=schema.block_dim)  # type: ignore[arg-type]
    rows = torch.zeros(values_NV.shape[0], layout.row_bytes, dtype=torch.uint8)
    paged = Paged(rows, torch.zeros(1, dtype=torch.int32), 10, layout)
    reference.write_values(paged, torch.arange(values_NV.shape[0]), values_NV)
    return reference.read_values(paged).float()


def _train(driver: Driver, schema: TableSchema, layout: str, *, moves: tuple[str, ...] = ()) -> dict[str, Tensor]:
    driver.create(schema, layout)
    rest = iter(moves)
    for step in range(1, 4):
        grads = torch.randn(4, 10, generator=torch.Generator().manual_seed(step))
        driver.train(step, {step: (make_bags(step, lengths=(30, 4, 0, 9)), grads)})
        for target in itertools.islice(rest, 1):
            driver.move(target)
    found = {name: driver.read(name) for name in ("values", "values.exp_avg", "values.exp_avg_sq")}
    if schema.packed:
        found["values.scales"] = driver.read("values.scales")
    driver.drop()
    return found


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_values_are_those_of_float32_rounded_to_nearest(driver: Driver, dtype: str, layout: str) -> None:
    driver.create(make_schema(), "one")
    initial = driver.read()
    driver.drop()
    driver.create(make_schema(dtype=dtype), layout)
    assert same(driver.read(), _stored(initial, driver.schema))


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_gets_new_scales(driver: Driver, dtype: str, layout: str) -> None:
    driver.create(make_schema(dtype=dtype), layout)
    before, ids = driver.read(), torch.tensor([49, 0, 8])
    rows = torch.randn(3, 10) * torch.tensor([[1e-3], [1.0], [0.0]])
    driver.write("values", ids, rows)
    expected = before.clone()
    expected[ids] = _stored(rows, driver.schema)
    assert same(driver.read(), expected)
    largest = torch.stack([rows[:, :4], rows[:, 4:8], rows[:, 8:].repeat(1, 2)], 1).abs().amax(2)
    assert torch.equal(driver.read("values.scales")[ids], largest / (448.0 if dtype == "float8_e4m3fn" else 127.0))


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_those_of_the_values_read(driver: Driver, dtype: str, layout: str) -> None:
    driver.create(make_schema(dtype=dtype), layout)
    bags = make_bags(1)
    assert relative_error(driver.gather(bags), reference_sums(driver.read(), bags)) < 1e-5


@pytest.mark.parametrize("dtype", NARROW)
def test_column_splits_change_no_bit_of_a_sum(driver: Driver, dtype: str) -> None:
    sums = []
    for layout in EXACT_LAYOUTS:
        driver.create(make_schema(dtype=dtype), layout)
        sums.append(driver.gather(make_bags(1)))
        driver.drop()
    assert same(*sums)


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_gives_the_same_bits_on_any_shards_and_again(driver: Driver, dtype: str) -> None:
    schema = make_schema(dtype=dtype, rounding="stochastic", optimizer=ADAM)
    first = _train(driver, schema, "one")
    for layout in LAYOUTS:
        assert same(_train(driver, schema, layout), first)
    assert same(_train(driver, schema, "rows", moves=("mixed", "columns")), first)
    assert not same(_train(driver, make_schema(dtype=dtype, optimizer=ADAM), "one"), first)  # to nearest


@pytest.mark.parametrize("dtype", NARROW)
def test_small_steps_are_lost_to_nearest_and_not_stochastically(driver: Driver, dtype: str) -> None:
    """Blocks of values from 1/4 to 1, the largest of them without a gradient: scales stay what they are."""
    sgd, ids = OptimizerSpec(algorithm="sgd", lr=0.1), torch.arange(420)
    values = torch.tensor([1.0, 0.25, 0.5, 0.75, 1.0, 0.25, 0.5, 0.75, 1.0, 0.5]).repeat(420, 1)
    bags, grads = Bags(ids, None, torch.arange(421)), torch.where(values == 1.0, 0.0, 0.005)
    means = {}
    for rounding in ("nearest", "stochastic"):
        schema = make_schema(num_slots=420, page_slots=64, dtype=dtype, rounding=rounding, optimizer=sgd)
        driver.create(schema, "columns")
        driver.write("values", ids, values)
        before = driver.read().double()
        for step in range(1, 11):
            driver.train(step, {step: (bags, grads)}, want_norm=False)
        means[rounding] = float((driver.read().double() - before)[values < 1.0].mean())
        driver.drop()
    assert means["stochastic"] == pytest.approx(-10 * 0.1 * 0.005, rel=0.1)
    assert abs(means["nearest"]) < 0.003


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layout", ["one", "mixed"])
def test_a_master_trains_as_float32(driver: Driver, dtype: str, layout: str) -> None:
    exact = _train(driver, make_schema(optimizer=ADAM), layout)
    driver.create(make_schema(dtype=dtype, master=True, optimizer=ADAM), layout)
    driver.write("values", torch.tensor([5]), torch.full((1, 10), 1 / 3))
    assert torch.equal(driver.read("values.master")[5], torch.full((10,), 1 / 3))
    assert same(driver.read(), _stored(driver.read("values.master"), driver.schema))
    driver.drop()
    driver.create(make_schema(dtype=dtype, master=True, optimizer=ADAM), layout)
    for step in range(1, 4):
        grads = torch.randn(4, 10, generator=torch.Generator().manual_seed(step))
        driver.train(step, {step: (make_bags(step, lengths=(30, 4, 0, 9)), grads)})
    assert same(driver.read("values.master"), exact["values"])
    assert same(driver.read(), _stored(exact["values"], driver.schema))


@pytest.mark.parametrize("dtype", NARROW)
def test_pages_move_with_scales_master_and_padding(driver: Driver, dtype: str) -> None:
    driver.create(make_schema(dtype=dtype, master=True, optimizer=ADAM), "one")
    driver.train(1, {1: (make_bags(1), torch.randn(4, 10))})
    contents = driver.contents()
    for layout in ("columns", "mixed", "rows", "grid", "one"):
        driver.move(layout)
    assert same(driver.contents(), contents)


@pytest.mark.parametrize("dtype", PACKED)
def test_pages_travel_as_codes_and_scales(driver: Driver, dtype: str) -> None:
    driver.create(make_schema(dtype=dtype), "one")
    request = ExportPages(table_id=driver.table_id, row_pages=torch.tensor([2, 6]).numpy(), blocks=(0, 2))
    arrays = driver.call(driver.host(0).export_pages(request)).arrays
    codes, scales = arrays["values"], arrays["values.scales"]
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.uint8, (16, 6), torch.float32, (16, 2))
    assert not codes[10:].any()  # slots that do not exist
    assert not scales[10:].any()
    values = reference.decode(dtype, codes) * scales.repeat_interleave(torch.tensor([4, 2]), 1)  # type: ignore[arg-type]
    assert torch.equal(values[:8], driver.read()[16:24, [0, 1, 2, 3, 8, 9]])


@pytest.mark.parametrize("array", ["values.scales", "values.last_step"])
def test_what_follows_from_other_arrays_is_not_written(driver: Driver, array: str) -> None:
    dense = OptimizerSpec(algorithm="adamw", lr=0.1, dense=True)
    driver.create(make_schema(dtype="int8", master=True, optimizer=dense), "one")
    before = driver.contents()
    with pytest.raises(InvalidRequest, match=f"'{array}' follows from what else is written"):
        driver.write(array, torch.tensor([1]), torch.ones(1, 3))
    assert same(driver.contents(), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "optimizer": OptimizerSpec(algorithm="adamw", lr=0.1, dense=True)},
        {"optimizer": OptimizerSpec(algorithm="adam", lr=0.1, dense=True)},
    ],
)
def test_a_dense_optimizer_that_is_not_there_is_refused(driver: Driver, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=r"dense( = True)? (is of adamw|means nothing to|needs float32)"):
        driver.create(make_schema(**changes), "one")


def test_a_write_to_a_dense_table_is_of_the_present_version(driver: Driver) -> None:
    """As of torch's own AdamW: values set between two steps decay from then on, and keep the momentum they had."""
    dense = OptimizerSpec(algorithm="adamw", lr=0.1, eps=1e-8, weight_decay=0.1, dense=True)
    driver.create(make_schema(optimizer=dense), "mixed")
    values = torch.nn.Parameter(driver.read().clone())
    adamw = torch.optim.AdamW([values], lr=0.1, eps=1e-8, weight_decay=0.1)
    ids = torch.tensor([3, 48])
    for step in range(1, 7):
        bags, grads = make_bags(step), torch.randn(4, 10)
        driver.train(step, {step: (bags, grads)} if step != 4 else {})
        values.grad = torch.zeros(50, 10)
        for bag in range(4 if step != 4 else 0):
            pairs = slice(int(bags.offsets[bag]), int(bags.offsets[bag + 1]))
            assert bags.weights is not None
            values.grad.index_add_(0, bags.ids[pairs], bags.weights[pairs, None] * grads[bag])
        adamw.step()
        if step == 3:
            driver.write("values", ids, torch.ones(2, 10))
            values.data[ids] = 1.0
    assert relative_error(driver.read(), values) < 1e-5
    assert torch.equal(driver.read("values.last_step"), torch.full((50, 3), 6, dtype=torch.int32))
    assert relative_error(driver.read("values.exp_avg"), adamw.state[values]["exp_avg"]) < 1e-5
