"""Pairs dealt to groups of pages: each group's, in their order, whoever does it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, kernel_settings

from mempool import kernels

of_the_cpu = pytest.mark.skipif(INTERPRETED, reason="runs what the CPU has")

_GROUPS, _SHIFT = 3, 2
_PAGES = torch.tensor([2, -1, 0, 2, 1], dtype=torch.int16)
_SLOTS = st.integers(0, (_PAGES.shape[0] << _SHIFT) - 1)


@kernel_settings
@given(
    bags=st.lists(st.lists(_SLOTS, max_size=6), max_size=6) | st.lists(st.lists(_SLOTS, max_size=1), max_size=12),
    ids=st.sampled_from((torch.int64, torch.int32)),
    weights=st.sampled_from((None, torch.float32, torch.bfloat16)),
)
def test_each_group_has_its_pairs_in_their_order(under_test, bags, ids, weights):
    flat = torch.tensor([slot for bag in bags for slot in bag], dtype=ids)
    given_weights = None if weights is None else (torch.arange(flat.shape[0]) + 0.5).to(weights)
    offsets = torch.tensor([0, *torch.tensor([len(bag) for bag in bags], dtype=torch.int64).cumsum(0).tolist()])
    dealt = under_test.kernels.deal_pairs(flat, given_weights, offsets, _PAGES, _GROUPS, _SHIFT)
    assert dealt.ids.dtype == ids
    assert (dealt.bag_starts[0], dealt.bag_starts[-1]) == (0, dealt.bags.shape[0])
    assert (dealt.offset_starts[0], dealt.offset_starts[-1]) == (0, dealt.offsets.shape[0])
    for group in range(_GROUPS):
        mine = slice(dealt.starts[group], dealt.starts[group + 1])
        expected = [[slot for slot in bag if _PAGES[slot >> _SHIFT] == group] for bag in bags]
        assert dealt.ids[mine].tolist() == [slot for bag in expected for slot in bag]
        named = [number for number, bag in enumerate(expected) if bag]
        numbers = dealt.bags[dealt.bag_starts[group] : dealt.bag_starts[group + 1]].tolist()
        if len(named) >= 0.75 * len(bags):
            named = list(range(len(bags)))
            assert numbers == []
        else:
            assert numbers == named
        own_offsets = dealt.offsets[dealt.offset_starts[group] : dealt.offset_starts[group + 1]]
        assert own_offsets[0] == 0
        assert own_offsets.diff().tolist() == [len(expected[number]) for number in named]
        positions = dealt.positions[mine]
        assert positions.diff().min(dim=0).values > 0 if positions.shape[0] > 1 else True
        assert torch.equal(flat[positions], dealt.ids[mine])
        assert (
            dealt.weights is None
            if given_weights is None
            else torch.equal(dealt.weights[mine], given_weights[positions])
        )
    assert dealt.starts[0] == 0
    assert dealt.starts[-1] == dealt.ids.shape[0] == dealt.positions.shape[0]


@of_the_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(2, 1, dtype=torch.int64)}, "ids must be"),
        ({"ids": torch.zeros(2, dtype=torch.uint32)}, "ids must be"),
        ({"weights": torch.ones(3)}, r"weights must be \[2\]"),
        ({"weights": torch.ones(2, dtype=torch.float64)}, "weights must be"),
        ({"offsets": torch.tensor([0, 2], dtype=torch.int32)}, "offsets must be"),
        ({"offsets": torch.tensor([0, 3, 2])}, "offsets must not fall"),
        ({"offsets": torch.tensor([0, 1])}, "offsets must run from 0"),
        ({"group_of_page": torch.zeros(1, dtype=torch.int64)}, "group_of_page must be"),
        ({"num_groups": 2**15}, "num_groups below"),
        ({"ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "dealt on the CPU"),
    ],
)
def test_what_cannot_be_dealt_is_refused(changes, message):
    arguments = {
        "ids": torch.zeros(2, dtype=torch.int64),
        "weights": None,
        "offsets": torch.tensor([0, 2]),
        "group_of_page": torch.zeros(1, dtype=torch.int16),
        "num_groups": 1,
        "page_shift": 0,
    }
    with pytest.raises(ValueError, match=message):
        kernels.deal_pairs(**arguments | changes)
