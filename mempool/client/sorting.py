"""Pairs by the shards that need them: one counting sort for all shards whose row pages do not overlap.

Pure. Legend: P row pages, B bags, b those of a group, L pairs, l those of a group, G groups of row pages, R routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool import kernels
from mempool.types.bags import Bags

_MOST_GROUPS = 2**15 - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sorting:
    """Groups of row pages that do not overlap.

    Attributes:
        group_of_page: [P] int16; -1 for pages of none.
        num_groups: G.
    """

    group_of_page: Tensor
    num_groups: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sorted:
    """The pairs of one group, in their order.

    Attributes:
        bags: With the offsets of all bags, or of those alone that have any of these pairs, where they are few.
        named: [b] int64, the numbers of those, ascending; None where all.
        kept: [l] int64, the pairs' positions among all.
    """

    bags: Bags
    named: Tensor | None
    kept: Tensor


def sortings_of(masks: Sequence[Tensor | None]) -> tuple[tuple[Sorting, ...], tuple[tuple[int, int] | None, ...]]:
    """As few sortings as are found, and where in them each mask is: (sorting, group); None where there is no mask.

    Args:
        masks: Each [P] bool, the row pages that a shard needs.
    """
    found: list[npt.NDArray[np.int16]] = []
    counts: list[int] = []
    places: list[tuple[int, int] | None] = []
    known: dict[bytes, tuple[int, int]] = {}
    for mask in masks:
        if mask is None:
            places.append(None)
            continue
        pages = mask.numpy()
        key = np.packbits(pages).tobytes()
        if key not in known:
            number = next(
                (
                    number
                    for number, groups in enumerate(found)
                    if counts[number] < _MOST_GROUPS and not (groups[pages] >= 0).any()
                ),
                len(found),
            )
            if number == len(found):
                found.append(np.full(pages.shape[0], -1, np.int16))
                counts.append(0)
            found[number][pages] = counts[number]
            known[key] = number, counts[number]
            counts[number] += 1
        places.append(known[key])
    sortings = tuple(
        Sorting(group_of_page=torch.from_numpy(groups), num_groups=count)
        for groups, count in zip(found, counts, strict=True)
    )
    return sortings, tuple(places)


def sort_pairs(sorting: Sorting, bags: Bags, *, page_shift: int) -> list[Sorted]:
    """The pairs of each group."""
    num_groups = sorting.num_groups
    dealt = kernels.deal_pairs(
        bags.ids, bags.weights, bags.offsets, sorting.group_of_page, num_groups=num_groups, page_shift=page_shift
    )
    found = []
    for group in range(num_groups):
        begin, end = dealt.starts[group], dealt.starts[group + 1]
        weights = None if dealt.weights is None else dealt.weights[begin:end]
        offsets = dealt.offsets[dealt.offset_starts[group] : dealt.offset_starts[group + 1]]
        named = None
        if offsets.shape[0] < bags.offsets.shape[0]:
            named = dealt.bags[dealt.bag_starts[group] : dealt.bag_starts[group + 1]]
        part = Bags(ids=dealt.ids[begin:end], weights=weights, offsets=offsets)
        found.append(Sorted(bags=part, named=named, kept=dealt.positions[begin:end]))
    return found
