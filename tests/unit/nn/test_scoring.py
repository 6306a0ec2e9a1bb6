"""Product-key scoring against brute force: exact ties, gradients, and what the graph keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.nn.scoring import product_topk, unit_rms


def all_scores(queries: Tensor, keys: Tensor, stride: int) -> Tensor:
    """[B, H, N * stride]; -inf where no slot is."""
    first, second = queries.chunk(2, dim=-1)
    scores1 = torch.einsum("bhd,hnd->bhn", first, keys[:, 0])
    scores2 = torch.einsum("bhd,hnd->bhn", second, keys[:, 1])
    scores = scores1[..., :, None] + scores2[..., None, :]
    return torch.nn.functional.pad(scores, (0, stride - keys.shape[2]), value=-torch.inf).flatten(-2)


@settings(max_examples=60, deadline=None)
@given(
    bags=st.integers(0, 5),
    heads=st.integers(1, 3),
    n=st.integers(1, 9),
    half_dim=st.integers(1, 3),
    room=st.integers(0, 4),
    data=st.data(),
)
def test_choice_by_score_descending_then_id_ascending(
    bags: int, heads: int, n: int, half_dim: int, room: int, data: st.DataObject
) -> None:
    topk = data.draw(st.integers(1, n * n))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    # Whole numbers: sums are exact and ties are everywhere.
    queries = torch.randint(-2, 3, (bags, heads, 2 * half_dim), generator=generator).float()
    keys = torch.randint(-1, 2, (heads, 2, n, half_dim), generator=generator).float()
    scores, ids = product_topk(queries, keys, topk=topk, stride=n + room)
    best = torch.sort(all_scores(queries, keys, n + room), dim=-1, descending=True, stable=True)
    assert torch.equal(scores, best.values[..., :topk])
    assert torch.equal(ids, best.indices[..., :topk])


def test_gradients_flow_through_the_scores_of_what_was_chosen() -> None:
    torch.manual_seed(1)
    queries = torch.randn(6, 2, 8, requires_grad=True)
    keys = torch.randn(2, 2, 11, 4, requires_grad=True)
    scores, ids = product_topk(queries, keys, topk=7, stride=11)
    direction = torch.randn_like(scores)
    expected = all_scores(queries.double(), keys.double(), 11).gather(-1, ids)
    actual_grads = torch.autograd.grad(scores, [queries, keys], direction)
    expected_grads = torch.autograd.grad(expected, [queries, keys], direction.double())
    for actual, reference in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


def test_the_graph_keeps_no_half_scores() -> None:
    bags, heads, n, topk = 64, 2, 256, 4
    queries = torch.randn(bags, heads, 8, requires_grad=True)
    keys = torch.randn(heads, 2, n, 4, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        product_topk(queries, keys, topk=topk, stride=n)
    assert kept
    assert max(kept) < bags * heads * n


@pytest.mark.parametrize("width", [1, 3, 64])
def test_unit_rms_normalises_and_keeps_zero(width: int) -> None:
    vectors = torch.randn(5, width) * torch.tensor([[1e-2], [1.0], [30.0], [1e4], [0.0]])
    normalised = unit_rms(vectors)
    expected = vectors.double() / vectors.double().square().mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(normalised.double(), expected, rtol=1e-5, atol=1e-7)
    assert not normalised[-1].any()
