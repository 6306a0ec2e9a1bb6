"""Planning and merging against the unsharded answer, over random placements."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.client.routing.plan import (
    Part,
    TablePlan,
    make_plan,
    merge_candidates,
    merge_values,
    merge_weight_grads,
    newer_view,
    pick_columns,
    pick_grads,
    place_rows,
    rows_of,
    split,
)
from mempool.errors import Internal
from mempool.types import Placement, ShardInfo, TableSchema, TableView
from mempool.types.bags import Bags
from tests.support.faulty import make_schema


def make_view(
    schema: TableSchema, owners: np.ndarray, *, epoch: int = 1, key_owners: tuple[int, ...] = ()
) -> TableView:
    return TableView(
        schema=schema,
        placement=Placement(
            table_id=schema.table_id,
            epoch=epoch,
            owners=np.asarray(owners, dtype=np.int32),
            key_owners=np.asarray(key_owners, dtype=np.int32),
        ),
        shards=tuple(ShardInfo(shard=shard, address=f"h{shard}:1", incarnation=1) for shard in range(8)),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[TablePlan, str, Tensor, Bags]:
    """A plan of some layout, values [N, V], and bags of any size, empty ones too."""
    page_slots = draw(st.sampled_from([1, 4, 8]))
    num_pages = draw(st.integers(1, 5))
    num_slots = page_slots * num_pages - draw(st.integers(0, page_slots - 1))
    block_dim = draw(st.integers(1, 5))
    num_blocks = draw(st.integers(1, 4))
    value_dim = block_dim * num_blocks - draw(st.integers(0, block_dim - 1))
    schema = make_schema(num_slots=num_slots, value_dim=value_dim, block_dim=block_dim, page_slots=page_slots)
    layout = draw(st.sampled_from(["columns", "rows", "any"]))
    shards = st.integers(0, 3)
    if layout == "columns":
        owners = np.tile(draw(st.lists(shards, min_size=num_blocks, max_size=num_blocks)), (num_pages, 1))
    elif layout == "rows":
        owners = np.tile(draw(st.lists(shards, min_size=num_pages, max_size=num_pages)), (num_blocks, 1)).T
    else:
        flat = draw(st.lists(shards, min_size=num_pages * num_blocks, max_size=num_pages * num_blocks))
        owners = np.array(flat).reshape(num_pages, num_blocks)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    longest = draw(st.sampled_from([1, 6]))
    lengths = draw(st.lists(st.integers(0, longest), min_size=0, max_size=5))
    num_pairs = sum(lengths)
    bags = Bags(
        ids=torch.randint(0, num_slots, (num_pairs,), generator=generator),
        weights=draw(st.sampled_from([None, torch.randn(num_pairs, generator=generator)])),
        offsets=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64),
    )
    values = torch.randn(num_slots, value_dim, generator=generator)
    return make_plan(make_view(schema, owners)), layout, values, bags


def pooled(values: Tensor, bags: Bags) -> Tensor:
    """The weighted sum pair by pair, in the order of pairs, float32: what one shard computes."""
    out = torch.zeros(bags.num_bags, values.shape[1])
    for bag in range(bags.num_bags):
        for pair in range(int(bags.offsets[bag]), int(bags.offsets[bag + 1])):
            weight = 1.0 if bags.weights is None else bags.weights[pair]
            out[bag] += weight * values[bags.ids[pair]]
    return out


def owned(plan: TablePlan, shard: int, values: Tensor) -> Tensor:
    """``values`` with zeros where the shard owns nothing."""
    schema = plan.schema
    rows = (plan.page_owners == shard).repeat_interleave(schema.page_slots, dim=0)[: schema.num_slots]
    mask = rows.repeat_interleave(schema.block_dim, dim=1)[:, : schema.value_dim]
    return torch.where(mask, values, 0.0)


def assert_merged(layout: str, found: Tensor, expected: Tensor) -> None:
    if layout == "columns":
        assert torch.equal(found, expected)
    else:
        assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-30


@given(cases())
@settings(deadline=None, max_examples=150)
def test_merged_values_are_the_unsharded_sum(case: tuple[TablePlan, str, Tensor, Bags]) -> None:
    plan, layout, values, bags = case
    replies = [
        (part, pick_columns(part.route, pooled(owned(plan, part.route.shard, values), part.bags)))
        for part in split(plan, bags)
        if part.kept is None or part.bags.num_pairs
    ]
    merged = merge_values(plan, replies, num_bags=bags.num_bags)
    assert merged.shape == (bags.num_bags, plan.schema.value_dim)
    assert_merged(layout, merged, pooled(values, bags))


@given(cases())
@settings(deadline=None, max_examples=100)
def test_bags_that_are_left_out_change_no_sum(case: tuple[TablePlan, str, Tensor, Bags]) -> None:
    plan, _, values, bags = case
    parts = [part for part in split(plan, bags) if part.kept is None or part.bags.num_pairs]
    few, every = [], []
    for part in parts:
        own = owned(plan, part.route.shard, values)
        few.append((part, pick_columns(part.route, pooled(own, part.bags))))
        every.append((Part(route=part.route, bags=bags), pick_columns(part.route, pooled(own, bags))))
    merged = merge_values(plan, few, num_bags=bags.num_bags)
    assert torch.equal(merged, merge_values(plan, every, num_bags=bags.num_bags))


@given(cases())
@settings(deadline=None, max_examples=100)
def test_merged_weight_grads_are_the_unsharded_ones(case: tuple[TablePlan, str, Tensor, Bags]) -> None:
    plan, _, values, bags = case
    grads = torch.randn(bags.num_bags, plan.schema.value_dim, generator=torch.Generator().manual_seed(1))
    bag_of_pair = torch.repeat_interleave(bags.offsets.diff())
    parts = []
    for part in split(plan, bags):
        rows = pick_columns(part.route, owned(plan, part.route.shard, values)[part.bags.ids])
        part_bags = torch.repeat_interleave(part.bags.offsets.diff())
        parts.append((part, (rows * pick_grads(plan, part, grads)[part_bags]).sum(dim=1)))
    expected = (values[bags.ids] * grads[bag_of_pair]).sum(dim=1)
    found = merge_weight_grads(parts, num_pairs=bags.num_pairs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(cases())
@settings(deadline=None, max_examples=100)
def test_parts_have_the_pairs_of_owned_row_pages_and_no_others(case: tuple[TablePlan, str, Tensor, Bags]) -> None:
    plan, _, _, bags = case
    bag_of_pair = torch.repeat_interleave(bags.offsets.diff())
    for part in split(plan, bags):
        pages = {page for page, owners in enumerate(plan.page_owners.tolist()) if part.route.shard in owners}
        kept = [pair for pair in range(bags.num_pairs) if int(bags.ids[pair]) // plan.schema.page_slots in pages]
        if part.kept is None:
            kept = list(range(bags.num_pairs))
        else:
            assert part.kept.tolist() == kept
        assert part.bags.ids.tolist() == bags.ids[kept].tolist()
        named = torch.arange(bags.num_bags) if part.named is None else part.named
        assert named[torch.repeat_interleave(part.bags.offsets.diff())].tolist() == bag_of_pair[kept].tolist()
        with_pairs = len(set(bag_of_pair[kept].tolist()))
        few = part.kept is not None and with_pairs < 0.75 * bags.num_bags
        assert part.bags.num_bags == named.shape[0] == (with_pairs if few else bags.num_bags)
        if bags.weights is not None:
            assert part.bags.weights is not None
            assert torch.equal(part.bags.weights, bags.weights[kept])


@given(cases(), st.booleans())
@settings(deadline=None, max_examples=100)
def test_placed_rows_are_the_rows_to_the_bit(case: tuple[TablePlan, str, Tensor, Bags], per_block: bool) -> None:
    plan, _, values, bags = case
    schema = plan.schema
    if per_block:
        values = values[:, :1].repeat(1, schema.num_blocks) + torch.arange(schema.num_blocks)
    else:
        values[0] = -0.0
    out = torch.full((bags.num_pairs, values.shape[1]), torch.nan)
    for route in plan.routes:
        kept = rows_of(route, bags.ids, schema=schema)
        ids = bags.ids if kept is None else bags.ids[kept]
        rows = values[ids][:, list(route.blocks)] if per_block else pick_columns(route, values[ids])
        place_rows(plan, out, bags.ids, route=route, kept=kept, rows=rows, per_block=per_block)
    assert torch.equal(out, values[bags.ids])
    assert torch.equal(out.signbit(), values[bags.ids].signbit())


def bags_of(num_bags: int) -> Bags:
    """Of a pair each."""
    return Bags(ids=torch.zeros(num_bags, dtype=torch.int64), weights=None, offsets=torch.arange(num_bags + 1))


def test_the_only_owners_reply_is_the_answer_without_a_copy() -> None:
    plan = make_plan(make_view(make_schema(), np.zeros((8, 3))))
    reply = torch.randn(5, 12)
    (part,) = split(plan, bags_of(5))
    assert merge_values(plan, [(part, reply)], num_bags=5).data_ptr() == reply.data_ptr()


def test_columns_of_shards_in_another_order_are_put_where_they_belong() -> None:
    plan = make_plan(make_view(make_schema(), np.tile([1, 1, 0], (8, 1))))
    assert plan.side_by_side == (1, 0)
    low, high = torch.randn(5, 8).bfloat16(), torch.randn(5, 4).bfloat16()
    first, second = split(plan, bags_of(5))
    merged = merge_values(plan, [(first, high), (second, low)], num_bags=5)
    assert torch.equal(merged, torch.cat([low, high], dim=1).float())


def test_of_columns_in_two_ranges_or_of_parts_of_rows_nothing_is_side_by_side() -> None:
    for owners in (np.tile([0, 1, 0], (8, 1)), np.tile([[0], [1]], (4, 3)), [[0, 1, 1]] * 7 + [[0, 1, 2]]):
        assert make_plan(make_view(make_schema(), np.array(owners))).side_by_side == ()


def test_neighbouring_blocks_are_one_span() -> None:
    plan = make_plan(make_view(make_schema(), np.tile([0, 0, 1], (8, 1))))
    first, second = plan.routes
    assert [(span.table, span.sole) for span in first.spans] == [(slice(0, 8), True)]
    assert [(span.table, span.reply) for span in second.spans] == [(slice(8, 12), slice(0, 4))]


def test_owners_are_all_shards_with_pages_of_keys_too() -> None:
    plan = make_plan(make_view(make_schema(), np.zeros((8, 3)), key_owners=(2, 0, 2)))
    assert [info.shard for info in plan.owners] == [0, 2]
    assert [(info.shard, heads) for info, heads in plan.head_owners] == [(0, (1,)), (2, (0, 2))]
    assert [route.shard for route in plan.routes] == [0]


def test_placement_on_a_shard_that_the_view_does_not_name_is_a_bug() -> None:
    with pytest.raises(Internal, match=r"names no address of shards \[9\]"):
        make_plan(make_view(make_schema(), np.full((8, 3), 9)))


class TestNewerView:
    old = make_view(make_schema(), np.zeros((8, 3)), epoch=4)

    def changed(self, *, epoch: int = 4, incarnations: tuple[int, ...]) -> TableView:
        shards = tuple(
            ShardInfo(shard=shard, address=f"h{shard}:{incarnation}", incarnation=incarnation)
            for shard, incarnation in enumerate(incarnations)
        )
        placement = replace(self.old.placement, epoch=epoch)
        return TableView(schema=self.old.schema, placement=placement, shards=shards)

    def test_same_view_is_no_news(self) -> None:
        assert newer_view(self.old, make_view(self.old.schema, np.zeros((8, 3)), epoch=4)) is self.old

    def test_lower_epoch_is_no_news_of_where_pages_are(self) -> None:
        shards = tuple(info.incarnation for info in self.old.shards)
        assert newer_view(self.old, self.changed(epoch=3, incarnations=(0,) * len(shards))) is self.old
        later = newer_view(self.old, self.changed(epoch=3, incarnations=(9,) * len(shards)))
        assert later.placement is self.old.placement
        assert {info.incarnation for info in later.shards} == {9}

    def test_higher_epoch_is_news_of_where_pages_are_and_not_of_older_starts(self) -> None:
        first = newer_view(self.old, self.changed(incarnations=(3, 1)))
        second = newer_view(first, self.changed(epoch=5, incarnations=(1, 5, 1)))
        assert second.placement.epoch == 5
        assert [(info.incarnation, info.address) for info in second.shards] == [(3, "h0:3"), (5, "h1:5"), (1, "h2:1")]

    def test_of_one_epoch_every_shard_keeps_its_latest_start(self) -> None:
        first = newer_view(self.old, self.changed(incarnations=(3, 1)))
        second = newer_view(first, self.changed(incarnations=(1, 5)))
        assert [(info.incarnation, info.address) for info in second.shards] == [(3, "h0:3"), (5, "h1:5")]


@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_candidates_merge_by_score_descending_then_id_ascending(lists, topk, random) -> None:  # type: ignore[no-untyped-def]
    ids = list(range(4 * len(lists)))
    random.shuffle(ids)
    candidates = [(float(score), ids.pop()) for scores in lists for score in scores]
    # A shard with too few keys pads with (-inf, -1); a real key may score -inf too.
    candidates[0] = (-torch.inf, candidates[0][1])
    padded = [[*candidates[4 * n : 4 * n + 4], (-torch.inf, -1)] for n in range(len(lists))]
    scores = [torch.tensor([[[score for score, _ in part]]]) for part in padded]
    numbers = [torch.tensor([[[number for _, number in part]]]) for part in padded]
    found_scores, found_ids = merge_candidates(scores, numbers, topk=topk)
    best = sorted(candidates, key=lambda pair: (-pair[0], pair[1]))[:topk]
    assert found_ids.flatten().tolist()[: len(best)] == [number for _, number in best]
    assert found_scores.flatten().tolist()[: len(best)] == [score for score, _ in best]
