"""Reading and writing rows of every named array, under every placement."""

import pytest
import torch

from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec, ReadRowsRequest

from .driver import Driver, make_schema, same
from .layouts import LAYOUTS

ADAM = OptimizerSpec(algorithm="adam", lr=0.1)
ROWWISE = OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1)
ADAGRAD = OptimizerSpec(algorithm="adagrad", lr=0.1, initial_accumulator_value=0.5)
IDS = torch.tensor([49, 0, 7, 8, 31])

ARRAYS = [
    ("values", make_schema(dtype="bfloat16")),
    ("values", make_schema()),
    ("values.sum", make_schema()),
    ("values.row_sum", make_schema(optimizer=ROWWISE)),
    ("values.exp_avg", make_schema(optimizer=ADAM)),
    ("values.exp_avg_sq", make_schema(optimizer=ADAM)),
    ("keys", make_schema(keys=FlatKeySpec(key_dim=6))),
]


# Each array where shards have pages of different blocks, and each layout with columns, blocks and whole rows.
@pytest.mark.parametrize(
    ("array", "schema", "layout"),
    [
        (array, schema, layout)
        for array, schema in ARRAYS
        for layout in LAYOUTS
        if layout == "mixed" or array in ("values.sum", "values.row_sum", "keys")
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_written_is_read(driver: Driver, array: str, schema, layout: str) -> None:  # type: ignore[no-untyped-def]
    driver.create(schema, layout)
    before = driver.read(array)
    rows = torch.randn(5, driver.row_width(array))
    for _ in range(2):
        driver.write(array, IDS, rows)
    expected = before.clone()
    expected[IDS] = rows.to(before.dtype)
    assert same(driver.read(array), expected)
    assert same(driver.read(array, IDS.to(torch.uint32)), rows.to(before.dtype))


@pytest.mark.parametrize("layout", ["one", "mixed"])
def test_state_starts_as_the_optimizer_says(driver: Driver, layout: str) -> None:
    driver.create(make_schema(optimizer=ADAGRAD), layout)
    values = driver.read("values")
    assert torch.equal(driver.read("values.sum"), torch.full_like(values, 0.5))
    driver.drop()
    driver.create(make_schema(optimizer=ADAM), layout)
    assert torch.equal(driver.read("values.exp_avg"), torch.zeros(50, 10))
    assert torch.equal(driver.read("values.exp_avg_sq"), torch.zeros(50, 10))


def test_of_a_repeated_id_the_last_row_stays(driver: Driver) -> None:
    driver.create(make_schema(), "grid")
    rows = torch.randn(4, 10)
    driver.write("values", torch.tensor([3, 40, 3, 3]), rows)
    assert torch.equal(driver.read("values", torch.tensor([3, 40])), rows[[3, 1]])


def test_rows_that_are_not_here_are_zeros(driver: Driver) -> None:
    driver.create(make_schema(), "rows")
    request = ReadRowsRequest(envelope=driver.envelope(1), array="values", ids=torch.tensor([0, 49, 31]))
    rows = driver.call(driver.host(1).read_rows(request)).rows
    assert torch.equal(rows[[0, 2]], torch.zeros(2, 10))
    assert torch.equal(rows[1], driver.read()[49])


def test_the_sign_of_zero_and_nan_are_kept(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    rows = torch.tensor([[-0.0, float("nan"), float("inf")] + [1.0] * 7])
    driver.write("values", torch.tensor([9]), rows)
    request = ReadRowsRequest(envelope=driver.envelope(0), array="values", ids=torch.tensor([9]))
    assert same(driver.call(driver.host(0).read_rows(request)).rows, rows)


@pytest.mark.parametrize("key_owners", [[0, 0], [0, 1]])
def test_product_keys_by_head(driver: Driver, key_owners: list[int]) -> None:
    schema = make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=2, key_dim=6))
    driver.create(schema, "columns", key_owners)
    heads = torch.tensor([1, 0])
    initial = driver.read("keys", heads)
    assert initial.shape == (2, 2 * 7 * 3)
    assert 0.25 < float(initial.std()) < 0.6  # 1 / sqrt(6) is 0.41
    assert len(initial.unique()) == initial.numel()
    keys = torch.randn(1, 42)
    driver.write("keys", torch.tensor([1]), keys)
    assert torch.equal(driver.read("keys", heads), torch.cat([keys, initial[1:]]))


def test_initial_keys_do_not_depend_on_placement(driver: Driver) -> None:
    read = []
    for layout in ("one", "mixed"):
        driver.create(make_schema(keys=FlatKeySpec(key_dim=6)), layout)
        read.append(driver.read("keys"))
        driver.drop()
    assert torch.equal(*read)
    assert 0.3 < float(read[0].std()) < 0.52  # 1 / sqrt(6) is 0.41
