import threading

import pytest

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
