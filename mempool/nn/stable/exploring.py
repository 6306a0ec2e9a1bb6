"""Choosing other slots than the best in training, so that more of a memory is used and trained.

Shape legend: B bags, H heads, K top-k, C candidates, P parts, N half-keys of a codebook, d their width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.nn.sizes import checked_dropout, checked_int

# Far below any score; sums of some of them are finite.
_DROPPED = -1e30


class Exploring(NamedTuple):
    """What a layer chooses in training.

    Attributes:
        key_dropout: Probability with which a half-key is left out of a call.
        sample_from: The best so many slots, of which top-k are sampled; None: the best are taken.
        random_slots: Slots beside these, any.
    """

    key_dropout: float = 0.0
    sample_from: int | None = None
    random_slots: int = 0


def checked_exploring(
    key_dropout: object, sample_from: object, random_slots: object, *, topk: int, num_slots: int
) -> Exploring:
    """Raises InvalidRequest for what makes no sense, or where there are not as many slots."""
    dropout = checked_dropout("key_dropout", key_dropout)
    candidates = None
    if sample_from is not None:
        candidates = checked_int("sample_from", sample_from)
        if not topk <= candidates <= num_slots:
            raise InvalidRequest(
                f"sample_from = {candidates} must be from topk = {topk} to the table's {num_slots} slots: of so many"
                " of the best, topk are sampled"
            )
    extra = checked_int("random_slots", random_slots, at_least=0)
    if topk + extra > num_slots:
        raise InvalidRequest(
            f"random_slots = {extra} beside topk = {topk} are more than the table's {num_slots} slots:"
            f" give at most {num_slots - topk}"
        )
    return Exploring(dropout, candidates, extra)


def kept_keys(count: int, num_slots: int, size: int, ways: int) -> tuple[int, int]:
    """How many half-keys of the first codebook, and of each other one, leave ``count`` slots, whichever they are.

    Args:
        count: At most ``num_slots``.
        num_slots: Of ``size ** ways`` products the first so many are slots.
    """
    whole = num_slots // size ** (ways - 1)  # first half-keys, all of whose products are slots
    least = 1
    while least < size and min(least, whole) * least ** (ways - 1) < count:
        least += 1
    return min(size, least + size - whole), least


def with_dropped_keys(
    queries_BHD: Tensor, keys_HPNd: Tensor, dropout: float, *, kept: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Queries [B, H, P * (d + 1)] and keys [H, P, N, d + 1] with the same scores, but for keys that no query picks.

    Each half-key is left out with probability ``dropout``, for all queries of the call.

    Args:
        kept: So many of the first codebook and of each other one stay in any case (``kept_keys``): a query that had to
            pick one that is left out would have no true score of it.
    """
    drawn = torch.rand(keys_HPNd.shape[:-1], device=keys_HPNd.device, dtype=torch.float32)
    dropped = drawn < dropout
    for codebooks, count in ((slice(0, 1), kept[0]), (slice(1, None), kept[1])):
        dropped[:, codebooks].scatter_(-1, drawn[:, codebooks].topk(count, dim=-1).indices, False)
    column = torch.zeros_like(keys_HPNd[..., :1]).masked_fill(dropped[..., None], _DROPPED)
    parts = queries_BHD.view(*queries_BHD.shape[:2], keys_HPNd.shape[1], keys_HPNd.shape[-1])  # of no query, too
    queries = torch.cat([parts, torch.ones_like(parts[..., :1])], dim=-1)
    return queries.flatten(2), torch.cat([keys_HPNd, column], dim=-1)


def sampled(scores_BHC: Tensor, ids_BHC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Some of the candidates, without replacement, with probabilities in the ratio of ``exp(score)``; in their order.

    By the Gumbel-top-k trick: the best of scores with Gumbel noise (arXiv 1903.06059).
    """
    noise = -torch.log(-torch.log(torch.rand_like(scores_BHC)))
    places = (scores_BHC.detach() + noise).topk(topk, dim=-1).indices.sort(dim=-1).values
    return scores_BHC.gather(-1, places), ids_BHC.gather(-1, places)


def other_slots(ids_BHK: Tensor, count: int, num_slots: int) -> Tensor:
    """Slots [B, H, count] of those that are not in ``ids_BHK``, distinct, each set of them as likely as any other.

    Args:
        ids_BHK: Distinct in each row.
        count: At most ``num_slots - K``.
    """
    others = num_slots - ids_BHK.shape[-1]
    found = ids_BHK.new_empty(*ids_BHK.shape[:-1], 0)
    for last in range(others - count, others):  # Floyd's algorithm, over the numbers of the other slots
        drawn = torch.randint(last + 1, (*ids_BHK.shape[:-1], 1), dtype=torch.int64, device=ids_BHK.device)
        again = (found == drawn).any(-1, keepdim=True)
        found = torch.cat([found, drawn.masked_fill(again, last)], dim=-1)
    # The slot with the number x among the others is x + the number of chosen slots before it.
    before = ids_BHK.sort(dim=-1).values - torch.arange(ids_BHK.shape[-1], dtype=torch.int64, device=ids_BHK.device)
    return found + torch.searchsorted(before, found, right=True)
