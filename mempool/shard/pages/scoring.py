"""Candidates of a look-up among the keys on one shard: merged, filled up, and of tables whose values are keys, scored.

Legend: B bags, H heads or sections, K top-k, D key dim.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mempool import kernels
from mempool.types import OwnKeySpec

if TYPE_CHECKING:
    from mempool.shard.pages.storage import Storage


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
