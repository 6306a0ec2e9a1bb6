"""The size of rounds follows what they take."""

from hypothesis import given
from hypothesis import strategies as st

from mempool.controller.moves.pace import LEAST_PULLS_S, Pace

MIB = 2**20


@given(
    rate=st.floats(1e6, 2e10),
    fixed_s=st.floats(0.0, 0.2),
    pulls_fixed_s=st.floats(0.0, 0.012),
    most=st.integers(1, 2**31),
    seed=st.integers(1, 2**28),
)
def test_rounds_come_to_take_what_they_may(
    rate: float, fixed_s: float, pulls_fixed_s: float, most: int, seed: int
) -> None:
    pace = Pace(most, aim_s=0.1)
    pace.took(seed, held_s=0.1, pulls_s=0.1)
    for _ in range(80):
        num_bytes = pace.round_bytes
        assert 0 < num_bytes <= most
        pulls_s = pulls_fixed_s + num_bytes / rate
        pace.took(num_bytes, held_s=fixed_s + pulls_s, pulls_s=pulls_s)
    pulls_s = pulls_fixed_s + pace.round_bytes / rate
    may_s = max(0.1 - fixed_s, LEAST_PULLS_S)  # what all else takes is no reason for ever smaller rounds
    assert pace.round_bytes == most or pulls_s <= 1.1 * may_s or pace.round_bytes <= MIB
    assert pace.round_bytes == most or pulls_s >= 0.9 * may_s


def test_one_slow_round_makes_the_next_smaller_at_once_but_not_tiny() -> None:
    pace = Pace(64 * MIB)
    for _ in range(10):
        pace.took(pace.round_bytes, held_s=0.01, pulls_s=0.005)
    assert pace.round_bytes == 64 * MIB
    pace.took(64 * MIB, held_s=100.0, pulls_s=100.0)
    assert pace.round_bytes == 16 * MIB
    for _ in range(10):
        pace.took(pace.round_bytes, held_s=100.0, pulls_s=100.0)
    assert pace.round_bytes == MIB
    pace.took(0, held_s=1.0, pulls_s=1.0)
    assert pace.round_bytes == MIB


def test_a_pool_that_asks_for_smaller_rounds_gets_them() -> None:
    pace = Pace(30_000)
    assert pace.round_bytes == 30_000
    pace.took(30_000, held_s=5.0, pulls_s=5.0)
    assert pace.round_bytes == 30_000
