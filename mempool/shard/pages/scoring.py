"""Candidates of a look-up among the keys on one shard: merged, filled up, and of tables whose values are keys, scored.

Legend: B bags, H heads or sections, K top-k, D key dim, G groups of a query.
"""

from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.pages.named_arrays import KEYS
from mempool.types import FlatKeySpec, OwnKeySpec, ProductKeySpec
from mempool.types.keys import Grouping, grouping_of

if TYPE_CHECKING:
    from mempool.shard.pages.storage import Storage

_CAUGHT_UP_AT_ONCE = 1 << 20
"""Slots."""


class Picked(NamedTuple):
    """The groups that queries look into. groups: [B, G] int64, ascending; scores: [B, G] float32, of those."""

    groups: Tensor
    scores: Tensor

    def some(self, first: int, end: int) -> Self:
        """Of some of the queries."""
        return type(self)(self.groups[first:end], self.scores[first:end])


def scored(storage: "Storage", queries_BHD: Tensor, topk: int, *, picked: Picked | None) -> tuple[Tensor, Tensor]:
    """See ``Storage.score``."""
    schema = storage.schema
    keys, grouping = schema.keys, grouping_of(schema.keys, schema.num_slots)
    if isinstance(keys, ProductKeySpec):
        return _score_heads(storage, keys, queries_BHD, topk)
    if isinstance(keys, OwnKeySpec) and grouping is None:
        return score_sections(storage, keys, queries_BHD, topk)
    queries = queries_BHD[:, 0].contiguous()
    if grouping is None:
        deterministic = not isinstance(keys, FlatKeySpec) or keys.deterministic
        scores, ids = _score_flat(storage, queries, topk, deterministic=deterministic)
    elif picked is None:
        scores, ids = score_groups(storage, grouping, queries, topk)
    else:
        scores, ids = score_in_groups(storage, grouping, queries, picked, topk)
    return scores.unsqueeze(1), ids.unsqueeze(1)


