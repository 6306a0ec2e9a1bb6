"""Weighted sums, rows, weight gradients: against the float64 reference, and what must hold to the bit."""

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import WIDTHS, assert_close, cases, kernel_settings, make_paged, same_bits

from mempool import kernels
from mempool.kernels import Paged, reference


@kernel_settings
@given(case=cases())
def test_weighted_sum_equals_reference(under_test, case):
    actual = under_test.kernels.weighted_sum(
        *map(under_test.to, (case.paged, case.ids, case.weights, case.offsets)),
    )
    assert actual.dtype == torch.float32
    assert_close(actual, reference.weighted_sum(case.paged, case.ids, case.weights, case.offsets))


@kernel_settings
@given(case=cases())
def test_weight_gradient_equals_reference(under_test, case):
    actual = under_test.kernels.weight_gradient(
        *map(under_test.to, (case.paged, case.ids, case.offsets, case.grads)),
    )
    assert actual.dtype == torch.float32
    assert_close(actual, reference.weight_gradient(case.paged, case.ids, case.offsets, case.grads))


@kernel_settings
@given(case=cases())
def test_gather_rows_equals_reference_to_the_bit(under_test, case):
    actual = under_test.kernels.gather_rows(under_test.to(case.paged), under_test.to(case.ids))
    assert same_bits(actual, reference.gather_rows(case.paged, case.ids))


@kernel_settings
@given(case=cases(), data=st.data())
def test_scatter_rows_equals_reference_to_the_bit(under_test, case, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    values = torch.randn(case.ids.numel(), case.paged.rows.shape[1], generator=generator).to(case.paged.rows.dtype)
    paged = under_test.to(case.paged)
    under_test.kernels.scatter_rows(paged, under_test.to(case.ids), under_test.to(values))
    expected = Paged(case.paged.rows.clone(), case.paged.page_table, case.paged.page_shift)
    reference.scatter_rows(expected, case.ids, values)
    assert same_bits(paged.rows, expected.rows)


@pytest.mark.parametrize("dtype", kernels.STORAGE_DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 7, 31, 127, 130])
def test_sum_of_a_column_slice_is_the_slice_of_the_sum(under_test, width, dtype):
    generator = torch.Generator().manual_seed(width)
    paged = make_paged(generator, num_pages=4, page_shift=3, width=width, dtype=dtype, missing=0.2)
    num_pairs = 18 if under_test.interpreted else 90
    ids = torch.randint(0, 32, (num_pairs,), generator=generator)
    weights, offsets = torch.randn(num_pairs, generator=generator), torch.tensor([0, 7, 7, num_pairs])
    arguments = [under_test.to(tensor) for tensor in (ids, weights, offsets)]
    whole = under_test.kernels.weighted_sum(under_test.to(paged), *arguments)
    cuts = sorted({0, 1, width // 3, width // 2, width - 1, width})
    for first, end in itertools.pairwise(cuts):
        part = Paged(paged.rows[:, first:end].contiguous(), paged.page_table, paged.page_shift)
        assert same_bits(under_test.kernels.weighted_sum(under_test.to(part), *arguments), whole[:, first:end])


def test_weighted_sum_adds_in_the_order_of_the_pairs(under_test):
    """In float32, 1e8 + 1 - 1e8 is 0 in this order and 1 in the other: every column must show the same one."""
    values = torch.tensor([1e8, 1.0, -1e8])[:, None].expand(3, 67).contiguous()
    paged = under_test.to(Paged(values, torch.arange(3, dtype=torch.int32), 0))
    offsets = under_test.to(torch.tensor([0, 3, 6]))
    ids = under_test.to(torch.tensor([0, 1, 2, 0, 2, 1]))
    sums = under_test.kernels.weighted_sum(paged, ids, None, offsets)
    assert torch.equal(sums.cpu(), torch.tensor([[0.0], [1.0]]).expand(2, 67))


def test_ids_outside_the_page_table_are_not_here(under_test):
    paged = under_test.to(Paged(torch.ones(4, 5), torch.tensor([0, 1], dtype=torch.int32), 1))
    before = paged.rows.clone()
    ids = under_test.to(torch.tensor([-1, 4, 2**40, -(2**40), 3]))
    offsets = under_test.to(torch.tensor([0, 5]))
    assert torch.equal(under_test.kernels.weighted_sum(paged, ids, None, offsets).cpu(), torch.ones(1, 5))
    under_test.kernels.scatter_rows(paged, ids[:4], under_test.to(torch.full((4, 5), 7.0)))
    assert torch.equal(paged.rows, before)
    pairs = under_test.kernels.sort_pairs(paged, ids)
    assert pairs.order.tolist() == [4]
    assert pairs.rows.tolist() == [3]


@pytest.mark.parametrize("dtype", kernels.STORAGE_DTYPES)
def test_runs_and_numbers_of_threads_give_the_same_bits(under_test, dtype):
    generator = torch.Generator().manual_seed(3)
    paged = make_paged(generator, num_pages=8, page_shift=6, width=100, dtype=dtype)
    num_pairs = 90 if under_test.interpreted else 6000
    ids = torch.randint(0, 512, (num_pairs,), generator=generator)
    offsets = torch.tensor([0, num_pairs // 3, num_pairs - 11, num_pairs])
    weights, grads = torch.randn(num_pairs, generator=generator), torch.randn(3, 100, generator=generator)
    paged, ids, offsets, weights, grads = map(under_test.to, (paged, ids, offsets, weights, grads))

    def run():
        return (
            under_test.kernels.weighted_sum(paged, ids, weights, offsets),
            under_test.kernels.weight_gradient(paged, ids, offsets, grads),
        )

    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        together, again = run(), run()
    finally:
        torch.set_num_threads(threads_before)
    for other in (together, again):
        assert all(same_bits(one, two) for one, two in zip(alone, other, strict=True))


def test_two_python_threads_at_once(under_test):
    if under_test.interpreted:
        pytest.skip("Triton's interpreter patches its language module while it runs; it is for one thread")
    generator = torch.Generator().manual_seed(4)
    paged = make_paged(generator, num_pages=8, page_shift=5, width=65, dtype=torch.float32)
    ids, offsets = torch.randint(0, 256, (9000,), generator=generator), torch.tensor([0, 4000, 9000])
    weights = torch.randn(9000, generator=generator)
    arguments = [under_test.to(value) for value in (paged, ids, weights, offsets)]
    expected = under_test.kernels.weighted_sum(*arguments)
    results: dict[int, list[bool]] = {0: [], 1: []}

    def work(number):
        for _ in range(20):
            results[number].append(same_bits(under_test.kernels.weighted_sum(*arguments), expected))

    threads = [threading.Thread(target=work, args=(number,)) for number in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == {0: [True] * 20, 1: [True] * 20}
