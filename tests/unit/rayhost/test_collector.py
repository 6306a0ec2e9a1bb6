"""What a serving process keeps for good is not walked through by each collection."""

import gc

from mempool.rayhost import collector


def test_what_lives_is_passed_over_and_what_is_dropped_later_is_still_found() -> None:
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        collector.settle(young=True)
        assert gc.get_freeze_count() > 10_000
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1
    finally:
        gc.unfreeze()
        if frozen:  # as the other tests found it
            gc.freeze()
