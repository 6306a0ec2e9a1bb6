"""Initial values: the same bits for every slicing and implementation, and normally distributed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool import kernels
from mempool.kernels import reference
from mempool.kernels.reference import initial as reference_initial


def values(seed, slots, columns, std=1.0, name="numba"):
    return kernels.implementation(name).initial_values(
        seed,
        slots_start=slots[0],
        num_slots=slots[1] - slots[0],
        column_start=columns[0],
        num_columns=columns[1] - columns[0],
        std=std,
    )


@settings(max_examples=30, deadline=None, database=None)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    start=st.sampled_from((0, 1, 2**31 - 3, 2**40)),
    first_column=st.integers(0, 300),
    num_slots=st.integers(0, 9),
    num_columns=st.integers(0, 40),
)
def test_implementations_agree_to_the_bit(seed, start, first_column, num_slots, num_columns):
    where = ((start, start + num_slots), (first_column, first_column + num_columns))
    expected = reference.initial_values(
        seed, slots_start=start, num_slots=num_slots, column_start=first_column, num_columns=num_columns, std=0.3
    )
    assert torch.equal(values(seed, *where, std=0.3), expected)
    assert torch.equal(values(seed, *where, std=0.3, name="torch"), expected)


@settings(max_examples=30, deadline=None, database=None)
@given(
    rows=st.tuples(st.integers(0, 60), st.integers(0, 60)), columns=st.tuples(st.integers(0, 70), st.integers(0, 70))
)
def test_any_slice_has_the_bits_of_the_whole(rows, columns):
    rows, columns = tuple(sorted(rows)), tuple(sorted(columns))
    whole = values(11, (0, 60), (0, 70))
    assert torch.equal(values(11, rows, columns), whole[slice(*rows), slice(*columns)])


def test_values_are_normal_and_independent():
    sample = values(1, (0, 4000), (0, 256), std=0.25).double()
    assert sample.mean().abs() < 1e-3
    assert sample.std() == pytest.approx(0.25, rel=5e-3)
    assert ((sample / 0.25) ** 4).mean() == pytest.approx(3.0, rel=2e-2)
    for bound, share in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        assert (sample.abs() < bound * 0.25).double().mean() == pytest.approx(share, abs=2e-3)
    other = values(2, (0, 4000), (0, 256), std=0.25).double()
    for left, right in ((sample[:, :-1], sample[:, 1:]), (sample[:-1], sample[1:]), (sample, other)):
        assert abs(float((left * right).mean()) / 0.0625) < 5e-3


def test_the_generator_never_changes():
    """Tables written by an older version must start alike: these bits are a promise."""
    bits = [-1078235052, -1096691133, 1055753045, -1084299771, 1056396813, 1035442167]
    expected = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert torch.equal(values(42, (7, 9), (3, 6)).flatten(), expected)


def test_the_series_are_those_of_the_formula():
    """Against Box-Muller with torch's own logarithm and cosine."""
    bits = torch.randint(0, 2**32, (100_000,), generator=torch.Generator().manual_seed(0))
    uniform = (bits + 1).double() / 2**32
    assert torch.allclose(reference_initial._log(uniform), uniform.log(), rtol=0, atol=1e-10)
    assert torch.allclose(
        reference_initial._cos_of_turn(bits), (bits.double() * (2 * torch.pi / 2**32)).cos(), atol=1e-11
    )
