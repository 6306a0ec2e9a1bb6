"""Sorting, segment sums and norms: against the float64 reference, to the bit where an order is promised."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, Case, assert_close, cases, kernel_settings, make_paged, same_bits

from mempool import kernels
from mempool.kernels import RUN_PIECE, OptimizerStep, Paged, SortedPairs, reference, torch_ops


@kernel_settings
@given(case=cases())
def test_sort_pairs_equals_reference(under_test, case):
    actual = under_test.kernels.sort_pairs(under_test.to(case.paged), under_test.to(case.ids))
    expected = reference.sort_pairs(case.paged, case.ids)
    for name in ("order", "rows", "slots", "starts"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name))


@pytest.mark.parametrize("page_shift", [6, 38, 39, 40])
def test_sort_pairs_is_stable_over_wide_ids(under_test, page_shift):
    """Ids that differ in high bits, so that every digit of a radix sort counts, up to more than a key has room for."""
    num_pages = (1 << 12) + 1
    paged = Paged(torch.zeros(1 << 8, 1), torch.full((num_pages,), -1, dtype=torch.int32), page_shift)
    here = torch.tensor([0, 1, 700, num_pages - 1])
    paged.page_table[here] = torch.arange(4, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    ids = here[torch.randint(0, 4, (3000,), generator=generator)] << page_shift
    ids += torch.randint(0, 64, (3000,), generator=generator)
    ids[::7] = -1
    ids[1::7] = num_pages << page_shift
    actual = under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
    expected = reference.sort_pairs(paged, ids)
    for name in ("order", "rows", "slots", "starts"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name))


def test_sort_pairs_does_not_depend_on_threads(under_test):
    """Enough pairs to be sorted in parts, one for each thread."""
    generator = torch.Generator().manual_seed(1)
    paged = make_paged(generator, num_pages=40, page_shift=4, width=1, missing=0.2)
    ids = torch.randint(0, 640, (400 if under_test.interpreted else 300_000,), generator=generator)
    expected = torch_ops.sort_pairs(paged, ids)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        actual = under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
        for name in ("order", "rows", "slots", "starts"):
            assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name))


@kernel_settings
@given(case=cases(elements=("float32",)))
def test_a_norm_beside_the_sums_is_that_of_the_sums(under_test, case):
    run = under_test.kernels
    pairs = run.sort_pairs(under_test.to(case.paged), under_test.to(case.ids))
    given_ = tuple(map(under_test.to, (case.weights, case.bags, case.grads)))
    sums, norm, finite = run.segment_sum_and_norm(pairs, *given_)
    assert same_bits(sums, run.segment_sum(pairs, *given_))
    assert (norm, finite) == run.squared_norm(sums)


def test_a_norm_counts_long_runs_and_what_is_not_finite(under_test):
    if under_test.interpreted:
        pytest.skip("too many pairs for Triton's interpreter")
    paged, ids, weights, bags, grads = hot_case(under_test)
    run, pairs = under_test.kernels, under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
    sums, norm, finite = run.segment_sum_and_norm(pairs, *map(under_test.to, (weights, bags, grads)))
    assert (norm, finite) == run.squared_norm(sums)
    assert norm == pytest.approx(float(sums.double().square().sum()), rel=1e-12)
    assert finite
    for poison in (float("inf"), float("nan")):
        grads[7, 1] = poison
        assert not run.segment_sum_and_norm(pairs, *map(under_test.to, (weights, bags, grads)))[2]


@kernel_settings
@given(case=cases())
def test_segment_sum_equals_reference(under_test, case):
    expected_pairs = reference.sort_pairs(case.paged, case.ids)
    pairs = under_test.kernels.sort_pairs(under_test.to(case.paged), under_test.to(case.ids))
    actual = under_test.kernels.segment_sum(pairs, *map(under_test.to, (case.weights, case.bags, case.grads)))
    weights, grads = None if case.weights is None else case.weights.abs(), case.grads.abs()
    terms = reference.segment_sum(expected_pairs, weights, case.bags, grads)
    assert_close(actual, reference.segment_sum(expected_pairs, case.weights, case.bags, case.grads), terms=terms)


def hot_case(under_test):
    """One slot with most of the pairs and three with somewhat more than a piece, among slots with a few."""
    generator = torch.Generator().manual_seed(7)
    num_pairs, width, slots, share = (RUN_PIECE + 512, 3, 20, 0.9) if under_test.interpreted else (24_000, 65, 256, 0.6)
    ids = torch.randint(0, slots, (num_pairs,), generator=generator)
    ids[torch.rand(num_pairs, generator=generator) < share] = 17
    ids[: num_pairs // 5] %= 3
    bags, weights = torch.randint(0, 50, (num_pairs,), generator=generator), torch.randn(num_pairs, generator=generator)
    paged = Paged(torch.randn(256, width, generator=generator), torch.arange(16, dtype=torch.int32), 4)
    return paged, ids, weights, bags, torch.randn(50, width, generator=generator)


def in_pieces(pairs: SortedPairs, weights, bags, grads, segment: int) -> torch.Tensor:
    """The sum of one segment in the order that segment_sum promises."""
    first, end = pairs.starts[segment : segment + 2].tolist()
    total = None
    for start in range(first, end, RUN_PIECE):
        piece = torch.zeros(grads.shape[1])
        for pair in pairs.order[start : min(end, start + RUN_PIECE)].tolist():
            piece += weights[pair] * grads[bags[pair]]
        total = piece if total is None else total + piece
    return total


def test_sums_are_made_in_pieces_whatever_the_threads(under_test):
    paged, ids, weights, bags, grads = hot_case(under_test)
    pairs = under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
    on_cpu = reference.sort_pairs(paged, ids)
    hot = int(on_cpu.starts.diff().argmax())
    assert int(on_cpu.starts.diff()[hot]) > (RUN_PIECE if under_test.interpreted else 10 * RUN_PIECE)
    results = []
    for num_threads in (1,) if under_test.interpreted else (1, 2):
        torch.set_num_threads(num_threads)
        results.append(under_test.kernels.segment_sum(pairs, *map(under_test.to, (weights, bags, grads))).cpu())
    assert same_bits(results[0], results[-1])
    for segment in (hot, 0, 1, 2, len(on_cpu.rows) - 1):
        assert same_bits(results[0][segment], in_pieces(on_cpu, weights, bags, grads, segment))


@pytest.mark.parametrize("algorithm", ["rowwise_adam"] if INTERPRETED else ["adagrad", "rowwise_adam"])
def test_hot_rows_step_alike_fused_and_in_two(under_test, algorithm):
    paged, ids, weights, bags, grads = hot_case(under_test)
    pairs = under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
    gradients = tuple(map(under_test.to, (weights, bags, grads)))
    on_cpu = kernels.implementation("numba")
    step = OptimizerStep(algorithm, lr=0.1, block_dim=16)
    width, blocks = paged.width, -(-paged.width // 16)
    shapes = {"sum": width, "exp_avg": width, "row_exp_avg_sq": blocks}
    results = []
    for fused in (False, True):
        own = under_test.to(paged)
        state = {name: under_test.to(torch.full((256, columns), 0.25)) for name, columns in shapes.items()}
        if fused:
            under_test.kernels.fused_step(own, state, pairs, *gradients, step)
        else:
            sums = on_cpu.segment_sum(on_cpu.sort_pairs(paged, ids), weights, bags, grads)  # all have its bits
            under_test.kernels.optimizer_step(own, state, pairs, under_test.to(sums), step)
        results.append([own.rows, *state.values()])
    assert not same_bits(results[0][0], paged.rows)
    assert all(map(same_bits, *results))


@kernel_settings
@given(case=cases(), data=st.data())
def test_parts_are_added_up(under_test, case, data):
    """Pairs in two parts, with the distinct rows of each at places of their own: bitwise one sum after the other."""
    cut = data.draw(st.integers(0, case.ids.numel()))
    whole = reference.sort_pairs(case.paged, case.ids)
    sums = under_test.to(torch.zeros(len(whole.rows) + 1, case.paged.width))
    sums[-1] = torch.nan
    expected = torch.zeros(len(whole.rows), case.paged.width)
    for part in (slice(0, cut), slice(cut, None)):
        weights = None if case.weights is None else case.weights[part]
        gradients = tuple(map(under_test.to, (weights, case.bags[part], case.grads)))
        pairs = under_test.kernels.sort_pairs(under_test.to(case.paged), under_test.to(case.ids[part]))
        places = torch.searchsorted(whole.slots, pairs.slots.cpu())
        under_test.kernels.add_segments(sums, under_test.to(places), pairs, *gradients)
        expected[places] += under_test.kernels.segment_sum(pairs, *gradients).cpu()
    assert same_bits(sums[:-1], expected)
    assert bool(sums[-1].isnan().all())
    weights, grads = None if case.weights is None else case.weights.abs(), case.grads.abs()
    terms = reference.segment_sum(whole, weights, case.bags, grads)
    assert_close(sums[:-1], reference.segment_sum(whole, case.weights, case.bags, case.grads), terms=terms)


def test_hot_parts_are_added_up_in_pieces(under_test):
    paged, ids, weights, bags, grads = hot_case(under_test)
    pairs = under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
    gradients = tuple(map(under_test.to, (weights, bags, grads)))
    places = torch.randperm(len(pairs.rows), generator=torch.Generator().manual_seed(1))
    sums = under_test.to(torch.zeros(len(places), paged.width))
    under_test.kernels.add_segments(sums, under_test.to(places), pairs, *gradients)
    on_cpu = kernels.implementation("numba")  # all have the bits of its sums
    assert same_bits(sums.cpu()[places], on_cpu.segment_sum(on_cpu.sort_pairs(paged, ids), weights, bags, grads))


@kernel_settings
@given(
    rows=st.integers(0, 600), width=st.sampled_from((1, 3, 65)), poison=st.sampled_from((None, "nan", "inf", "-inf"))
)
def test_squared_norm(under_test, rows, width, poison):
    generator = torch.Generator().manual_seed(rows)
    sums = torch.randn(rows, width, generator=generator) * 1e20  # squares overflow float32, not float64
    if poison is not None and rows:
        sums[rows // 2, width // 2] = float(poison)
    norm, finite = under_test.kernels.squared_norm(under_test.to(sums))
    expected, expected_finite = reference.squared_norm(sums)
    assert finite == expected_finite
    if finite:
        assert norm == pytest.approx(expected, rel=1e-12)


def test_cases_have_what_the_tests_need():
    """The generator of cases itself: spare rows are NaN and owned rows are not."""
    paged = make_paged(torch.Generator().manual_seed(1), num_pages=5, page_shift=2, width=3)
    empty = torch.empty(0, dtype=torch.int64)
    case = Case(paged, 20, empty, None, torch.zeros(1, dtype=torch.int64), empty, torch.empty(0, 3), 16)
    assert torch.equal(case.owned_rows, ~paged.rows[:, 0].isnan())
    assert dataclasses.replace(case, num_slots=19).num_slots == 19
