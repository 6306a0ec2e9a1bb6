"""The transportation problem against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.placement import balance
from mempool.placement.balance import assign, bounds, transport


@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=4), num_shards=st.integers(1, 3), data=st.data())
@settings(max_examples=150, deadline=None)
def test_keeps_as_much_as_brute_force(counts, num_shards, data):
    numbers = st.lists(st.integers(-3, 6), min_size=num_shards, max_size=num_shards)
    keep = np.array([data.draw(numbers) for _ in counts], dtype=np.int64)
    units = [kind for kind, count in enumerate(counts) for _ in range(count)][:7]
    counts = np.bincount(units)
    keep = keep[: len(counts)]
    low, high = bounds(len(units), num_shards)
    low, high = max(0, low - data.draw(st.integers(0, 1))), high + data.draw(st.integers(0, 1))

    best = max(
        sum(int(keep[kind, shard]) for kind, shard in zip(units, choice, strict=True))
        for choice in itertools.product(range(num_shards), repeat=len(units))
        if all(low <= choice.count(shard) <= high for shard in range(num_shards))
    )
    flow = transport(keep, counts, low=low, high=high)
    assert (flow >= 0).all()
    np.testing.assert_array_equal(flow.sum(axis=1), counts)
    assert low <= flow.sum(axis=0).min()
    assert flow.sum(axis=0).max() <= high
    assert (flow * keep).sum() == best


def test_like_units_go_to_shards_in_ascending_order():
    assert assign(np.zeros((5, 2), dtype=np.int64), low=2, high=3).tolist() in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_hundreds_of_shards_agree_with_the_closed_form():
    # Every unit is worth 1 where it is and nothing elsewhere: what is kept is the smaller of load and share.
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 200, size=2000)
    keep = (owner[:, None] == np.arange(200)).astype(np.int64)
    shard = assign(keep, low=10, high=10)
    loads = np.bincount(owner, minlength=200)
    assert (shard == owner).sum() == np.minimum(loads, 10).sum()
    assert (np.bincount(shard, minlength=200) == 10).all()


@given(num_units=st.integers(1, 200), num_shards=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_where_nobody_keeps_anything_it_is_as_by_paths(num_units, num_shards):
    low, high = bounds(num_units, num_shards)
    keep = np.zeros((1, num_shards), dtype=np.int64)
    by_paths = balance._Network(keep_KS=keep, units_KS=np.eye(1, num_shards, dtype=np.int64) * num_units)
    for limit, sign in ((high, 1), (low, -1)):
        while (sign * by_paths.loads > sign * limit).any():
            by_paths.push(supply=by_paths.loads - limit, demand=limit - by_paths.loads)
    flow = transport(keep, np.array([num_units]), low=low, high=high)
    np.testing.assert_array_equal(flow, by_paths.units_KS)


def test_a_new_table_goes_no_paths(monkeypatch):
    # They are cubic in shards: on 1,024 of them a new table by rows took 13 s.
    monkeypatch.setattr(balance, "_Network", lambda **_: pytest.fail("went paths"))
    shard = assign(np.zeros((1100, 512), dtype=np.int64), low=2, high=3)
    assert set(np.bincount(shard, minlength=512)) == {2, 3}
