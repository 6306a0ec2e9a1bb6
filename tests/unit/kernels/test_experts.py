"""Experts in a table's rows: sums and gradients of every implementation against the float64 reference."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close, cases, kernel_settings

from mempool import kernels
from mempool.kernels import reference


@st.composite
def expert_cases(draw):
    """A case of bags whose rows are cut in u and v, anywhere, and an act."""
    case = draw(cases(elements=("float32", "int8")).filter(lambda case: case.paged.width > 1))
    return case, draw(st.integers(1, case.paged.width - 1)), draw(st.sampled_from(kernels.EXPERT_ACTS))


@kernel_settings
@given(experts=expert_cases())
def test_sums_equal_the_reference(under_test, experts):
    case, input_dim, act = experts
    inputs = case.grads[:, :input_dim].contiguous()
    given_bags = tuple(map(under_test.to, (case.paged, case.ids, case.weights, case.offsets)))
    actual = under_test.kernels.expert_sums(*given_bags, under_test.to(inputs), act)
    expected = reference.expert_sums(case.paged, case.ids, case.weights, case.offsets, inputs, act)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    assert_close(actual, expected, tolerance=1e-5)


@kernel_settings
@given(experts=expert_cases())
def test_gradients_equal_the_reference(under_test, experts):
    case, input_dim, act = experts
    given_bags = tuple(map(under_test.to, (case.paged, case.ids, case.weights, case.offsets)))
    actual = under_test.kernels.expert_gradients(*given_bags, under_test.to(case.grads), input_dim, act)
    expected = reference.expert_gradients(case.paged, case.ids, case.weights, case.offsets, case.grads, input_dim, act)
    for found, known in zip(actual, expected, strict=True):
        assert found.dtype == torch.float32
        assert_close(found, known, tolerance=1e-5)


def small_arena():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 96, generator=generator)
    return kernels.Paged(rows=rows, page_table=torch.tensor([0, 1], dtype=torch.int32), page_shift=2)


def test_a_bag_of_more_pairs_than_are_listed_at_once(under_test):
    paged = under_test.to(small_arena())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 8, (1300,), generator=generator)
    gates, offsets = torch.randn(1300, generator=generator) / 36, torch.tensor([0, 0, 1290, 1300])
    both = torch.randn(3, 96, generator=generator)
    bags = tuple(map(under_test.to, (ids, gates, offsets)))
    sums = under_test.kernels.expert_sums(paged, *bags, under_test.to(both[:, :40].contiguous()), "silu")
    expected = reference.expert_sums(small_arena(), ids, gates, offsets, both[:, :40], "silu")
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    found = under_test.kernels.expert_gradients(paged, *bags, under_test.to(both), 40, "silu")
    for actual, known in zip(
        found, reference.expert_gradients(small_arena(), ids, gates, offsets, both, 40, "silu"), strict=True
    ):
        torch.testing.assert_close(actual.cpu().double(), known, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_said():
    paged, ids, offsets = small_arena(), torch.tensor([0, 1]), torch.tensor([0, 2])
    inputs, grads = torch.zeros(1, 40), torch.zeros(1, 96)
    with pytest.raises(ValueError, match="act must be one of gelu, relu, silu, got 'tanh'"):
        kernels.expert_sums(paged, ids, None, offsets, inputs, act="tanh")
    with pytest.raises(ValueError, match="experts of 1 to 95 inputs, got 96"):
        kernels.expert_sums(paged, ids, None, offsets, torch.zeros(1, 96), act="gelu")
    with pytest.raises(ValueError, match=r"inputs must be torch.float32 \[1, 40\], got torch.float32 \[2, 40\]"):
        kernels.expert_sums(paged, ids, None, offsets, torch.zeros(2, 40), act="gelu")
    with pytest.raises(ValueError, match="experts of 1 to 95 inputs, got 0"):
        kernels.expert_gradients(paged, ids, None, offsets, grads, 0, act="gelu")
    with pytest.raises(ValueError, match=r"offsets must run from 0 to the number of ids, 2"):
        kernels.expert_gradients(paged, ids, None, torch.tensor([0, 1]), grads, 40, act="gelu")


def test_a_gate_of_nothing_and_rows_that_are_not_here_add_nothing(under_test):
    paged = dataclasses.replace(small_arena(), page_table=torch.tensor([0, -1], dtype=torch.int32))
    paged, bags = under_test.to(paged), (torch.tensor([5, 6]), torch.full((2,), torch.inf), torch.tensor([0, 2]))
    sums = under_test.kernels.expert_sums(
        paged, *map(under_test.to, bags), under_test.to(torch.full((1, 40), torch.inf)), "relu"
    )
    assert torch.equal(sums.cpu(), torch.zeros(1, 56))
