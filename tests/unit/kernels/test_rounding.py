"""Rounding of a step's results: to nearest as torch rounds, stochastic without bias, the same wherever a slot lies."""

import pytest
import torch
from kernel_cases import make_arena, same_bits

from mempool.kernels import ELEMENTS, OptimizerStep, Paged, RandomRounding, SortedPairs, reference

NARROW = [element for element in ELEMENTS if element != "float32"]

SLOTS, WIDTH, BLOCK_DIM = 32, 40, 16


def table(values: torch.Tensor, element: str, pages: list[int] | None = None) -> Paged:
    """Slots with these values, on pages of eight in the given order of the arena."""
    num_pages = values.shape[0] // 8
    rows, packed = make_arena(values.shape[0], width=values.shape[1], element=element, block_dim=BLOCK_DIM)
    paged = Paged(rows, torch.tensor(pages or list(range(num_pages)), dtype=torch.int32), 3, packed)
    reference.scatter_rows(paged, torch.arange(values.shape[0]), values.to(paged.value_dtype))
    return paged


def sgd(key: int, columns: torch.Tensor | None, **settings) -> OptimizerStep:
    rounding = None if columns is None else RandomRounding(key, columns)
    return OptimizerStep("sgd", block_dim=BLOCK_DIM, rounding=rounding, **{"lr": 1.0, **settings})


def commit(under_test, paged: Paged, ids: torch.Tensor, grads: torch.Tensor, step: OptimizerStep) -> None:
    """One step in which every id has a bag of its own."""
    pairs = under_test.kernels.sort_pairs(paged, under_test.to(ids))
    bags = under_test.to(torch.arange(len(ids)))
    under_test.kernels.fused_step(paged, {}, pairs, None, bags, under_test.to(grads), step)


def values_of(paged: Paged) -> torch.Tensor:
    on_cpu = Paged(paged.rows.cpu(), paged.page_table.cpu(), paged.page_shift, paged.packed)
    return reference.gather_rows(on_cpu, torch.arange(SLOTS), torch.float32)


