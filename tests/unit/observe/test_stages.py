"""Stages are counted whole, spread to a factor of two, from any thread, and never fail what they measure."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.observe import Stages


def test_counts_and_seconds_add_up() -> None:
    stages = Stages()
    stages.record("kernel", 0.5)
    stages.record("kernel", 0.25)
    stages.record("copy", 1.0)
    assert [(time.stage, time.count, time.total_s) for time in stages.snapshot()] == [
        ("copy", 1, 1.0),
        ("kernel", 2, 0.75),
    ]


def test_what_raises_is_timed_and_still_raises() -> None:
    stages = Stages()
    with pytest.raises(KeyError), stages.measure("lookup"):
        raise KeyError("slot")
    (time,) = stages.snapshot()
    assert (time.stage, time.count) == ("lookup", 1)
    assert time.total_s >= 0.0


def test_threads_lose_no_count() -> None:
    stages = Stages()

    def record() -> None:
        for _ in range(2000):
            stages.record("kernel", 1.0)

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    (time,) = stages.snapshot()
    assert (time.count, time.total_s) == (8000, 8000.0)


@given(st.lists(st.floats(1e-8, 1e4), min_size=1, max_size=200))
def test_quantiles_are_right_to_a_factor_of_two(seconds: list[float]) -> None:
    stages = Stages()
    for second in seconds:
        stages.record("kernel", second)
    (time,) = stages.snapshot()
    ordered = sorted(seconds)
    for share, found in ((0.5, time.p50_s), (0.99, time.p99_s)):
        exact = ordered[math.ceil(share * len(ordered)) - 1]
        assert exact / 2.01 <= found <= exact * 2.01
    assert time.p50_s <= time.p99_s <= time.max_s
    assert time.max_s == pytest.approx(ordered[-1], abs=2e-9)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_clock_that_is_wrong_harms_nothing(seconds: float) -> None:
    stages = Stages()
    stages.record("kernel", seconds)
    (time,) = stages.snapshot()
    assert (time.count, time.total_s, time.p50_s, time.p99_s, time.max_s) == (1, 0.0, 0.0, 0.0, 0.0)
