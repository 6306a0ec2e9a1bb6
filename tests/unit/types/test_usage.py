"""Tallies of counts: what they say is what all counts say, however they are cut."""

import math
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import numpy.typing as npt
import pytest

from mempool.types.usage import BINS, Tally, usage_of
from mempool.types.usage.tally import bins_of, range_of

SLOTS = 5000


def counts_of(seed: int) -> npt.NDArray[np.int64]:
    """Many zeros, and a long tail."""
    random = np.random.default_rng(seed)
    counts = np.floor(random.pareto(0.7, SLOTS) * random.integers(0, 2, SLOTS)).astype(np.int64)
    return np.minimum(counts, 2**50)


def test_every_count_is_in_one_bin_and_bins_are_narrow() -> None:
    ends = [range_of(number) for number in range(BINS)]
    assert ends[0] == (0, 0)
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(ends))
    assert ends[-1][1] == 2**63 - 1
    assert all((high - low) * 8 <= low for low, high in ends)
    edges = np.array(sorted({edge for pair in ends for edge in pair}), dtype=np.int64)
    found = bins_of(edges)
    assert all(ends[number][0] <= edge <= ends[number][1] for number, edge in zip(found, edges.tolist(), strict=True))


@pytest.mark.parametrize("pieces", [1, 7])
def test_it_is_what_all_counts_say(pieces: int) -> None:
    uses = counts_of(pieces)
    last_use = np.where(uses > 0, np.random.default_rng(1).integers(1, 50, SLOTS), 0)
    cut = zip(np.array_split(uses, pieces), np.array_split(last_use, pieces), strict=True)
    usage = usage_of(reduce(add, (Tally.of(*each, before=40) for each in cut)), version=49, older_than=10)
    used = uses > 0
    share = uses[used] / uses.sum()
    assert (usage.num_slots, usage.version, usage.older_than) == (SLOTS, 49, 10)
    assert (usage.uses, usage.used, usage.most) == (uses.sum(), used.sum(), uses.max())
    assert usage.dead == SLOTS - usage.used
    assert usage.coverage == used.mean()
    assert usage.outdated == (used & (last_use < 40)).sum()
    assert usage.kl_uniform == pytest.approx((share * np.log(share * SLOTS)).sum(), rel=1e-9)
    assert usage.histogram[0].slots == usage.dead
    for found in usage.histogram:
        here = (uses >= found.low) & (uses <= found.high)
        assert (found.slots, found.uses) == (here.sum(), uses[here].sum())
    assert sum(found.slots for found in usage.histogram) == SLOTS


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    uses = np.round(1e7 * np.arange(1, SLOTS + 1, dtype=np.float64) ** -exponent).astype(np.int64)
    assert usage_of(Tally.of(np.random.default_rng(0).permutation(uses))).zipf == pytest.approx(exponent, rel=0.02)


def test_what_is_used_alike_or_by_one_slot_alone() -> None:
    alike = usage_of(Tally.of(np.full(SLOTS, 3)))
    assert (alike.kl_uniform, alike.zipf, alike.coverage) == (pytest.approx(0.0, abs=1e-12), None, 1.0)
    one = usage_of(Tally.of(np.array([0] * 99 + [2**40])))
    assert (one.kl_uniform, one.used, one.most) == (pytest.approx(math.log(100)), 1, 2**40)
    nothing = usage_of(Tally.of(np.zeros(5, dtype=np.int64)))
    assert (nothing.kl_uniform, nothing.zipf, nothing.dead, nothing.coverage) == (None, None, 5, 0.0)
    assert nothing.histogram[0].slots == 5
    assert len(nothing.histogram) == 1
