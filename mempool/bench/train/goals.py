"""What training steps in pools shall cost beside steps with the table here, and how a run stands to it. Never
enforced."""

from __future__ import annotations

from collections.abc import Sequence

from mempool.bench.goals import Standing, stand
from mempool.bench.train.measured import (
    EMBEDDED,
    FBGEMM,
    GATHER,
    LAYER,
    LOCAL,
    NEAR,
    OVERLAP,
    OVERLAPPED,
    SHARDED,
    STEP,
    Measured,
    sharded,
)

_LAYOUTS = ("columns", "rows")
_MANY_SHARDS = 8


def standings(measured: Sequence[Measured], *, slots: int, peer_slots: int) -> list[Standing]:
    """How a run stands to the goals.

    Args:
        measured: What passed its gate.
        slots: Of tables that are timed in pools.
        peer_slots: Of those that other libraries train too.
    """
    by = {(one.work.family, one.work.num_slots): one for one in measured}

    def ratio(family: str, slots: int, contender: str, beside: str) -> float | None:
        one = by.get((family, slots))
        return None if one is None else one.ratio(contender, beside)

    layer = ratio(LAYER, slots, NEAR, LOCAL)
    overlapped = ratio(OVERLAP, slots, NEAR + OVERLAPPED, LOCAL)
    found = [
        stand(f"a layer's step, {NEAR}, beside its table here, times", 1.15, layer, under=True),
        stand("the same with overlap, beside dense work at least as long, times", 1.05, overlapped, under=True),
        stand(
            "embedded gather, speed beside FBGEMM's CPU build, times", 2.4, ratio(GATHER, peer_slots, FBGEMM, EMBEDDED)
        ),
        stand(
            "embedded gather, backward and commit, speed beside FBGEMM's CPU build, times",
            7.5,
            ratio(STEP, peer_slots, FBGEMM, EMBEDDED),
        ),
    ]
    for family in (GATHER, STEP):
        for layout in _LAYOUTS:
            beside = ratio(SHARDED + family, slots, sharded(layout, _MANY_SHARDS), sharded(layout, 1))
            what = f"embedded {family} of {_MANY_SHARDS} shards by {layout}, beside one, times"
            found.append(stand(what, 1.5, beside, under=True))
    return found
