"""The best slots of product keys, of the best half-keys of each part. Pure.

Legend: M queries of heads, C candidates of a part, K top-k, n half-keys of a codebook.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mempool import kernels


class Winners(NamedTuple):
    """The best of a part of the keys, or of several together, best first.

    Attributes:
        scores: [M, C] float32.
        ids: [M, C] int64, below ``worth``.
        worth: What an id of the parts before counts for.
    """

    scores: Tensor
    ids: Tensor
    worth: int


class Cut:
    """Slots that are no square: of the n * n products the last are none.

    Attributes:
        whole: Half-keys of the first part all of whose products are slots; the next one has ``rest``, others none.
    """

    def __init__(self, num_slots: int, size: int) -> None:
        self.whole, self.rest = divmod(num_slots, size)


def merged(lists: Sequence[Winners], topk: int) -> Winners:
    """The best sums of one of each, one list after the other."""
    found = lists[0]
    for other in lists[1:]:
        # By id, so that places are in the order of ids, which decides among equal sums.
        (scores1, ids1), (scores2, ids2) = _by_id(found), _by_id(other)
        at1, at2 = kernels.best_sums(scores1, scores2, min(topk, scores1.shape[1] * scores2.shape[1]))
        ids = ids1.gather(1, at1) * other.worth + ids2.gather(1, at2)
        found = Winners(scores1.gather(1, at1) + scores2.gather(1, at2), ids, found.worth * other.worth)
    return found


def best_of_cut(cut: Cut, firsts: Winners, seconds: Winners, topk: int) -> tuple[Winners, Tensor]:
    """The best products of two parts that are slots: of whole rows, and of the row that is cut, as two ranges.

    A product of the cut row with a half-key that is no candidate comes behind those of any better row with all that
    are. Only where no row is better, and too few candidates are left of the cut one, all half-keys are needed.

    Args:
        firsts, seconds: By score: the best ``topk`` and as many more as are cut off of the first part; or all.

    Returns:
        The winners, and [M] bool: those for which it takes all.
    """
    size, rows = seconds.worth, firsts.ids < cut.whole
    behind = (~rows).to(torch.int8).sort(dim=1, stable=True).indices[:, : min(topk, cut.whole)]
    whole = Winners(firsts.scores.gather(1, behind), firsts.ids.gather(1, behind), size)
    best = min(topk, size)
    found = merged([whole, Winners(seconds.scores[:, :best], seconds.ids[:, :best], size)], topk)
    none = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    if not cut.rest:
        return found, none
    is_cut, there = firsts.ids == cut.whole, seconds.ids < cut.rest
    has_cut = is_cut.any(dim=1)
    row_score = firsts.scores.masked_fill(~is_cut, -torch.inf).amax(dim=1)
    sums = (row_score[:, None] + seconds.scores).masked_fill(~(there & has_cut[:, None]), -torch.inf)
    scores, ids = torch.cat((found.scores, sums), dim=1), torch.cat((found.ids, seconds.ids + cut.whole * size), dim=1)
    by_id = ids.argsort(dim=1)
    scores, ids = scores.gather(1, by_id), ids.gather(1, by_id)
    best_scores, places = kernels.select_topk(scores, topk)
    first_row = is_cut.to(torch.int8).argmax(dim=1)
    is_best = has_cut & ~(
        rows & (torch.arange(rows.shape[1], dtype=torch.int64, device=rows.device) < first_row[:, None])
    ).any(dim=1)
    left_open = is_best & (there.sum(dim=1) < min(topk, cut.rest))
    return Winners(best_scores, ids.gather(1, places), size * size), left_open


def _by_id(found: Winners) -> tuple[Tensor, Tensor]:
    ids, order = found.ids.sort(dim=-1)
    return found.scores.gather(-1, order), ids
