"""The gate: what counts as wrong, and that NaN never passes."""

import math

import pytest
import torch

from mempool.bench.gate import Check, GateError, difference


def test_difference_is_a_share_of_the_largest_number_expected() -> None:
    expected = torch.tensor([1.0, -4.0, 0.0], dtype=torch.float64)
    assert difference(torch.tensor([1.0, -4.0, 0.0]), expected) == 0.0
    assert difference(torch.tensor([1.0, -4.0, 0.5]), expected) == 0.125
    assert difference(torch.tensor([0.25]), torch.zeros(1)) == 0.25
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2\] is compared with \[3\]"):
        difference(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_nan_and_inf_never_pass(bad: float, part: int) -> None:
    expected = [torch.ones(2), torch.ones(2)]
    actual = [one.clone() for one in expected]
    actual[part][1] = bad
    check = Check.of("someone", actual, expected, tolerance=1e30)
    assert not check.passed


def test_the_worst_part_counts() -> None:
    check = Check.of("someone", [torch.ones(1), torch.tensor([1.5])], [torch.ones(1), torch.ones(1)], tolerance=0.4)
    assert check.error == 0.5
    assert not check.passed


def test_the_error_says_who_and_by_how_much() -> None:
    error = GateError("forward", [Check("right", 0.0, 1e-5), Check("wrong", 0.25, 1e-5)])
    assert str(error) == "forward: wrong is off by 0.25 of the largest number, 1e-05 is allowed"
