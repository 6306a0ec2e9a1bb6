"""Scoring slots in groups: the best of those groups that each query names, by the kernel of flat keys.

Legend: M queries, G groups of a query, K top-k, D key dim, P parts of a group (it may lie on several pages).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.checking import check_matrix
from mempool.kernels.dispatch.topk import flat_topk, select_topk

# Candidates held at once.
_CHUNK_CANDIDATES = 1 << 22


def grouped_topk(
    queries: Tensor,
    keys: Paged,
    groups: Tensor,
    group_scores: Tensor,
    k: int,
    *,
    num_slots: int,
    group_size: int,
    rows_before: int = 0,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k best slots in the groups of each query, by (sum descending, slot ascending), the sum being the float32 sum
    of a slot's score and its group's.

    Slots that are not here are left out. So the best of several parts of the keys, merged in that order, are the best
    of all, with the same bits.

    Args:
        queries: [M, D] float32.
        keys: [R, D] float32 or bfloat16.
        groups: [M, G] int64, ascending for each query; group g has the ``group_size`` slots from ``g * group_size`` on.
        group_scores: [M, G] float32.
        k: Winners of a query, at least 1.
        num_slots: The last group may have fewer.
        group_size: Slots of a group.
        rows_before: Ids of ``keys`` before each group's that are no slots of it.
        deterministic: As in flat_topk.

    Returns:
        Sums [M, k] float32 and slots [M, k] int64, best first, padded with -inf and -1 where there are fewer.
    """
    num_queries, num_groups = groups.shape
    check_matrix("queries", queries, (num_queries, keys.width), torch.float32, keys.rows.device)
    check_matrix("groups", groups, (num_queries, num_groups), torch.int64, keys.rows.device)
    check_matrix("group_scores", group_scores, (num_queries, num_groups), torch.float32, keys.rows.device)
    if min(k, group_size, num_slots, num_groups) < 1:
        raise ValueError(
            f"k, group_size, num_slots and groups of a query must be at least 1, got {k}, {group_size}, {num_slots}, "
            f"{num_groups}"
        )
    parts = _parts(keys, groups, num_slots, group_size, rows_before)
    search = _Search(keys, parts, group_size, k, deterministic=deterministic)
    return search.best(queries.detach(), groups, group_scores.detach())


class _Part(NamedTuple):
    """Slots of a group that lie side by side: the first one's arena row, its number, and how many they are."""

    row: int
    slot: int
    length: int


