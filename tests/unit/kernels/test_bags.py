"""Weighted sums, rows, weight gradients: against the float64 reference, and what must hold to the bit."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    CUT_WIDTHS,
    INTERPRETED,
    assert_close,
    cases,
    column_slice,
    kernel_settings,
    make_arena,
    make_paged,
    same_bits,
)

from mempool import kernels
from mempool.kernels import PackedLayout, Paged, reference
from mempool.kernels.torch_ops.elements import codes_and_scales

OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@kernel_settings
@given(case=cases(), dtype=st.sampled_from(OUTPUT_DTYPES))
def test_weighted_sum_equals_reference(under_test, case, dtype):
    actual = under_test.kernels.weighted_sum(
        *map(under_test.to, (case.paged, case.ids, case.weights, case.offsets)), dtype
    )
    assert actual.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    expected = reference.weighted_sum(case.paged, case.ids, case.weights, case.offsets)
    assert_close(actual, expected, tolerance=1.01 * tolerance)


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES[1:])
def test_sums_are_rounded_once_at_the_end(under_test, dtype):
    case = one_case(width=100, element="float32", num_pairs=40)
    arguments = [under_test.to(value) for value in (case.paged, case.ids, case.weights, case.offsets)]
    exact = under_test.kernels.weighted_sum(*arguments, torch.float32)
    assert same_bits(under_test.kernels.weighted_sum(*arguments, dtype), exact.to(dtype))


@kernel_settings
@given(case=cases())
def test_weight_gradient_equals_reference(under_test, case):
    actual = under_test.kernels.weight_gradient(
        *map(under_test.to, (case.paged, case.ids, case.offsets, case.grads)),
    )
    assert actual.dtype == torch.float32
    assert_close(actual, reference.weight_gradient(case.paged, case.ids, case.offsets, case.grads))


@kernel_settings
@given(case=cases(), asked=st.sampled_from((None, *OUTPUT_DTYPES)))
def test_gather_rows_equals_reference_to_the_bit(under_test, case, asked):
    dtype = case.paged.value_dtype if asked is None else asked
    actual = under_test.kernels.gather_rows(under_test.to(case.paged), under_test.to(case.ids.long()), dtype)
    assert actual.dtype == dtype
    assert same_bits(actual, reference.gather_rows(case.paged, case.ids, dtype))


@kernel_settings
@given(case=cases(), data=st.data())
def test_scatter_rows_equals_reference_to_the_bit(under_test, case, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    values = torch.randn(case.ids.numel(), case.paged.width, generator=generator).to(case.paged.value_dtype)
    paged = under_test.to(case.paged)
    under_test.kernels.scatter_rows(paged, under_test.to(case.ids.long()), under_test.to(values))
    expected = dataclasses.replace(case.paged, rows=case.paged.rows.clone())
    reference.scatter_rows(expected, case.ids, values)
    assert same_bits(paged.rows, expected.rows)


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@kernel_settings
@given(
    values=st.lists(st.one_of(FLOATS, st.sampled_from((0.0, -0.0, 1e-45, -3e-44, 3.4e38))), min_size=1, max_size=40),
    element=st.sampled_from(kernels.ELEMENTS),
    block_dim=st.sampled_from((1, 4, 16, 64)),
)
def test_any_float_is_stored_with_the_bits_of_the_reference(under_test, values, element, block_dim):
    rows, packed = make_arena(2, width=len(values), element=element, block_dim=block_dim)
    expected = Paged(rows, torch.tensor([1], dtype=torch.int32), 0, packed)
    paged, ids = under_test.to(expected), torch.tensor([0])
    matrix = torch.tensor([values]).to(paged.value_dtype)
    reference.scatter_rows(expected, ids, matrix)
    under_test.kernels.scatter_rows(paged, under_test.to(ids), under_test.to(matrix))
    if packed is not None:  # which NaN it is nobody says
        assert torch.equal(reference.read_values(paged).isnan(), reference.read_values(expected).isnan())
        for arena in (paged, expected):
            own_scales = arena.rows.view(torch.float32)
            own_scales[own_scales.isnan()] = torch.nan
    assert same_bits(paged.rows, expected.rows)


@pytest.mark.parametrize("element", ["int8", "float8_e4m3fn"])
def test_every_code_reads_as_torch_reads_it(under_test, element):
    layout = PackedLayout(element, 256, 64)
    codes = torch.arange(256, dtype=torch.uint8)
    if element == "float8_e4m3fn":
        codes[codes & 0x7F == 0x7F] = 0x7E  # NaN codes are never stored
    rows = torch.zeros(1, layout.row_bytes, dtype=torch.uint8)
    rows[0, :256] = codes
    scales = torch.tensor([1.0, 0.75, 2.0**-140, 3e30])
    rows[0, layout.scales_start : layout.scales_start + 16] = scales.view(torch.uint8)
    paged = under_test.to(Paged(rows, torch.zeros(1, dtype=torch.int32), 0, layout))
    ids, offsets = under_test.to(torch.tensor([0])), under_test.to(torch.tensor([0, 1]))
    expected = scales.repeat_interleave(64) * reference.decode(element, codes)
    assert same_bits(under_test.kernels.gather_rows(paged, ids, torch.float32)[0], expected)
    sums = under_test.kernels.weighted_sum(paged, ids.int(), None, offsets, torch.float32)[0]
    assert torch.equal(sums.cpu(), expected)


def cut_points(width: int, block_dim: int) -> list[int]:
    wanted = (0, 1, width // 3, width // 2, width - 1, width)
    return sorted({place if place == width else place // block_dim * block_dim for place in wanted})


@pytest.mark.parametrize("element", kernels.ELEMENTS)
@pytest.mark.parametrize("width", CUT_WIDTHS)
def test_sum_of_a_column_slice_is_the_slice_of_the_sum(under_test, width, element):
    num_pairs = 18 if under_test.interpreted else 90
    block_dims = (16,) if under_test.interpreted else (16, 64)
    for block_dim in block_dims if element in ("int8", "float8_e4m3fn") else (1,):
        case = one_case(width=width, element=element, block_dim=block_dim, num_pairs=num_pairs)
        arguments = [under_test.to(tensor) for tensor in (case.ids, case.weights, case.offsets)]
        whole = under_test.kernels.weighted_sum(under_test.to(case.paged), *arguments, torch.float32)
        for first, end in itertools.pairwise(cut_points(width, block_dim)):
            part = under_test.to(column_slice(case.paged, first, end))
            actual = under_test.kernels.weighted_sum(part, *arguments, torch.float32)
            assert same_bits(actual, whole[:, first:end])


@pytest.mark.parametrize("element", kernels.ELEMENTS)
def test_long_bags_have_the_bits_of_one_sum(under_test, element):
    """Bags that end inside, at and far behind the pieces in which pairs are taken, beside empty ones."""
    if under_test.interpreted:
        pytest.skip("too many pairs for Triton's interpreter")
    case = one_case(width=66, element=element, num_pairs=5000)
    offsets = torch.tensor([0, 0, 127, 128, 128, 257, 1000, 1024, 1024, 1025, 4096, 4990, 5000, 5000])
    arguments = (case.ids, case.weights, offsets)
    actual = under_test.kernels.weighted_sum(*map(under_test.to, (case.paged, *arguments)), torch.float32)
    expected = one_pair_at_a_time(case.paged, *arguments)
    if under_test.name == "torch":  # multiplies and adds apart
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    else:
        assert same_bits(actual, expected)
    grads = torch.randn(13, 66, generator=torch.Generator().manual_seed(0))
    actual = under_test.kernels.weight_gradient(*map(under_test.to, (case.paged, case.ids, offsets, grads)))
    assert_close(actual, reference.weight_gradient(case.paged, case.ids, offsets, grads))


def one_pair_at_a_time(paged: Paged, ids: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The sum as mempool.kernels.weighted_sum defines it, in float32, each pair added with one rounding."""
    codes, scales = paged.rows.float(), torch.ones(paged.rows.shape[0], 1)
    if paged.packed is not None:
        codes, scales = codes_and_scales(paged.packed, paged.rows)
    out = torch.zeros(offsets.numel() - 1, paged.width)
    for bag, (first, end) in enumerate(itertools.pairwise(offsets.tolist())):
        for pair in range(first, end):
            row = reference.arena_row(paged, int(ids[pair]))
            if row >= 0:
                factor = (weights[pair] * scales[row]).numpy().astype(np.longdouble)
                out[bag] = torch.from_numpy((factor * codes[row].numpy() + out[bag].numpy()).astype(np.float32))
    return out