def test_bfloat16_is_rounded_to_nearest_even(under_test):
    """Ties, carries into the exponent, and NaN: as torch's own conversion rounds them."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3FFFFFFF, 0x7F7FFFFF, 0x00000001, 0x7FC00001, 0x3F808001]
    )
    wanted = torch.cat([bits.to(torch.int32), (bits.to(torch.int32) | -(2**31))]).view(torch.float32)[None]
    paged = under_test.to(Paged(torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32), 0))
    step = OptimizerStep("sgd", lr=-1.0)
    zero = torch.tensor([0])
    pairs = SortedPairs(*map(under_test.to, (zero, zero, zero, torch.tensor([0, 1]))))
    under_test.kernels.optimizer_step(paged, {}, pairs, under_test.to(wanted), step)
    expected = wanted.to(torch.bfloat16)
    assert torch.equal(paged.rows.isnan().cpu(), expected.isnan())
    assert same_bits(paged.rows.cpu()[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("element", NARROW)
@pytest.mark.parametrize("poison", ["inf", "-inf", "nan"])
def test_what_is_not_finite_stays_in_its_block(under_test, element, poison):
    """A packed block with an inf or NaN reads as NaN, others and other rows as they would; also zeros alone."""
    paged = under_test.to(table(torch.zeros(SLOTS, WIDTH), element))
    grads = torch.ones(3, WIDTH)
    grads[1, 17] = float(poison)
    grads[2] = 0.0
    columns = under_test.to(torch.tensor([0, 16, 32]))
    commit(under_test, paged, torch.tensor([4, 5, 6]), grads, sgd(1, columns, lr=-1.0))
    values = values_of(paged)
    expected = torch.zeros(SLOTS, WIDTH)
    expected[4:6] = 1.0
    expected[5, 17] = float(poison)
    if paged.packed is not None:
        expected[5, 16:32] = torch.nan
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("element", NARROW)
def test_small_steps_arrive_in_the_mean(under_test, element):
    """Steps far below the distance of stored numbers: without bias when rounded stochastically.

    Rounding an element adds a variance of at most a quarter of the squared distance of its neighbours; the mean over
    all elements and steps must lie within five standard deviations. Rounded to nearest, bfloat16 does not move at all.
    """
    num_steps = 5 if under_test.interpreted else 200
    generator = torch.Generator().manual_seed(4)
    start = 0.5 + 0.5 * torch.rand(SLOTS, WIDTH, generator=generator)
    distance = {"bfloat16": 2.0**-8, "float8_e4m3fn": 2.0**-4, "int8": 1.01 / 127}[element]
    size = 2.0**-10
    columns = under_test.to(torch.tensor([0, 16, 32]))
    ids, grads = torch.arange(SLOTS), torch.full((SLOTS, WIDTH), size)
    paged, nearest = (under_test.to(table(start, element)) for _ in range(2))
    before = values_of(paged).double()
    for number in range(num_steps):
        key = RandomRounding.key_of(seed=3, table=0, step=number)
        commit(under_test, paged, ids, grads, sgd(key, columns))
        commit(under_test, nearest, ids, grads, sgd(0, None))
    moved = float((before - values_of(paged)).mean())
    bound = 5 * distance / 2 * (num_steps / (SLOTS * WIDTH)) ** 0.5
    assert abs(moved - num_steps * size) < bound
    if not under_test.interpreted:
        assert bound < num_steps * size / 2
    if element == "bfloat16":
        assert torch.equal(values_of(nearest).double(), before)


@pytest.mark.parametrize("element", NARROW)
def test_bits_follow_the_slot_and_the_column_not_their_place(under_test, element):
    """The same slots on other pages of the arena; another key rounds some elements otherwise."""
    generator = torch.Generator().manual_seed(5)
    start, ids = torch.randn(SLOTS, WIDTH, generator=generator), torch.randperm(SLOTS, generator=generator)[:20]
    grads = torch.randn(20, WIDTH, generator=generator)
    columns = under_test.to(torch.tensor([64, 0, 128]))
    stored = []
    for pages, key in (([0, 1, 2, 3], 11), ([2, 0, 3, 1], 11), ([0, 1, 2, 3], 12)):
        paged = under_test.to(table(start, element, pages))
        for number in range(3):
            commit(under_test, paged, ids, grads, sgd(key + (number << 40), columns))
        stored.append(values_of(paged))
    assert same_bits(stored[0], stored[1])
    assert not same_bits(stored[0], stored[2])
    untouched = torch.ones(SLOTS, dtype=torch.bool)
    untouched[ids] = False
    assert same_bits(stored[0][untouched], stored[2][untouched])


@pytest.mark.parametrize("element", NARROW)
def test_a_master_takes_every_small_step_and_is_rounded_to_nearest(under_test, element):
    """Any stochastic rounding is left aside: the master has the exact sum, the stored values are its nearest."""
    generator = torch.Generator().manual_seed(6)
    start = torch.rand(SLOTS, WIDTH, generator=generator) + 0.5
    master, paged = under_test.to(start), under_test.to(table(start, element))
    ids, columns = torch.arange(SLOTS), under_test.to(torch.tensor([0, 16, 32]))
    grads = under_test.to(torch.full((SLOTS, WIDTH), 2.0**-14))
    expected = start.clone()
    for number in range(20):
        pairs = under_test.kernels.sort_pairs(paged, under_test.to(ids))
        under_test.kernels.optimizer_step(paged, {"master": master}, pairs, grads, sgd(number, columns))
        expected = expected - 2.0**-14
    assert same_bits(master, expected)
    stored = table(start, element)
    reference.write_values(stored, ids, expected)
    assert same_bits(paged.rows, stored.rows)
