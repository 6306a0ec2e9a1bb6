"""InfoNCE against its formula in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.nn import InfoNCE
from tests.agreement.reference import leaf, relative_error


def formula(a: Tensor, b: Tensor, log_scale: Tensor, labels: list[int]) -> Tensor:
    """One pair after another."""
    ours, theirs = (each / each.norm(dim=1, keepdim=True) for each in (a, b))
    logits = log_scale.exp() * ours @ theirs.T
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(labels):
        right = [j for j, other in enumerate(labels) if other == label]
        for row in (logits[i], logits[:, i]):
            total = total - (row[right] - row.logsumexp(0)).mean()
    return total / (2 * len(labels))


@pytest.mark.parametrize("labels", [None, [3, 1, 3, 0, 3, 1]])
def test_loss_and_gradients_are_those_of_the_formula(labels: list[int] | None) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss_of = InfoNCE(temperature=0.2)
    a64, b64, scale64 = leaf(a), leaf(b), leaf(loss_of.log_scale)
    expected = formula(a64, b64, scale64, list(range(6)) if labels is None else labels)
    loss = loss_of(a, b, None if labels is None else torch.tensor(labels))
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-6
    loss.backward()
    expected.backward()
    for ours, theirs in ((a, a64), (b, b64), (loss_of.log_scale, scale64)):
        assert relative_error(ours.grad, theirs.grad) < 3e-6


def test_the_scale_is_clamped_and_comes_back() -> None:
    loss_of = InfoNCE(temperature=0.5, max_scale=10.0)
    a = torch.eye(3)
    with torch.no_grad():
        loss_of.log_scale.fill_(50.0)
    loss_of.eval()(a, a)
    assert float(loss_of.log_scale.detach()) == 50.0, "nobody who evaluates changes a model"
    right, wrong = loss_of.train()(a, a), loss_of(a, a.roll(1, 0))
    assert float(loss_of.log_scale.detach()) == pytest.approx(math.log(10.0))
    (of_wrong,) = torch.autograd.grad(wrong, loss_of.log_scale)
    assert of_wrong > 0
    torch.optim.SGD(loss_of.parameters(), lr=0.1).step()
    right.backward()
    assert loss_of.log_scale.grad < 0
    with torch.no_grad():
        loss_of.log_scale.fill_(-3.0)
    loss_of(a, a)
    assert float(loss_of.log_scale.detach()) == 0.0


def test_under_autocast_it_is_float32() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    loss_of = InfoNCE()
    expected = loss_of(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of(a, b), expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(3, 5)), r"got \[3, 4\] and \[3, 5\]"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), r"two \[B, D\]"),
        ((torch.zeros(0, 4), torch.zeros(0, 4)), "at least 1"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)), r"labels must be integers \[3\]"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3)), "labels must be integers"),
    ],
)
def test_senseless_pairs_are_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        InfoNCE()(*args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature = 0.0 must be from 1 / max_scale = 0.01 to 1"),
        ({"temperature": 2.0}, "temperature = 2.0"),
        ({"temperature": "warm"}, "temperature = 'warm'"),
        ({"max_scale": 0.5}, "max_scale = 0.5 must be a finite number of at least 1"),
        ({"max_scale": math.inf}, "max_scale = inf"),
    ],
)
def test_senseless_scales_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        InfoNCE(**options)
