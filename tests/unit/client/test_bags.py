"""Checks of a caller's bags: what passes, and what each mistake is told."""

import pytest
import torch
from torch import Tensor

from mempool.client.bags import checked_bags, own_copy
from mempool.errors import InvalidRequest


def check(ids: object, weights: object = None, offsets: object = None) -> tuple[Tensor, Tensor | None, Tensor]:
    return checked_bags(ids, weights, offsets, num_slots=100, table="facts")  # type: ignore[arg-type]


def test_matrix_becomes_equal_bags() -> None:
    ids = torch.tensor([[5, 6, 7], [99, 0, 5]], dtype=torch.int32)
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    flat, flat_weights, offsets = check(ids, weights)
    assert flat.tolist() == [5, 6, 7, 99, 0, 5]
    assert flat.dtype == torch.int64
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
    ],
)
def test_mistakes_are_named_with_value_and_position(ids: object, weights: object, offsets: object, text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check(ids, weights, offsets)
    assert text in str(raised.value)
    assert "facts" in str(raised.value)
