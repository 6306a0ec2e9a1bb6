"""Pairs dealt to groups of pages on the CPU: counted in one pass, written in another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import Dealt, few_bags
from mempool.kernels.checking import check_offsets
from mempool.kernels.cpu.admission import ascends
from mempool.kernels.cpu.runtime import EMPTY_WEIGHTS, Array, kernel, serial, view

_few_bags = serial(few_bags)


@kernel
def _count(ids: Array, offsets: Array, group_of_page: Array, page_shift: int, groups: Array, starts: Array) -> bool:
    """The group of each pair, from 1; and where each group's pairs, bags and offsets are to begin."""
    if not ascends(offsets, ids.shape[0]):
        return False
    num_groups, num_pages, num_bags = starts.shape[1] - 1, np.uint64(group_of_page.shape[0]), offsets.shape[0] - 1
    counts, before, named = np.zeros((3, num_groups + 1), dtype=np.int64)
    for bag in range(num_bags):
        first, end = offsets[bag], offsets[bag + 1]
        for pair in range(np.uint64(first), np.uint64(end)):
            page = np.uint64(ids[pair] >> page_shift)
            group = np.uint16(group_of_page[page] + 1) if page < num_pages else np.uint16(0)
            groups[pair] = group
            counts[group] += 1
        if end - first > num_groups:
            for number in range(num_groups + 1):
                named[number] += counts[number] != before[number]
                before[number] = counts[number]
            continue
        for pair in range(first, end):
            group = groups[pair]
            named[group] += counts[group] != before[group]
            before[group] = counts[group]
    for number in range(num_groups):
        few = _few_bags(named[number + 1], num_bags)
        starts[0, number + 1] = starts[0, number] + counts[number + 1]
        starts[1, number + 1] = starts[1, number] + (named[number + 1] if few else 0)
        starts[2, number + 1] = starts[2, number] + (named[number + 1] if few else num_bags) + 1
    return True


@serial
def _deal_all(
    ids: Array,
    weights: Array,
    offsets: Array,
    groups: Array,
    starts: Array,
    own_ids: Array,
    own_weights: Array,
    positions: Array,
    own_offsets: Array,
) -> None:
    """As is usual: each pair is of a group, and each group has all bags. No choice is made for a pair."""
    num_groups, num_bags = starts.shape[1] - 1, offsets.shape[0] - 1
    places = np.zeros(num_groups + 1, dtype=np.int64)
    places[1:] = starts[0, :-1]
    for bag in range(num_bags):
        for number in range(num_groups):
            own_offsets[starts[2, number] + bag] = places[number + 1] - starts[0, number]
        first, end = np.uint64(offsets[bag]), np.uint64(offsets[bag + 1])
        if weights.shape[0] > 0:
            for pair in range(first, end):
                place = np.uint64(places[groups[pair]])
                places[groups[pair]] = place + 1
                own_ids[place], own_weights[place], positions[place] = ids[pair], weights[pair], pair
        else:
            for pair in range(first, end):
                place = np.uint64(places[groups[pair]])
                places[groups[pair]] = place + 1
                own_ids[place], positions[place] = ids[pair], pair
    for number in range(num_groups):
        own_offsets[starts[2, number] + num_bags] = starts[0, number + 1] - starts[0, number]


@kernel
def _deal(
    ids: Array,
    weights: Array,
    offsets: Array,
    groups: Array,
    starts: Array,
    own_ids: Array,
    own_weights: Array,
    positions: Array,
    bags: Array,
    own_offsets: Array,
) -> None:
    num_groups, num_bags = starts.shape[1] - 1, offsets.shape[0] - 1
    has_all = starts[2, num_groups] == num_groups * (num_bags + 1)
    if has_all and starts[0, num_groups] == ids.shape[0]:
        _deal_all(ids, weights, offsets, groups, starts, own_ids, own_weights, positions, own_offsets)
        return
    places, bag_places, offset_places = np.zeros((3, num_groups + 1), dtype=np.int64)  # the first of no group
    places[1:], bag_places[1:], offset_places[1:] = starts[0, :-1], starts[1, :-1], starts[2, :-1]
    last_bags = np.full(num_groups + 1, -1, dtype=np.int64)
    for bag in range(num_bags):
        for pair in range(np.uint64(offsets[bag]), np.uint64(offsets[bag + 1])):
            group = groups[pair]
            if group == 0:
                continue
            place = np.uint64(places[group])
            places[group] += 1
            own_ids[place] = ids[pair]
            positions[place] = pair
            if weights.shape[0] > 0:
                own_weights[place] = weights[pair]
            if last_bags[group] == bag:
                continue
            last_bags[group] = bag
            number = group - 1
            end = starts[2, number] + bag + 1  # where it has all bags, those without pairs before this one too
            if starts[1, number + 1] > starts[1, number]:
                bags[bag_places[group]] = bag
                bag_places[group] += 1
                end = offset_places[group] + 1
            for at in range(offset_places[group], end):
                own_offsets[at] = np.int64(place) - starts[0, number]
            offset_places[group] = end
    for number in range(num_groups):
        for at in range(offset_places[number + 1], starts[2, number + 1]):
            own_offsets[at] = starts[0, number + 1] - starts[0, number]


def deal_pairs(
    ids: Tensor, weights: Tensor | None, offsets: Tensor, group_of_page: Tensor, num_groups: int, page_shift: int
) -> Dealt:
    """See mempool.kernels.deal_pairs."""
    given, given_offsets = view(ids), view(offsets)
    groups, starts = np.empty(ids.shape[0], dtype=np.uint16), np.zeros((3, num_groups + 1), dtype=np.int64)
    if not _count(given, given_offsets, view(group_of_page), page_shift, groups, starts):
        check_offsets(offsets, ids.shape[0])
    pair_starts, bag_starts, offset_starts = starts.tolist()
    own_ids = torch.empty(pair_starts[-1], dtype=ids.dtype, device="cpu")
    positions = torch.empty(pair_starts[-1], dtype=torch.int64, device="cpu")
    bags = torch.empty(bag_starts[-1], dtype=torch.int64, device="cpu")
    own_offsets = torch.empty(offset_starts[-1], dtype=torch.int64, device="cpu")
    # Those of 16 bits are taken by position: a rare choice, for which nothing is compiled.
    here = weights is not None and weights.dtype == torch.float32
    own_weights = torch.empty(pair_starts[-1], dtype=torch.float32, device="cpu") if here else None
    _deal(
        given,
        view(weights) if weights is not None and here else EMPTY_WEIGHTS,
        given_offsets,
        groups,
        starts,
        own_ids.numpy(),
        EMPTY_WEIGHTS if own_weights is None else own_weights.numpy(),
        positions.numpy(),
        bags.numpy(),
        own_offsets.numpy(),
    )
    if weights is not None and own_weights is None:
        own_weights = weights[positions]
    return Dealt(
        ids=own_ids,
        weights=own_weights,
        positions=positions,
        bags=bags,
        offsets=own_offsets,
        starts=pair_starts,
        bag_starts=bag_starts,
        offset_starts=offset_starts,
    )
