"""Top-1 of each direction: of an item of one way, is the nearest of another way the same digit?

Beside it what linear models do on the same features: a logistic regression of each way, trained on the same items, and
of two ways the items whose probabilities of digits agree best.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from digits.data import Way
from digits.errors import needed
from digits.model import Towers

_PROBE_STEPS = 1000


class Direction(NamedTuple):
    """Items of ``asked`` looked for among those of ``found``; top-1 from 0 to 1.

    Attributes:
        questions: Items that ask.
        gallery: Items to be found among.
        top1: Of the towers with a memory between them.
        alone: Of towers without; None where there are none.
        probe: Of the linear probes.
        chance: What a draw by lot has.
    """

    asked: str
    found: str
    questions: int
    gallery: int
    top1: float
    alone: float | None
    probe: float
    chance: float


def directions(towers: Towers, ways: Mapping[str, Way], *, alone: Towers | None = None) -> list[Direction]:
    """All of them, of items that training never saw (of words: of all)."""
    embedded = embeddings(towers, ways)
    embedded_alone = None if alone is None else embeddings(alone, ways)
    probed = {name: probabilities(way) for name, way in ways.items()}
    found = []
    for one, other in permutations(ways, 2):
        asked, gallery = ways[one].asked.digits, ways[other].asked.digits
        found.append(
            Direction(
                asked=one,
                found=other,
                questions=len(asked),
                gallery=len(gallery),
                top1=top1(embedded[one] @ embedded[other].T, asked, gallery),
                alone=None
                if embedded_alone is None
                else top1(embedded_alone[one] @ embedded_alone[other].T, asked, gallery),
                probe=top1(probed[one] @ probed[other].T, asked, gallery),
                chance=float((asked[:, None] == gallery).double().mean()),
            )
        )
    return found


@torch.no_grad()
def embeddings(towers: Towers, ways: Mapping[str, Way]) -> dict[str, Tensor]:
    """Of all that is asked, of length 1."""
    towers.eval()
    found = {name: towers.embed(name, way.asked.features) for name, way in ways.items()}
    return {name: torch.nn.functional.normalize(each, dim=1) for name, each in found.items()}


def top1(similarity: Tensor, asked: Tensor, gallery: Tensor) -> float:
    """The part of rows [Q] whose best column [G] is of the same digit; of equal ones the first counts."""
    return float((gallery[similarity.argmax(1)] == asked).double().mean())


def probabilities(way: Way) -> Tensor:
    """A linear probe's of the digits of what is asked, [N, 10]."""
    regression = needed("sklearn.linear_model", "scikit-learn").LogisticRegression(max_iter=_PROBE_STEPS)
    regression.fit(way.trained.features.numpy(), way.trained.digits.numpy())
    return torch.from_numpy(regression.predict_proba(way.asked.features.numpy()))
