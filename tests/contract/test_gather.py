"""Weighted sums: equal to the float64 reference under every placement, to the bit under column splits."""

import pytest
import torch

from mempool.kernels import PackedLayout, pack_rows, unpack_rows

from .bags import Bags, make_bags, reference_sums, relative_error
from .driver import Driver, make_schema
from .layouts import EXACT_LAYOUTS, LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_reference(driver: Driver, layout: str, dtype: str) -> None:
    driver.create(make_schema(dtype=dtype), layout)
    values = driver.read()
    for seed, weighted in ((1, True), (2, False)):
        bags = make_bags(seed, weighted=weighted)
        assert relative_error(driver.gather(bags), reference_sums(values, bags)) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_values_do_not_depend_on_placement(driver: Driver, layout: str) -> None:
    driver.create(make_schema(), layout)
    values = driver.read()
    driver.drop()
    driver.create(make_schema(), "one")
    assert torch.equal(driver.read(), values)
    assert 0.3 < float(values.std()) < 0.7  # init_std is 0.5
    assert len(values.unique()) > 0.99 * values.numel()


@pytest.mark.parametrize("layout", EXACT_LAYOUTS)
def test_column_splits_are_equal_to_the_bit(driver: Driver, layout: str) -> None:
    bags = make_bags(3, lengths=(40, 1, 0, 77))
    driver.create(make_schema(), "one")
    whole = driver.gather(bags)
    driver.drop()
    driver.create(make_schema(), layout)
    assert torch.equal(driver.gather(bags), whole)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (50, 0)])
def test_empty_bags_are_zeros(driver: Driver, lengths: tuple[int, ...]) -> None:
    driver.create(make_schema(), "mixed")
    bags = make_bags(4, lengths=lengths)
    sums = driver.gather(bags)
    assert torch.equal(sums[(bags.offsets.diff() == 0)], torch.zeros(lengths.count(0), 10))
    assert relative_error(sums, reference_sums(driver.read(), bags)) < 1e-6


def test_short_ids_and_short_weights(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    bags = make_bags(5)
    assert bags.weights is not None
    short = Bags(bags.ids.to(torch.uint32), bags.weights.to(torch.bfloat16), bags.offsets)
    long = Bags(bags.ids, short.weights.float() if short.weights is not None else None, bags.offsets)
    assert torch.equal(driver.gather(short), driver.gather(long))


def test_short_replies_are_rounded_once(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    bags = make_bags(6)
    whole = driver.gather(bags)
    assert torch.equal(driver.gather(bags, reply_dtype="bfloat16"), whole.to(torch.bfloat16).float())


@pytest.mark.parametrize("layout", EXACT_LAYOUTS)
def test_packed_replies_are_rounded_by_block_wherever_it_is(driver: Driver, layout: str) -> None:
    bags = make_bags(6, lengths=(40, 1, 0, 77))
    driver.create(make_schema(), layout)
    rows = PackedLayout("float8_e4m3fn", width=10, block_dim=4)
    expected = unpack_rows(rows, pack_rows(rows, driver.gather(bags)))
    assert torch.equal(driver.gather(bags, reply_dtype="float8_e4m3fn"), expected)


def test_a_weight_that_is_not_finite_goes_through(driver: Driver) -> None:
    # A diverging model must see its NaN, so that a gradient scaler can skip the step.
    driver.create(make_schema(), "one")
    bags = make_bags(7)
    assert bags.weights is not None
    bags.weights[0] = float("nan")
    sums = driver.gather(bags)
    assert bool(sums[0].isnan().all())
    assert bool(sums[1:].isfinite().all())


def test_stamps_say_who_answered(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    bags = make_bags(8)
    driver.gather(bags)
    for shard in driver.owners:
        reply = driver.call(driver.host(shard).update(driver.update_request(shard, 1, 0, torch.ones(4, 10))))
        assert (reply.stamp.shard, reply.stamp.incarnation) == (shard, driver.hosted[shard].info.incarnation)
        assert (reply.stamp.epoch, reply.stamp.table_version) == (1, 0)


@pytest.mark.parametrize("resend", [False, True])
def test_the_callers_tensors_are_his_own_again(driver: Driver, resend: bool) -> None:
    """What a shard remembers or holds is not changed by what a caller does with his tensors afterwards."""
    grads = torch.randn(4, 10)
    driver.create(make_schema(), "one")
    driver.train(1, {0: (make_bags(9), grads)})
    expected = driver.read()
    driver.drop()
    driver.create(make_schema(), "one")
    given = make_bags(9)
    assert given.weights is not None
    driver.gather(given)
    if not resend:
        given.ids.zero_(), given.weights.zero_(), given.offsets.zero_()
    given_grads = grads.clone()
    driver.update(1, 0, given_grads, bags=given if resend else None)
    for tensor in (given.ids, given.weights, given.offsets, given_grads):
        tensor.zero_()
    driver.prepare(1, [0])
    driver.commit(1, [0])
    assert torch.equal(driver.read(), expected)
