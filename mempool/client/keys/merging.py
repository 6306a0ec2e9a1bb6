"""The best slots of product keys, of the best half-keys of each part. Pure.

Legend: M queries of heads, C candidates of a part, K top-k, n half-keys of a codebook.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mempool import kernels
from mempool.client.keys.boxes import Box, Range, boxes, first_slot, pairs_of


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


def best_of_slots(lists: Sequence[Winners], num_slots: int, topk: int) -> tuple[Winners, Tensor]:
    """The best products of all parts that are slots, where the last products are none: box by box.

    A box may have half-keys that are no candidates; none of them is better than the last candidate. So it is known what
    no product of a box is better than: where ``topk`` slots before it are, the box is left out; and where products
    with such half-keys could be among the best, all half-keys are needed.

    Args:
        lists: Of each part, by (score descending, id ascending): the best ``topk``, and of the first part as many more
            as are not whole; or all.

    Returns:
        The winners, and [M] bool: those for which it takes all.
    """
    size, num_rows = lists[0].worth, len(lists[0].scores)
    rows = torch.arange(num_rows, dtype=torch.int64, device=lists[0].ids.device)
    found, lacking = None, []
    for box in boxes(0, num_slots, size, ways=len(lists)):
        pairs, first_id = pairs_of(box, size, topk), first_slot(box, size)
        most, most_lacking = _bounds(lists, box, pairs, topk)
        lacking.append((first_id, most_lacking))
        if found is None:
            found = _filled_up(_best_in(lists, box, pairs, topk), topk)
            continue
        some = rows[~_behind(found, most, first_id)]
        if len(some):
            best = _best_in([_of_rows(each, some) for each in lists], box, pairs, topk)
            found.scores[some], found.ids[some] = _best_of(_of_rows(found, some), best)
    assert found is not None, "there are slots"
    left_open = torch.zeros_like(rows, dtype=torch.bool)
    for first_id, most_lacking in lacking:
        left_open |= ~_behind(found, most_lacking, first_id)
    return found, left_open


def _best_in(lists: Sequence[Winners], box: Box, pairs: Sequence[slice], topk: int) -> Winners:
    """The best products in a box, of candidates alone."""
    own = [_within(each, range_, topk) for each, range_ in zip(lists, box, strict=True)]
    return merged([merged(own[parts], topk) for parts in pairs], topk)


def _bounds(lists: Sequence[Winners], box: Box, pairs: Sequence[slice], topk: int) -> tuple[Tensor, Tensor]:
    """Scores [M] that no product of a box is better than; and none with a half-key that is no candidate (-inf: there
    are none). Summed as products are, so that rounding changes no order."""
    known, lacking = [], []
    for each, (start, end) in zip(lists, box, strict=True):
        if end - start == each.worth:
            known.append(each.scores[:, 0])
            lacking.append(torch.full_like(known[-1], -torch.inf))
            continue
        there = (each.ids >= start) & (each.ids < end)
        known.append(each.scores.masked_fill(~there, -torch.inf).amax(dim=1))
        has_all = there.sum(dim=1) >= min(topk, end - start)
        lacking.append(each.scores[:, -1].masked_fill(has_all, -torch.inf))
    best = [torch.maximum(*both) for both in zip(known, lacking, strict=True)]
    each_lacking = [_summed([*best[:way], lacking[way], *best[way + 1 :]], pairs) for way in range(len(best))]
    return _summed(best, pairs), torch.stack(each_lacking).amax(dim=0)


def _summed(scores: Sequence[Tensor], pairs: Sequence[slice]) -> Tensor:
    """Sums of one score of each part."""
    return reduce(add, (reduce(add, scores[parts]) for parts in pairs))


def _behind(found: Winners, most: Tensor, first_id: int) -> Tensor:
    """[M] bool: whether slots from this one on, of at most such scores, come behind all that are found."""
    least, last = found.scores[:, -1], found.ids[:, -1]
    return (most < least) | ((most == least) & (last < first_id))


def _within(found: Winners, range_: Range, topk: int) -> Winners:
    """The best candidates in a range; where there are too few, -inf take their places."""
    (start, end), (scores, ids, worth) = range_, found
    count = min(topk, end - start)
    if end - start < worth:
        absent = (ids < start) | (ids >= end)
        places = absent.to(torch.int8).sort(dim=1, stable=True).indices[:, :count]
        scores = scores.gather(1, places).masked_fill(absent.gather(1, places), -torch.inf)
        ids = ids.gather(1, places).clamp(start, end - 1)
    return Winners(scores[:, :count], ids[:, :count], worth)


def _of_rows(found: Winners, rows: Tensor) -> Winners:
    return Winners(found.scores[rows], found.ids[rows], found.worth)


def _filled_up(found: Winners, count: int) -> Winners:
    """With -inf for those that it has too few of."""
    lacking = (0, count - found.ids.shape[1])
    return Winners(pad(found.scores, lacking, value=-torch.inf), pad(found.ids, lacking), found.worth)


def _best_of(found: Winners, other: Winners) -> tuple[Tensor, Tensor]:
    """The best of both, of which no slot is in both: as many as the first has."""
    scores, ids = (torch.cat(both, dim=1) for both in ((found.scores, other.scores), (found.ids, other.ids)))
    scores, ids = _by_id(Winners(scores, ids, found.worth))
    best, places = kernels.select_topk(scores, found.ids.shape[1])
    return best, ids.gather(1, places)


def _by_id(found: Winners) -> tuple[Tensor, Tensor]:
    ids, order = found.ids.sort(dim=-1)
    return found.scores.gather(-1, order), ids