@dataclasses.dataclass(frozen=True)
class Bags:
    paged: Paged
    ids: torch.Tensor
    weights: torch.Tensor
    offsets: torch.Tensor


def one_case(*, width: int, element: str, num_pairs: int, block_dim: int = 16) -> Bags:
    generator = torch.Generator().manual_seed(width)
    paged = make_paged(
        generator, num_pages=4, page_shift=3, width=width, element=element, block_dim=block_dim, missing=0.2
    )
    return Bags(
        paged=paged,
        ids=torch.randint(0, 32, (num_pairs,), generator=generator, dtype=torch.int32),
        weights=torch.randn(num_pairs, generator=generator),
        offsets=torch.tensor([0, 7, 7, num_pairs]),
    )


def test_weighted_sum_adds_in_the_order_of_the_pairs(under_test):
    """In float32, 1e8 + 1 - 1e8 is 0 in this order and 1 in the other: every column must show the same one."""
    values = torch.tensor([1e8, 1.0, -1e8])[:, None].expand(3, 67).contiguous()
    paged = under_test.to(Paged(values, torch.arange(3, dtype=torch.int32), 0))
    offsets = under_test.to(torch.tensor([0, 3, 6]))
    ids = under_test.to(torch.tensor([0, 1, 2, 0, 2, 1]))
    sums = under_test.kernels.weighted_sum(paged, ids, None, offsets, torch.float32)
    assert torch.equal(sums.cpu(), torch.tensor([[0.0], [1.0]]).expand(2, 67))


