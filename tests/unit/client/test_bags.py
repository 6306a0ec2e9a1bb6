"""Checks of a caller's bags: what passes, and what each mistake is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import embedding_bag

from mempool.client.bags import checked_bags, own_copy, without_padding
from mempool.errors import InvalidRequest


def check(ids: object, weights: object = None, offsets: object = None) -> tuple[Tensor, Tensor | None, Tensor]:
    return checked_bags(ids, weights, offsets, num_slots=100, table="facts")  # type: ignore[arg-type]


def test_matrix_becomes_equal_bags() -> None:
    ids = torch.tensor([[5, 6, 7], [99, 0, 5]], dtype=torch.int32)
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    flat, flat_weights, offsets = check(ids, weights)
    assert flat.tolist() == [5, 6, 7, 99, 0, 5]
    assert flat.dtype == torch.int32
    assert offsets.tolist() == [0, 3, 6]
    assert flat_weights is not None
    assert torch.equal(flat_weights, weights.reshape(-1))
    assert flat_weights.requires_grad


def test_offsets_make_bags_of_any_length() -> None:
    ids, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 2, 3], dtype=torch.int32)
    flat, _, checked = check(ids, None, offsets)
    assert flat.tolist() == [1, 2, 3]
    assert checked.tolist() == [0, 0, 2, 3]
    assert checked.dtype == torch.int64


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_is_fine(shape: tuple[int, int]) -> None:
    flat, _, offsets = check(torch.zeros(shape, dtype=torch.int64))
    assert flat.numel() == 0
    assert offsets.tolist() == [0] * (shape[0] + 1)


@pytest.mark.parametrize(
    "ids", [torch.tensor([[1, 2]]), torch.tensor([[1], [2]]).expand(2, 3), torch.zeros(4, 4).long().t()]
)
def test_what_is_kept_is_the_callers_no_more(ids: Tensor) -> None:
    flat, _, _ = check(ids)
    expected = ids.reshape(-1).tolist()
    ids.untyped_storage().fill_(0)
    assert flat.tolist() == expected


def test_a_short_last_offset_is_told_what_torch_does_with_it() -> None:
    ids, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 3])
    with pytest.raises(InvalidRequest) as raised:
        check(ids, None, offsets)
    assert "leaves out the pairs from 3 on if include_last_offset=True: for that give ids[:3]" in str(raised.value)
    assert "the last bag has all the rest: for that append 4" in str(raised.value)
    values = torch.randn(100, 2)
    for last, ours in ((True, check(ids[:3], None, offsets)), (False, check(ids, None, torch.tensor([0, 2, 3, 4])))):
        torchs = embedding_bag(ids, values, offsets, mode="sum", include_last_offset=last)
        assert torch.equal(torchs, embedding_bag(ours[0], values, ours[2], mode="sum", include_last_offset=True))


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    padding_idx=st.integers(-6, 5),
    weighted=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_without_padding_is_torchs_padding_idx_gradients_and_all(
    lengths: list[int], seed: int, padding_idx: int, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (sum(lengths),), generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    weights = torch.randn(len(ids), generator=generator, requires_grad=True) if weighted else None
    values = torch.randn(6, 2, generator=generator, dtype=torch.float32)
    values[padding_idx] = torch.nan  # whatever it holds
    answers = []
    for ours in (True, False):
        table = values.clone().requires_grad_()
        if ours:
            kept, kept_weights, kept_offsets = without_padding(
                ids, weights, offsets, padding_idx=padding_idx, num_slots=6, table="facts"
            )
            pooled = embedding_bag(
                kept, table, kept_offsets, mode="sum", per_sample_weights=kept_weights, include_last_offset=True
            )
        else:
            pooled = embedding_bag(
                ids,
                table,
                offsets,
                mode="sum",
                per_sample_weights=weights,
                include_last_offset=True,
                padding_idx=padding_idx,
            )
        leaves = [table] if weights is None else [table, weights]
        answers.append([pooled, *torch.autograd.grad(pooled.square().sum(), leaves)])
    for mine, torchs in zip(*answers, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding_idx", [100, -101, 1.0, True, "1"])
def test_a_padding_that_is_no_slot_is_named(padding_idx: object) -> None:
    with pytest.raises(InvalidRequest, match=r"padding_idx = .* must be one of its 100 slots"):
        without_padding(torch.tensor([[1]]), None, None, padding_idx=padding_idx, num_slots=100, table="facts")


def test_own_copy_is_contiguous_detached_and_separate() -> None:
    source = torch.rand(3, 1, requires_grad=True).expand(3, 4)
    copy = own_copy(source, torch.float32)
    assert copy.is_contiguous()
    assert not copy.requires_grad
    assert torch.equal(copy, source)
    assert copy.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("ids", "weights", "offsets", "text"),
    [
        ([[1, 2]], None, None, "ids must be a torch.Tensor, not list"),
        (torch.zeros(1, 2), None, None, "ids must be of an integer dtype (int64), not torch.float32"),
        (torch.zeros(1, 2, dtype=torch.bool), None, None, "not torch.bool"),
        (torch.zeros(3, dtype=torch.long), None, None, "ids has shape [3]; give ids [B, L], or ids [L] with offsets"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, None, "ids has shape [1, 2, 3]"),
        (
            torch.tensor([[1, 2], [3, 100]]),
            None,
            None,
            "ids[1, 1] = 100 is outside table 'facts': it has 100 slots, 0 to 99",
        ),
        (torch.tensor([[1, -2]]), None, None, "ids[0, 1] = -2 is outside"),
        (torch.tensor([[1, 2]]), torch.ones(2), None, "weights has shape [2], ids has [1, 2]; they must agree"),
        (torch.tensor([[1, 2]]), torch.ones(1, 2).long(), None, "weights must be of a floating dtype, not torch.int64"),
        (torch.tensor([[1, 2]]), [[1.0, 2.0]], None, "weights must be a torch.Tensor, not list"),
        (torch.tensor([[1, 2]]), None, torch.tensor([0, 2]), "with offsets, ids must be [L] and offsets [B + 1]"),
        (torch.tensor([1, 2]), None, torch.tensor([[0, 2]]), "with offsets, ids must be [L]"),
        (torch.tensor([1, 2]), None, torch.tensor([0.0, 2.0]), "offsets must be of an integer dtype"),
        (
            torch.tensor([1, 2]),
            None,
            torch.tensor([0, 1]),
            "end with the number of pairs, 2; they begin with 0 and end with 1",
        ),
        (torch.tensor([1, 2]), None, torch.tensor([1, 2]), "they begin with 1"),
        (
            torch.tensor([1, 2]),
            None,
            torch.tensor([], dtype=torch.long),
            "offsets [B + 1]; they have shapes [2] and [0]",
        ),
        (torch.tensor([1, 2]), None, torch.tensor([0, 2, 1, 2]), "offsets[2] = 1 follows 2"),
        (torch.tensor([[1, 2]], device="meta"), None, None, "ids is on the meta device, and has no data to send"),
        (torch.tensor([[1, 2]]).to_sparse(), None, None, "ids is of layout torch.sparse_coo; give ids.to_dense()"),
        (torch.tensor([[1]]), torch.ones(1, 1, device="meta"), None, "weights is on the meta device"),
    ],
)
def test_mistakes_are_named_with_value_and_position(ids: object, weights: object, offsets: object, text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check(ids, weights, offsets)
    assert text in str(raised.value)
    assert "facts" in str(raised.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_told_how_bags_are_given(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.tensor([1]), torch.tensor([1, 2])], layout=layout)
    with pytest.raises(InvalidRequest, match=r"ids is a nested tensor; give its values\(\) and offsets\(\)"):
        check(nested, None, None)
