"""What a memory layer chose for its tokens, and how scores of chosen slots become weights.

Shape legend: H heads, K top-k.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mempool.errors import InvalidRequest

Scores = Literal["softmax", "relu"] | Callable[[Tensor], Tensor]


class MemoryLookup(NamedTuple):
    """The slots of every token, by (score descending, id ascending); those at random (``random_slots``) behind them.

    Attributes:
        ids: [..., H, K] int64.
        scores: [..., H, K] float32.
        weights: [..., H, K] float32; what the values are weighted with.
    """

    ids: Tensor
    scores: Tensor
    weights: Tensor

    def detached(self) -> "MemoryLookup":
        """Without its graph."""
        return MemoryLookup(*(part.detach() for part in self))


def checked_scores(scores: Scores) -> Scores:
    """Raises InvalidRequest for what is neither a name nor a function."""
    if scores in ("softmax", "relu") or callable(scores):
        return scores
    raise InvalidRequest(f'scores must be "softmax", "relu" or a function of scores [B, H, K], got {scores!r}')


def weights_of(scores_BHK: Tensor, scores: Scores, sink_H: Tensor | None = None) -> Tensor:
    """Weights [B, H, K] float32.

    Args:
        sink_H: Of a softmax, the score of a slot that has no value and takes part in each head's.

    Raises:
        InvalidRequest: A function of the caller's answered another shape.
    """
    if sink_H is not None:
        nowhere = sink_H.float()[:, None].expand(*scores_BHK.shape[:2], 1)
        return torch.softmax(torch.cat([scores_BHK, nowhere], dim=-1), dim=-1)[..., :-1]
    if scores == "softmax":
        return torch.softmax(scores_BHK, dim=-1)
    if scores == "relu":
        return torch.relu(scores_BHK)
    assert callable(scores)
    weights = scores(scores_BHK)
    if not isinstance(weights, Tensor):
        raise InvalidRequest(
            f"scores= must make a tensor of weights {list(scores_BHK.shape)}, got {type(weights).__name__}"
        )
    if weights.shape != scores_BHK.shape:
        raise InvalidRequest(
            f"scores= must make weights {list(scores_BHK.shape)} of scores of that shape, got {list(weights.shape)}"
        )
    return weights.float()
