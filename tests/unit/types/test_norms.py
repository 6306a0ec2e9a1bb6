"""Norms joined from parts equal torch's norm of everything, also at the ends of what a float can hold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mempool.types.norms import joined_norm


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), max_size=4), max_size=4),
    st.sampled_from([0.5, 1.0, 2.0, 3.5, 40.0, math.inf]),
)
def test_joined_norms_are_the_whole_ones(parts: list[list[float]], order: float) -> None:
    norms = [float(torch.linalg.vector_norm(torch.tensor(part, dtype=torch.float64), order)) for part in parts if part]
    everything = torch.tensor([number for part in parts for number in part], dtype=torch.float64)
    expected = float(torch.linalg.vector_norm(everything, order)) if everything.numel() else 0.0
    assert joined_norm(norms, order) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_joined_norms_neither_overflow_nor_vanish() -> None:
    assert joined_norm([3e200, 4e200], 2.0) == pytest.approx(5e200)
    assert joined_norm([3e-200, 4e-200], 2.0) == pytest.approx(5e-200)
    assert joined_norm([1.0, math.inf], 3.0) == math.inf
    assert math.isnan(joined_norm([1.0, math.nan], 3.0))
    assert joined_norm([], 3.0) == joined_norm([0.0], 0.1) == 0.0
