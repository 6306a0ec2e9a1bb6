"""What passes the door is what kernels may read: offsets above all, which say where they read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mempool import kernels
from mempool.errors import ContextMissing, InvalidRequest, RequestTooLarge
from mempool.shard import validate
from mempool.shard.pages.storage import Storage
from mempool.types import (
    Envelope,
    FlatKeySpec,
    GatherRequest,
    OwnKeySpec,
    Placement,
    ProductKeySpec,
    ReadRowsRequest,
    ScoreRequest,
    StepId,
    TableSchema,
    UpdateRequest,
)
from mempool.types.bags import Bags
from tests.contract.driver import make_schema
from tests.contract.layouts import LAYOUTS

CPU = torch.device("cpu")
ENVELOPE = Envelope(table_id=0, epoch=1, incarnation=1)
MOST, LEAST = 2**63 - 1, -(2**63)


def _table(schema: TableSchema | None = None, key_owners: tuple[int, ...] = ()) -> Storage:
    table = Storage(schema or make_schema(), shard=0, device=CPU)
    owners = np.array(LAYOUTS["one"], dtype=np.int32)
    keys = np.array(key_owners, dtype=np.int32)
    for _ in table.initialise(Placement(table_id=0, epoch=1, owners=owners, key_owners=keys)):
        pass
    return table


TABLE = _table()
WRAPPING = {
    "up and down by all there is": [0, MOST, LEAST, -1, 4],
    "up, and down by two": [0, MOST, -2, 4],
    "down and up": [0, LEAST, MOST, 4],
    "up to the top": [0, MOST, 4],
    "below": [0, -1, 4],
    "by half of it": [0, 2**62, -(2**62), 4],
}


def _gather(offsets: list[int], ids: Tensor | None = None, **changes: object) -> GatherRequest:
    request = GatherRequest(
        envelope=ENVELOPE,
        lookup_id=1,
        ids=torch.tensor([1, 2, 3, 4]) if ids is None else ids,
        weights=None,
        offsets=torch.tensor(offsets),
        remember=False,
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def _update(offsets: list[int], num_bags: int, **changes: object) -> UpdateRequest:
    request = UpdateRequest(
        envelope=ENVELOPE,
        step_id=StepId(group="g", rank=0, step=1),
        sequence=0,
        lookup_id=1,
        blocks=TABLE.blocks,
        grads=torch.ones(num_bags, 10),
        hold=True,
        want_weight_grad=False,
        ids=torch.tensor([1, 2, 3, 4]),
        offsets=torch.tensor(offsets),
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def _without_bags(num_bags: int) -> UpdateRequest:
    return replace(_update([0, 4], num_bags), ids=None, offsets=None)


@pytest.mark.parametrize("case", WRAPPING)
def test_offsets_whose_differences_wrap_are_refused(case: str) -> None:
    offsets = WRAPPING[case]
    with pytest.raises(InvalidRequest, match=r"offsets must not descend: offsets\[\d\] = "):
        validate.check_gather(TABLE, _gather(offsets), reply_bytes=None)
    with pytest.raises(InvalidRequest, match="offsets must not descend"):
        validate.check_update(TABLE, _update(offsets, len(offsets) - 1), None, reply_bytes=None)
    # And the kernels, called by somebody else, look too.
    paged = TABLE.lanes[0].arena.paged()
    with pytest.raises(ValueError, match="offsets must not fall; they do after bag"):
        kernels.weighted_sum(paged, torch.tensor([1, 2, 3, 4]), None, torch.tensor(offsets))


@given(st.lists(st.integers(LEAST, MOST), max_size=8))
def test_offsets_that_pass_ascend_from_0_to_the_number_of_ids(inner: list[int]) -> None:
    offsets = [0, *inner, 4]
    try:
        bags, _ = validate.check_gather(TABLE, _gather(offsets), reply_bytes=None)
    except InvalidRequest:
        assert sorted(offsets) != offsets
    else:
        assert bags.offsets.tolist() == sorted(offsets)


def test_nothing_at_all_is_a_request_too() -> None:
    none = torch.empty(0, dtype=torch.int64)
    bags, _ = validate.check_gather(TABLE, _gather([0], none), reply_bytes=None)
    assert (bags.num_bags, bags.num_pairs) == (0, 0)
    for array in ("values", "values.sum"):
        ids = validate.check_read(TABLE, ReadRowsRequest(envelope=ENVELOPE, array=array, ids=none), reply_bytes=2048)
        assert TABLE.read(array, ids).shape == (0, 10)
    keyed = _table(make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=2, key_dim=4)), (0, 0))
    ids = validate.check_read(keyed, ReadRowsRequest(envelope=ENVELOPE, array="keys", ids=none), reply_bytes=2048)
    assert keyed.read("keys", ids).shape == (0, 28)


def test_answers_are_sized_before_the_work() -> None:
    """Millions of empty bags, ids or candidates are small messages about large answers."""
    huge = torch.zeros(1, dtype=torch.int64).expand(3_000_001)  # takes no memory: nor must the check
    request = replace(_gather([0, 4]), ids=huge[:0], offsets=huge)
    with pytest.raises(RequestTooLarge, match=r"3,000,000 bags of 0 pairs would be answered by 120,000,000 bytes"):
        validate.check_gather(TABLE, request, reply_bytes=10**8)
    half = replace(request, reply_dtype="bfloat16")
    assert validate.check_gather(TABLE, half, reply_bytes=10**8)[1] == torch.bfloat16
    read = ReadRowsRequest(envelope=ENVELOPE, array="values", ids=huge)
    with pytest.raises(RequestTooLarge, match="3,000,001 rows of 'values' would be answered by 120,000,040 bytes"):
        validate.check_read(TABLE, read, reply_bytes=10**8)
    update = replace(_update([0, 4], 1), ids=huge, offsets=torch.tensor([0, 3_000_001]), want_weight_grad=True)
    with pytest.raises(RequestTooLarge, match="gradient of 3,000,001 weights would be answered by 12,000,004 bytes"):
        validate.check_update(TABLE, update, None, reply_bytes=10**7)
    product = _table(make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=2, key_dim=4)), (0, 0))
    flat = _table(make_schema(keys=FlatKeySpec(key_dim=4)))
    for table, heads, answered in ((product, 2, 2), (flat, 1, 1)):
        queries = torch.zeros(1, heads, 4).expand(100_000, heads, 4)
        score = ScoreRequest(envelope=ENVELOPE, queries=queries, topk=40)
        size = f"{12 * 100_000 * answered * 40:,}"
        with pytest.raises(RequestTooLarge, match=f"topk = 40 of 100,000 queries .* answered by {size} bytes"):
            validate.check_score(table, score, reply_bytes=10**7)


GROUPED = _table(make_schema(num_slots=49, keys=OwnKeySpec(sections=1, rows=49, groups=7)))
SCORES = torch.zeros(2, 3)


def test_groups_that_are_picked_are_those_that_there_are() -> None:
    """Of 42 slots in seven groups: their rows are read where they are said to be."""
    request = ScoreRequest(envelope=ENVELOPE, queries=torch.zeros(2, 1, 10), topk=9)
    assert validate.check_picked(GROUPED, request) is None
    with pytest.raises(InvalidRequest, match="topk = 9 must be 1 to 7, the number of groups"):
        validate.check_score(GROUPED, request, reply_bytes=None)
    groups = torch.tensor([[0, 3, 6], [1, 2, 3]])
    named = replace(request, topk=42, groups=groups, group_scores=SCORES)
    validate.check_score(GROUPED, named, reply_bytes=None)
    picked = validate.check_picked(GROUPED, named)
    assert picked is not None
    assert torch.equal(picked.groups, groups)
    with pytest.raises(InvalidRequest, match="topk = 43 must be 1 to 42, the number of slots in groups"):
        validate.check_score(GROUPED, replace(named, topk=43), reply_bytes=None)
    flat = _table(make_schema(keys=FlatKeySpec(key_dim=10)))
    with pytest.raises(InvalidRequest, match="has no keys in groups, and groups were given"):
        validate.check_picked(flat, named)


@pytest.mark.parametrize(
    ("groups", "scores", "match"),
    [
        (None, SCORES, "give both, or neither"),
        ([[0, 1, 2], [0, 1, 2]], None, "give both, or neither"),
        ([[0, 1, 7], [0, 1, 2]], SCORES, "must ascend, from 0 to 6, each named once"),
        ([[-1, 1, 2], [0, 1, 2]], SCORES, "must ascend, from 0 to 6"),
        ([[LEAST, 1, MOST], [0, 1, 2]], SCORES, "must ascend, from 0 to 6"),
        ([[0, 1, 2], [0, 2, 1]], SCORES, "must ascend, from 0 to 6"),
        ([[0, 1, 2], [0, 2, 2]], SCORES, "must ascend, from 0 to 6"),
        ([[0, 1, 2]], SCORES[:1], r"must be \[2, G\] int64 and float32, G from 1 to 7 of the 7 groups"),
        ([[], []], SCORES[:, :0], r"must be \[2, G\] int64"),
        ([[0, 1], [0, 1]], SCORES, r"must be \[2, G\] int64"),
        ([list(range(8))] * 2, torch.zeros(2, 8), r"must be \[2, G\] int64"),
        ([[0, 1, 2], [0, 1, 2]], SCORES.double(), r"must be \[2, G\] int64 and float32"),
        ([[0, 1, 2], [0, 1, 2]], SCORES * torch.nan, "group_scores must be finite"),
        ([[0, 1, 2], [0, 1, 2]], SCORES - torch.inf, "group_scores must be finite"),
    ],
)
def test_groups_that_are_not_there_are_refused(
    groups: list[list[int]] | None, scores: Tensor | None, match: str
) -> None:
    named = None if groups is None else torch.tensor(groups, dtype=torch.int64)
    queries = torch.zeros(2, 1, 10)
    request = ScoreRequest(envelope=ENVELOPE, queries=queries, topk=9, groups=named, group_scores=scores)
    with pytest.raises(InvalidRequest, match=match):
        validate.check_picked(GROUPED, request)


def test_a_context_of_other_bags_and_none() -> None:
    with pytest.raises(ContextMissing, match="does not remember lookup 1"):
        validate.check_update(TABLE, _without_bags(1), None, reply_bytes=None)
    remembered = Bags(torch.tensor([1]), None, torch.tensor([0, 1]))
    bags, grads = validate.check_update(TABLE, _without_bags(1), remembered, reply_bytes=None)
    assert bags is remembered
    with pytest.raises(InvalidRequest, match=r"grads must be \[1, 10\]"):
        validate.check_update(TABLE, _without_bags(2), remembered, reply_bytes=None)
    assert grads.shape == (1, 10)


def test_names_from_outside_are_cut_in_messages() -> None:
    request = ReadRowsRequest(envelope=ENVELOPE, array="x" * 2**20, ids=torch.tensor([0]))
    with pytest.raises(InvalidRequest, match=r"no array 'x{64}\.\.\.'") as raised:
        validate.check_read(TABLE, request, reply_bytes=None)
    assert len(str(raised.value)) < 300
    with pytest.raises(InvalidRequest, match="are not those") as raised:
        validate.check_update(TABLE, _update([0, 4], 1, blocks=tuple(range(10**5))), None, reply_bytes=None)
    assert len(str(raised.value)) < 300
    with pytest.raises(InvalidRequest, match=r"reply_dtype = 'float64'"):
        validate.check_gather(TABLE, _gather([0, 4], reply_dtype="float64"), reply_bytes=None)


def test_what_is_kept_is_a_copy() -> None:
    request = _update([0, 4], 1)
    bags, grads = validate.check_update(TABLE, request, None, reply_bytes=None)
    assert request.ids is not None
    assert request.offsets is not None
    for kept, given_ in ((bags.ids, request.ids), (bags.offsets, request.offsets), (grads, request.grads)):
        assert kept.data_ptr() != given_.data_ptr()
        assert torch.equal(kept, given_)


def test_the_same_bags_are_gone_through_once_for_each_kind_of_table(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ids, times = torch.tensor([1, 2, 3, 49], dtype=torch.int32), []
    bags = Bags(given_ids, torch.ones(4, dtype=torch.bfloat16), torch.tensor([0, 4]))
    sent = {"weights": bags.weights, "private": True, "bags": bags}
    gather = replace(_gather([0, 4], given_ids.view(torch.uint32)), remember=True, **sent)
    admit = kernels.admit_bags
    monkeypatch.setattr(kernels, "admit_bags", lambda *given, **how: times.append(how) or admit(*given, **how))
    checked, _ = validate.check_gather(TABLE, gather, reply_bytes=None)
    update = replace(_update([0, 4], 1), ids=gather.ids, offsets=bags.offsets, **sent)
    again, _ = validate.check_update(TABLE, update, None, reply_bytes=None)
    assert again is checked
    assert len(times) == 1
    assert checked.weights is not None
    assert (checked.ids.tolist(), checked.weights.dtype) == ([1, 2, 3, 49], torch.float32)
    small = _table(make_schema(num_slots=49))
    with pytest.raises(InvalidRequest, match=r"ids\[3\] = 49 is not a slot"):
        validate.check_gather(small, gather, reply_bytes=None)
    with pytest.raises(RequestTooLarge, match="the gradient of 4 weights"):
        validate.check_update(TABLE, replace(update, want_weight_grad=True), None, reply_bytes=8)


@pytest.mark.parametrize("private", [False, True])
def test_what_is_kept_is_a_copy_unless_nobody_else_writes_to_it(private: bool) -> None:
    weights, ids = torch.ones(4), torch.tensor([1, 2, 3, 4]).to(torch.uint32)
    gather = replace(_gather([0, 4], ids), weights=weights, remember=True, private=private)
    bags, _ = validate.check_gather(TABLE, gather, reply_bytes=None)
    assert bags.weights is not None
    assert (bags.weights.data_ptr() == weights.data_ptr()) == private
    assert (bags.ids.data_ptr() == ids.data_ptr()) == private
    assert bags.ids.tolist() == [1, 2, 3, 4]
    wrong = torch.tensor([0, 2**32 - 1]).to(torch.uint32)
    with pytest.raises(InvalidRequest, match=r"ids\[1\] = 4294967295 is not a slot"):
        validate.check_gather(TABLE, replace(_gather([0, 2], wrong), private=private), reply_bytes=None)
    update = replace(_update([0, 4], 1), weights=weights, private=private)
    bags, grads = validate.check_update(TABLE, update, None, reply_bytes=None)
    assert bags.weights is not None
    for kept, given_ in ((bags.weights, weights), (grads, update.grads), (bags.offsets, update.offsets)):
        assert given_ is not None
        assert (kept.data_ptr() == given_.data_ptr()) == private


def test_a_query_picks_no_more_groups_than_a_table_may_have_it_look_into() -> None:
    groups = torch.arange(4097)[None]
    keys = OwnKeySpec(sections=1, rows=14_000, groups=7_000)
    table = _table(make_schema(num_slots=14_000, page_slots=2048, keys=keys))
    request = ScoreRequest(envelope=ENVELOPE, queries=torch.zeros(1, 1, 10), topk=1)
    request = replace(request, groups=groups, group_scores=torch.zeros(1, 4097))
    with pytest.raises(InvalidRequest, match=r"G from 1 to 4096 of the 7000 groups of table .*, not \[1, 4097\]"):
        validate.check_picked(table, request)
    fitting = replace(request, groups=groups[:, 1:], group_scores=torch.zeros(1, 4096))
    assert validate.check_picked(table, fitting) is not None