def _score_heads(storage: "Storage", keys: ProductKeySpec, queries_BHD: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    if not storage.heads:
        return no_candidates((queries_BHD.shape[0], 0, topk), storage.device)
    queries = queries_BHD[:, list(storage.heads)].contiguous()
    return kernels.product_topk(
        queries, storage.head_keys, topk, storage.schema.stride, deterministic=keys.deterministic
    )


def _score_flat(storage: "Storage", queries_BD: Tensor, topk: int, *, deterministic: bool) -> tuple[Tensor, Tensor]:
    """Of keys beside the values."""
    scores, ids = no_candidates((queries_BD.shape[0], 0), storage.device)
    for lane in storage.lanes:
        if lane.arena.has(KEYS):
            paged = lane.arena.paged(KEYS)
            found = kernels.flat_topk(queries_BD, paged, topk, storage.schema.num_slots, deterministic=deterministic)
            scores, ids = best(torch.cat((scores, found[0]), 1), torch.cat((ids, found[1]), 1), topk)
    return filled_up(scores, ids, topk)


def score_groups(storage: "Storage", grouping: Grouping, queries_BD: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The best groups whose keys are here: scores [B, K] float32 and numbers of groups [B, K] int64."""
    rows = torch.arange(grouping.groups, dtype=torch.int64, device=queries_BD.device) * grouping.pitch
    storage.catch_up(rows)
    scores, groups = no_candidates((queries_BD.shape[0], 0), queries_BD.device)
    for lane in storage.lanes:
        here, places = lane.arena.locate(rows)
        if not places.numel():
            continue
        numbers = here.nonzero()[:, 0]
        # Few beside the slots, and apart: they are brought together for the kernel.
        keys = kernels.Paged(
            rows=lane.arena.paged().rows[places],
            page_table=torch.zeros(1, dtype=torch.int32, device=queries_BD.device),
            page_shift=max(1, places.numel() - 1).bit_length(),
        )
        more, at = kernels.flat_topk(queries_BD, keys, min(topk, places.numel()), places.numel())
        at = torch.where(at < 0, at, numbers[at])
        scores, groups = best(torch.cat((scores, more), 1), torch.cat((groups, at), 1), topk)
    return filled_up(scores, groups, topk)


def score_in_groups(
    storage: "Storage", grouping: Grouping, queries_BD: Tensor, picked: Picked, topk: int
) -> tuple[Tensor, Tensor]:
    """The best slots of each query's groups, the group's score added: sums [B, K] float32 and slots [B, K] int64."""
    if storage.schedule is not None:
        first = torch.unique(picked.groups) * grouping.pitch + 1
        within = torch.arange(grouping.size, dtype=torch.int64, device=first.device)
        for some in torch.split(first, max(1, _CAUGHT_UP_AT_ONCE // grouping.size)):
            rows = (some[:, None] + within).view(-1)
            storage.catch_up(rows[rows < grouping.num_rows])
    sums, slots = no_candidates((queries_BD.shape[0], 0), queries_BD.device)
    for lane in storage.lanes:
        more, found = kernels.grouped_topk(
            queries_BD,
            lane.arena.paged(),
            picked.groups,
            picked.scores,
            topk,
            num_slots=grouping.num_slots,
            group_size=grouping.size,
            rows_before=1,
        )
        sums, slots = best(torch.cat((sums, more), 1), torch.cat((slots, found), 1), topk)
    return filled_up(sums, slots, topk)


def score_sections(storage: "Storage", keys: OwnKeySpec, queries_BHD: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The best values of each section for its query: scores [B, H, K] float32 and slot ids [B, H, K] int64.

    A score has the same bits whichever shard has the row. A dense optimizer's missed steps are done first.
    """
    storage.catch_up_all()
    schema, num_queries, device = storage.schema, queries_BHD.shape[0], queries_BHD.device
    slots, pages = schema.num_slots // keys.sections, schema.num_row_pages // keys.sections
    found = [no_candidates((num_queries, 0), device)] * keys.sections
    for lane in storage.lanes:  # gone through once: of a version that is read, lanes are made one by one
        paged = lane.arena.paged()
        for section, (scores, ids) in enumerate(found):
            part = paged.page_table[section * pages : (section + 1) * pages]
            if not bool((part >= 0).any()):
                continue
            rows = kernels.Paged(rows=paged.rows, page_table=part, page_shift=paged.page_shift)
            more, at = kernels.flat_topk(queries_BHD[:, section].contiguous(), rows, topk, keys.rows)
            at = torch.where(at < 0, at, at + section * slots)
            found[section] = best(torch.cat((scores, more), 1), torch.cat((ids, at), 1), topk)
    whole = [filled_up(scores, ids, topk) for scores, ids in found]
    return torch.stack([scores for scores, _ in whole], 1), torch.stack([ids for _, ids in whole], 1)


def best(scores_BK: Tensor, ids_BK: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The best ``topk`` candidates by (score descending, id ascending)."""
    by_id = ids_BK.argsort(dim=1, stable=True)
    order = by_id.gather(1, scores_BK.gather(1, by_id).argsort(dim=1, descending=True, stable=True))[:, :topk]
    return scores_BK.gather(1, order), ids_BK.gather(1, order)


def filled_up(scores_BK: Tensor, ids_BK: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """``topk`` candidates: after those that there are, none, of score -inf and id -1."""
    lacking = topk - scores_BK.shape[1]
    if lacking <= 0:
        return scores_BK, ids_BK
    scores, ids = no_candidates((scores_BK.shape[0], lacking), scores_BK.device)
    return torch.cat((scores_BK, scores), 1), torch.cat((ids_BK, ids), 1)


def no_candidates(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scores and ids of this shape where nothing was found."""
    scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
    return scores, torch.full(shape, -1, dtype=torch.int64, device=device)