def test_ids_outside_the_page_table_are_not_here(under_test):
    paged = under_test.to(Paged(torch.ones(4, 5), torch.tensor([0, 1], dtype=torch.int32), 1))
    before = paged.rows.clone()
    ids = under_test.to(torch.tensor([-1, 4, 2**40, -(2**40), 3]))
    offsets = under_test.to(torch.tensor([0, 5]))
    sums = under_test.kernels.weighted_sum(paged, ids, None, offsets, torch.float32)
    assert torch.equal(sums.cpu(), torch.ones(1, 5))
    under_test.kernels.scatter_rows(paged, ids[:4], under_test.to(torch.full((4, 5), 7.0)))
    assert torch.equal(paged.rows, before)
    pairs = under_test.kernels.sort_pairs(paged, ids)
    assert pairs.order.tolist() == [4]
    assert pairs.rows.tolist() == [3]
    assert pairs.slots.tolist() == [3]


@pytest.mark.parametrize("element", kernels.ELEMENTS)
@pytest.mark.parametrize(
    "ends",
    [
        pytest.param((1 / 3, 0.99, 1.0), id="even"),
        *([] if INTERPRETED else [pytest.param((0.001, 0.002, 1.0), id="one long bag")]),  # which is for many threads
    ],
)
def test_runs_and_numbers_of_threads_give_the_same_bits(under_test, element, ends):
    generator = torch.Generator().manual_seed(3)
    paged = make_paged(generator, num_pages=8, page_shift=6, width=200, element=element, block_dim=64)
    num_pairs = 24 if under_test.interpreted else 6000
    ids = torch.randint(0, 512, (num_pairs,), generator=generator)
    offsets = torch.tensor([0, *(int(end * num_pairs) for end in ends)])
    weights, grads = torch.randn(num_pairs, generator=generator), torch.randn(3, 200, generator=generator)
    values = torch.randn(num_pairs, 200, generator=generator).to(paged.value_dtype)
    paged, ids, offsets, weights, grads, values = map(under_test.to, (paged, ids, offsets, weights, grads, values))

    def run():
        written = under_test.to(paged)
        under_test.kernels.scatter_rows(written, ids, values)
        return (
            under_test.kernels.weighted_sum(paged, ids.int(), weights, offsets, torch.float32),
            under_test.kernels.weight_gradient(paged, ids.int(), offsets, grads),
            under_test.kernels.gather_rows(paged, ids, torch.bfloat16),
            written.rows,
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
    torch.set_num_threads(2)  # each with threads of its own
    generator = torch.Generator().manual_seed(4)
    paged = make_paged(generator, num_pages=8, page_shift=5, width=65)
    ids, offsets = torch.randint(0, 256, (90_000,), generator=generator), torch.tensor([0, 4000, 9000, 90_000])
    weights = torch.randn(90_000, generator=generator)
    arguments = [under_test.to(value) for value in (paged, ids, weights, offsets)]
    expected = under_test.kernels.weighted_sum(*arguments, torch.float32)
    results: dict[int, list[bool]] = {0: [], 1: []}

    def work(number):
        for _ in range(20):
            results[number].append(same_bits(under_test.kernels.weighted_sum(*arguments, torch.float32), expected))

    threads = [threading.Thread(target=work, args=(number,)) for number in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == {0: [True] * 20, 1: [True] * 20}


@pytest.mark.parametrize(
    "offsets",
    [[0, 2**63 - 1, -(2**63), -1, 3], [2**40, 2**40 + 3, -5, 2], [-(2**62), 3, 3, 2**62], [3, 0, 3, 0]],
    ids=str,
)
def test_offsets_that_nobody_checked_are_kept_among_the_pairs(under_test, offsets):
    """On a GPU their values are not looked at before: whatever they are, nothing is read or written elsewhere."""
    if under_test.name != "triton":
        pytest.skip("on the CPU they are refused before")
    paged = under_test.to(Paged(torch.ones(4, 8), torch.zeros(1, dtype=torch.int32), 2))
    ids, weights = under_test.to(torch.tensor([0, 1, 3])), under_test.to(torch.ones(3))
    bounds = under_test.to(torch.tensor(offsets))
    sums = under_test.kernels.weighted_sum(paged, ids, weights, bounds, torch.float32).cpu()
    inside = torch.tensor(offsets).clamp(0, 3)
    assert torch.equal(sums[:, 0], (inside[1:] - inside[:-1]).clamp(min=0).float())
    gradient = under_test.kernels.weight_gradient(paged, ids, bounds, under_test.to(torch.ones(len(offsets) - 1, 8)))
    assert set(gradient.cpu().nan_to_num(nan=8.0).tolist()) == {8.0}  # of a bag, or of none and not written
