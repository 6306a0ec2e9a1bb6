"""The size of rounds follows what they take."""

from hypothesis import given
from hypothesis import strategies as st

from mempool.controller.moves.pace import Pace

MIB = 2**20


@given(rate=st.floats(1e6, 2e10), fixed_s=st.floats(0.0, 0.04), most=st.integers(1, 2**31), seed=st.integers(1, 2**28))
def test_rounds_come_to_take_what_they_may(rate: float, fixed_s: float, most: int, seed: int) -> None:
    pace = Pace(most, aim_s=0.1)
    pace.took(seed, 0.1)
    for _ in range(60):
        num_bytes = pace.round_bytes
        assert 0 < num_bytes <= most
        pace.took(num_bytes, fixed_s + num_bytes / rate)
    took_s = fixed_s + pace.round_bytes / rate
    assert pace.round_bytes == most or took_s <= 0.11 or pace.round_bytes <= MIB
    assert took_s >= 0.09 or pace.round_bytes == most or took_s > 0.11


def test_one_slow_round_makes_the_next_smaller_at_once_but_not_tiny() -> None:
    pace = Pace(64 * MIB)
    for _ in range(10):
        pace.took(pace.round_bytes, 0.01)
    assert pace.round_bytes == 64 * MIB
    pace.took(64 * MIB, 100.0)
    assert pace.round_bytes == 16 * MIB
    for _ in range(10):
        pace.took(pace.round_bytes, 100.0)
    assert pace.round_bytes == MIB
    pace.took(0, 1.0)
    assert pace.round_bytes == MIB


def test_a_pool_that_asks_for_smaller_rounds_gets_them() -> None:
    pace = Pace(30_000)
    assert pace.round_bytes == 30_000
    pace.took(30_000, 5.0)
    assert pace.round_bytes == 30_000
