"""Product-key scoring against brute force: exact ties, gradients, and what the graph keeps."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool import kernels
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


@pytest.mark.parametrize("implementation", ["numba", "torch"])
def test_gradients_equal_autograd_through_plain_operations(
    implementation: Literal["numba", "torch"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, one pair of topk calls after the other, as the paper's code does; under autocast too."""
    monkeypatch.setattr(kernels.dispatch.topk, "implementation_for", lambda _: kernels.implementation(implementation))
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(40, 3, 20, generator=generator)
    keys = torch.randn(3, 2, 30, 10, generator=generator)
    direction = torch.randn(40, 3, 16, generator=generator)
    doubles = [queries.double().requires_grad_(), keys.double().requires_grad_()]
    half_scores = [
        torch.einsum("bhd,hnd->bhn", half, doubles[1][:, number]) for number, half in enumerate(doubles[0].chunk(2, -1))
    ]
    (best1, index1), (best2, index2) = (torch.topk(scores, 16) for scores in half_scores)
    expected, place = torch.topk((best1[..., :, None] + best2[..., None, :]).flatten(-2), 16)
    expected_ids = index1.gather(-1, place // 16) * 30 + index2.gather(-1, place % 16)
    expected_grads = torch.autograd.grad(expected, doubles, direction.double())
    for autocast in (False, True):
        singles = [queries.clone().requires_grad_(), keys.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores, ids = product_topk(singles[0], singles[1], topk=16, stride=30)
            actual_grads = torch.autograd.grad(scores, singles, direction)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
        for actual, grad in zip(actual_grads, expected_grads, strict=True):
            torch.testing.assert_close(actual.double(), grad, rtol=1e-5, atol=1e-5)


def test_a_token_has_the_same_bits_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 2, 50, 24, generator=generator)
    queries = torch.randn(37, 2, 48, generator=generator).requires_grad_()
    direction = torch.randn(37, 2, 8, generator=generator)

    def scored(part: slice) -> list[Tensor]:
        scores, ids = product_topk(queries[part], keys, topk=8, stride=50)
        (grads,) = torch.autograd.grad(scores, queries, direction[part])
        return [scores.detach(), ids, grads[part]]

    whole = scored(slice(None))
    for first, end in ((0, 1), (36, 37), (5, 14), (1, 37)):
        part = scored(slice(first, end))
        assert all(torch.equal(one, of[first:end]) for one, of in zip(part, whole, strict=True))


def test_no_tokens_give_no_scores_and_gradients_of_zero() -> None:
    queries = torch.randn(0, 2, 8, requires_grad=True)
    keys = torch.randn(2, 2, 5, 4, requires_grad=True)
    scores, ids = product_topk(queries, keys, topk=3, stride=5)
    assert scores.shape == ids.shape == (0, 2, 3)
    query_grads, key_grads = torch.autograd.grad(scores.sum(), [queries, keys])
    assert query_grads.shape == queries.shape
    assert torch.equal(key_grads, torch.zeros_like(keys))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    queries = torch.randn(3, 1, 4, requires_grad=True)
    keys = torch.randn(1, 2, 5, 2, requires_grad=True)
    scores, _ = product_topk(queries, keys, topk=2, stride=5)
    (grads,) = torch.autograd.grad(scores.square().sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grads.sum().backward()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grads.sum(), queries, allow_unused=True)


def test_the_graph_keeps_no_half_scores() -> None:
    bags, heads, n, topk = 64, 2, 256, 4
    queries = torch.randn(bags, heads, 8, requires_grad=True)
    keys = torch.randn(heads, 2, n, 4, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
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