class _Search:
    def __init__(
        self, keys: Paged, parts: dict[int, list[_Part]], group_size: int, k: int, *, deterministic: bool
    ) -> None:
        self.keys, self.parts, self.k, self.deterministic = keys, parts, k, deterministic
        self.most_parts = max((len(each) for each in parts.values()), default=0) or 1
        self.longest = min(group_size, 1 << keys.page_shift)
        self.page = torch.zeros(1, dtype=torch.int32, device=keys.rows.device)

    def best(self, queries: Tensor, groups: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        num_queries = groups.shape[0]
        sums = torch.full((num_queries, self.k), -torch.inf, dtype=torch.float32, device=queries.device)
        slots = torch.full((num_queries, self.k), -1, dtype=torch.int64, device=queries.device)
        room = min(self.k + 1, self.longest)
        for part in self._chunks(num_queries, groups.shape[1], room):
            found = self._some(queries[part], groups[part], added[part], room)
            # Of a group its best by their own scores are candidates, one more than can win. Rounding makes equal sums
            # of scores that are not: where that one ties with the last winner, so may others with lower numbers.
            left_open = (found.left_out >= found.sums[:, -1]).nonzero()[:, 0]
            for some in self._chunks(len(left_open), groups.shape[1], self.longest) if len(left_open) else ():
                rows = left_open[some]
                whole = self._some(queries[part][rows], groups[part][rows], added[part][rows], self.longest)
                found.sums[rows], found.slots[rows] = whole.sums, whole.slots
            width = found.slots.shape[1]
            sums[part, :width] = found.sums.masked_fill(found.slots < 0, -torch.inf)
            slots[part, :width] = found.slots
        return sums, slots

    def _chunks(self, num_queries: int, num_groups: int, room: int) -> list[slice]:
        # A query is copied for each of its groups.
        size = max(1, _CHUNK_CANDIDATES // (num_groups * max(self.most_parts * room, self.keys.width)))
        return [slice(first, first + size) for first in range(0, num_queries, size)]

    def _some(self, queries: Tensor, groups: Tensor, added: Tensor, room: int) -> _Found:
        """The best of all groups, of each part ``room`` candidates."""
        columns = max(1, _CHUNK_CANDIDATES // (groups.shape[0] * max(self.most_parts * room, self.keys.width)))
        if columns >= groups.shape[1]:
            return self._candidates(queries, groups, added, room)
        found = _Found(added[:, :0], groups[:, :0], torch.full_like(added[:, 0], -torch.inf))
        for first in range(0, groups.shape[1], columns):
            part = slice(first, first + columns)
            more = self._candidates(queries, groups[:, part], added[:, part].contiguous(), room)
            sums, slots = torch.cat((found.sums, more.sums), dim=1), torch.cat((found.slots, more.slots), dim=1)
            slots, by_slot = slots.sort(dim=1)
            best, places = select_topk(sums.gather(1, by_slot), min(self.k, sums.shape[1]))
            found = _Found(best, slots.gather(1, places), torch.maximum(found.left_out, more.left_out))
        return found

    def _candidates(self, queries: Tensor, groups: Tensor, added: Tensor, room: int) -> _Found:
        num_queries, num_groups = groups.shape
        by_group, order = groups.flatten().sort(stable=True)
        distinct, counts = torch.unique_consecutive(by_group, return_counts=True)
        # All queries that name a group come to its keys together.
        own_queries = queries[order // num_groups]
        shape = (by_group.numel(), self.most_parts, room)
        scores = torch.full(shape, torch.nan, dtype=torch.float32, device=queries.device)
        slots = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
        named = [self.parts[group] for group in distinct.tolist()]
        first = 0
        for parts, count in zip(named, counts.tolist(), strict=True):
            part = slice(first, first + count)
            for number, own in enumerate(parts):
                taken = min(room, own.length)
                rows = self.keys.rows[own.row : own.row + own.length]
                paged = Paged(rows, self.page, max(1, own.length - 1).bit_length())
                best, places = flat_topk(own_queries[part], paged, taken, own.length, deterministic=self.deterministic)
                scores[part, number, :taken], slots[part, number, :taken] = best, places
            first += count
        first_slots, lengths = (
            torch.tensor([[part[field] for part in parts] + [0] * (self.most_parts - len(parts)) for parts in named])
            .to(queries.device)
            .repeat_interleave(counts, dim=0)
            for field in (1, 2)
        )
        is_missing, is_cut = slots < 0, lengths > room
        slots = (slots + first_slots[:, :, None]).masked_fill_(is_missing, -1)
        scores.masked_fill_(is_missing, torch.nan)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), dtype=torch.int64, device=order.device)
        sums = scores[back] + added.view(-1, 1, 1)
        last = sums[:, :, -1]
        highest = last.masked_fill(~is_cut[back] | last.isnan(), -torch.inf).view(num_queries, -1).amax(dim=1)
        # By their numbers, so that of equal sums the lowest comes first: groups ascend.
        slots, by_slot = slots[back].flatten(1).sort(dim=1)
        sums = sums.flatten(1).gather(1, by_slot).view(num_queries, -1)
        best, places = select_topk(sums, min(self.k, sums.shape[1]))
        return _Found(best, slots.view(num_queries, -1).gather(1, places), highest)


class _Found(NamedTuple):
    """Sums [M, up to K] and slots, best first, NaN and -1 where there are fewer; and [M] the highest sum that those of
    a group may have which are no candidates."""

    sums: Tensor
    slots: Tensor
    left_out: Tensor


def _parts(keys: Paged, groups: Tensor, num_slots: int, size: int, rows_before: int) -> dict[int, list[_Part]]:
    """Where the slots of every group that is named lie here, in order."""
    shift = keys.page_shift
    group = torch.unique(groups)
    first_slot = group * size
    first = group * (size + rows_before) + rows_before
    end = first + (num_slots - first_slot).clamp(max=size)
    pages = (first >> shift)[:, None] + torch.arange(((size - 1) >> shift) + 2, dtype=torch.int64, device=group.device)
    begins, ends = torch.maximum(pages << shift, first[:, None]), torch.minimum((pages + 1) << shift, end[:, None])
    arena_pages = keys.page_table[pages.clamp(max=keys.page_table.numel() - 1)].to(torch.int64)
    here = (arena_pages >= 0) & (begins < ends)
    rows = (arena_pages << shift) | (begins & ((1 << shift) - 1))
    slots = begins - first[:, None] + first_slot[:, None]
    places = here.nonzero()
    names = group[places[:, 0]].tolist()
    found: dict[int, list[_Part]] = {number: [] for number in group.tolist()}
    for name, row, slot, count in zip(
        names, rows[here].tolist(), slots[here].tolist(), (ends - begins)[here].tolist(), strict=True
    ):
        found[name].append(_Part(row, slot, count))
    return found
