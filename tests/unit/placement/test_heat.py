"""Load by heat: how even it becomes, how few pages move for it, and that it changes nothing where it need not."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.placement import Assignment, plan
from mempool.placement.heat import TOLERANCE

from .strategies import LAYOUTS, presents, shard_sets
from .test_planner import check_balanced, num_moves, num_pairs

heats = st.one_of(
    st.floats(0, 1e9, allow_nan=False),
    st.integers(0, 20).map(lambda power: float(2**power)),
)


def planned(present, shards, layout, heat):
    return plan(
        present,
        shards,
        num_row_pages=present.num_row_pages,
        num_blocks=present.num_blocks,
        num_key_pages=present.num_key_pages,
        layout=layout,
        heat=heat,
    )


def load(target, shards, heat):
    """Of each shard: the heat of its pages."""
    return np.array([((target.owners == shard) * heat[:, None]).sum() for shard in shards])


def by_rows(owners, blocks=1):
    return Assignment(
        owners=np.repeat(np.array(owners, np.int32)[:, None], blocks, 1), key_owners=np.zeros(0, np.int32)
    )


@given(present=presents(), shards=shard_sets, layout=st.sampled_from(LAYOUTS), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_heat_keeps_pages_balanced_and_makes_no_load_worse(present, shards, layout, data):
    heat = np.array(data.draw(st.lists(heats, min_size=present.num_row_pages, max_size=present.num_row_pages)))
    target = planned(present, shards, layout, heat)
    check_balanced(target, shards, layout)
    assert planned(present, shards[::-1], layout, heat) == target, "the order of the shards must not matter"
    again = load(planned(target, shards, layout, heat), shards, heat)
    assert again.max() <= load(target, shards, heat).max() * (1 + 1e-9)
    assert planned(target, shards, layout, None) == target, "who knows nothing of heat has nothing to do"
    cold = planned(present, shards, layout, None)
    assert num_pairs(target) <= num_pairs(cold) or layout in ("rows", "grid")
    before, after = load(cold, shards, heat), load(target, shards, heat)
    assert after.max() <= before.max() * (1 + 1e-9)


@given(
    owners=st.lists(st.integers(0, 4), min_size=5, max_size=80),
    num_shards=st.integers(2, 5),
    blocks=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_rows_end_within_the_hottest_page_of_even(owners, num_shards, blocks, data):
    heat = np.array(data.draw(st.lists(heats, min_size=len(owners), max_size=len(owners))))
    shards = list(range(num_shards))
    loads = load(planned(by_rows(owners, blocks), shards, "rows", heat), shards, heat)
    mean = loads.mean()
    assert loads.max() - loads.min() <= blocks * heat.max() + TOLERANCE * mean or loads.max() <= mean * (1 + TOLERANCE)


@given(present=presents(), shards=shard_sets, layout=st.sampled_from(LAYOUTS), warmth=st.sampled_from([0.0, 0.1, 3e7]))
@settings(max_examples=40, deadline=None)
def test_the_same_heat_everywhere_is_no_heat(present, shards, layout, warmth):
    heat = np.full(present.num_row_pages, warmth)
    assert planned(present, shards, layout, heat) == planned(present, shards, layout, None)


@pytest.mark.parametrize("layout", ["rows", "grid", "auto"])
def test_many_pages_of_a_skewed_table_end_within_the_tolerance(layout):
    rows, blocks, shards = 600, 8, [0, 1, 2, 5, 7, 9]  # grid: two groups of three shards; auto: by pages
    heat = np.random.default_rng(0).permutation(1.0 / np.arange(1, rows + 1) ** 0.7)
    heat[:200] *= 20  # those of one shard, or of two
    present = plan(None, shards, num_row_pages=rows, num_blocks=blocks, num_key_pages=0, layout=layout)
    target = planned(present, shards, layout, heat)
    check_balanced(target, shards, layout)
    before, loads = load(present, shards, heat), load(target, shards, heat)
    assert before.max() > 1.3 * before.mean()
    assert loads.max() <= loads.mean() * (1 + TOLERANCE)
    assert planned(target, shards, layout, heat) == target, "what is even stays"


def test_load_is_handed_on_where_not_every_two_shards_share_a_block():
    rows, blocks, shards = 4096, 8, list(range(18))
    heat = 1.0 / np.arange(1, rows + 1) ** 0.8
    present = plan(None, shards[:12], num_row_pages=rows, num_blocks=blocks, num_key_pages=0, layout="auto")
    cold = planned(present, shards, "auto", None)
    target = planned(present, shards, "auto", heat)
    assert load(cold, shards, heat).max() > 2.5 * heat.sum() * blocks / 18
    assert load(target, shards, heat).max() < 1.2 * heat.sum() * blocks / 18
    assert num_pairs(target) <= num_pairs(cold)


def test_few_pages_move_for_a_few_hot_ones():
    heat = np.ones(1000)
    heat[:4] = 200.0  # all on shard 0
    present = by_rows(np.repeat([0, 1, 2, 3], 250))
    target = planned(present, [0, 1, 2, 3], "rows", heat)
    loads = load(target, [0, 1, 2, 3], heat)
    assert loads.max() <= loads.mean() * (1 + TOLERANCE)
    assert num_moves(present, target) == 6, "three hot pages go to three shards, each for a cold one"


def test_moves_are_near_the_fewest_of_all_plans_that_are_as_even():
    every = np.array([choice for choice in itertools.product(range(3), repeat=9) if np.bincount(choice).max() == 3])
    present, more = np.repeat([0, 1, 2], 3), []
    for seed in range(60):
        heat = np.random.default_rng(seed).pareto(1.5, 9) + 0.1
        target = planned(by_rows(present), [0, 1, 2], "rows", heat)
        loads = np.stack([(heat * (every == shard)).sum(axis=1) for shard in range(3)])
        limit = max(load(target, [0, 1, 2], heat).max(), heat.sum() / 3 * (1 + TOLERANCE)) + 1e-9
        moved = (every != present).sum(axis=1)
        more.append(num_moves(by_rows(present), target) - moved[loads.max(axis=0) <= limit].min())
    assert min(more) >= 0
    assert more.count(0) >= 45
    assert max(more) <= 4


def test_no_page_moves_where_the_load_is_near_enough_to_even():
    heat = np.ones(100)
    heat[:25] = 1.04
    present = by_rows(np.repeat([0, 1, 2, 3], 25))
    assert planned(present, [0, 1, 2, 3], "rows", heat) == present


@given(heat=st.lists(heats, min_size=40, max_size=40))
@settings(max_examples=20, deadline=None)
def test_shards_that_come_are_given_hot_and_cold_pages_for_the_moves_that_they_cost_anyway(heat):
    half = np.repeat(np.array(heat), 2)  # each page twice, so that a shard can keep one of each
    heat, present = np.tile(half, 2), by_rows(np.repeat([0, 1], 80))
    target = planned(present, [0, 1, 2, 3], "rows", heat)
    assert num_moves(present, target) == num_moves(present, planned(present, [0, 1, 2, 3], "rows", None)) == 80
    loads = load(target, [0, 1, 2, 3], heat)
    assert loads.max() - loads.min() <= heat.max() + TOLERANCE * loads.mean()


def test_a_page_that_is_too_hot_stays_where_it_is():
    heat = np.zeros(10)
    heat[0] = 100.0
    present = by_rows(np.repeat([0, 1], 5))
    assert planned(present, [0, 1], "rows", heat) == present


def test_a_shard_with_a_page_more_may_give_one_alone():
    present = by_rows([0, 0, 0, 1, 1])
    target = planned(present, [0, 1], "rows", np.array([3.0, 3.0, 3.0, 0.0, 0.0]))
    assert num_moves(present, target) == 1
    assert load(target, [0, 1], np.array([3.0, 3.0, 3.0, 0.0, 0.0])).tolist() == [6.0, 3.0]


@pytest.mark.parametrize("heat", [[1.0], [1.0, math.nan], [1.0, -1.0], [1.0, math.inf]])
def test_wrong_heat_is_refused(heat):
    with pytest.raises(InvalidRequest, match="heat"):
        planned(by_rows([0, 1]), [0, 1], "rows", np.array(heat))
