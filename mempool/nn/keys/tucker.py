"""Tucker scores of product keys: a trained interaction of the two halves (TDQKR of UltraMem, arXiv 2411.12364).

Shape legend: B bags, H heads, K top-k, D key dim, N half-keys of a codebook, R rank, d = D / 2 / R, m probes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mempool.client.keys.boxes import Box, boxes
from mempool.errors import InvalidRequest
from mempool.nn.keys.dots import dots, parts_of
from mempool.nn.keys.product import Found, alias, best_keys, best_of, some_of
from mempool.nn.scoring import unit_rms

# Scores of pairs held at once.
_CHUNK_SCORES = 1 << 22


class TuckerKeys(nn.Module):
    """Product keys whose halves multiply. Of each half of a query and each half-key, cut into ``rank`` parts::

        a[r, i1] = <r-th part of q1, r-th part of half_keys[h, 0, i1]>        b[r, i2] likewise of q2
        score(i1 * n + i2) = sum over r, s of a[r, i1] * core[h, r, s] * b[s, i2]

    The search is the paper's: the core's leading singular vectors (u, t) say which half-keys come into question, those
    with the largest sums of ``u[r] * a[r]`` and of ``t[s] * b[s]``, and all pairs of these get their exact scores.
    Those with the smallest sums come into question too: their products are as large, and which of both ends is
    the upper one is an accident of the singular vectors' signs. Of equal scores the lowest id is chosen.

    The core starts as ones, of rank 1: the product of both halves' scores, where a search that probes ``topk`` misses
    nothing of a positive score. How much a trained one makes it miss is what ``penalty`` holds down.

    Attributes:
        half_keys: Parameter [heads, 2, n, key_dim / 2].
        core: Parameter [heads, rank, rank].
        probes: Half-keys of each codebook at either end.

    Args:
        num_slots: At most n * n: products from here on are no slots.
        shape: Of ``half_keys``.
        rank: Parts of a half.
        probes: None: half of topk, so that about topk * topk pairs are scored.
        topk: Slots that will be asked for.
        qk_norm: Normalise each half-key to a root mean square of 1.
        made: device and dtype of the parameters.

    Raises:
        InvalidRequest: Sizes that do not fit each other.
    """

    def __init__(
        self,
        num_slots: int,
        shape: tuple[int, int, int, int],
        *,
        rank: int,
        probes: int | None,
        topk: int,
        qk_norm: bool,
        made: dict[str, Any],
    ) -> None:
        super().__init__()
        self.num_slots, self.probes, self.qk_norm = num_slots, (topk + 1) // 2 if probes is None else probes, qk_norm
        if 2 * self.probes < shape[2] and 2 * self.probes * (2 * self.probes - 1) < topk:
            raise InvalidRequest(
                f"probes = {probes}: pairs of {2 * self.probes} half-keys of each codebook are fewer than"
                f" topk = {topk}: give more, or none for {(topk + 1) // 2}"
            )
        self.half_keys = nn.Parameter(torch.empty(shape, **made))
        self.core = nn.Parameter(torch.empty(shape[0], rank, rank, **made))

    def draw(self, std: float) -> None:
        """New half-keys, N(0, std^2), and a core of ones."""
        nn.init.normal_(self.half_keys, std=std)
        nn.init.ones_(self.core)

    def scored_keys(self) -> Tensor:
        """The half-keys as they are scored, float32."""
        keys = self.half_keys.float()
        return unit_rms(keys) if self.qk_norm else keys

    def penalty(self, margin: float = 0.15) -> Tensor:
        """What the paper adds to the loss, times 0.001: singular values but the first, where they exceed a margin.

        The mean over heads of the mean over these of ``max(0, value - margin) ** 2``; differentiable.
        """
        others: Tensor = torch.linalg.svdvals(self.core.float())[:, 1:]
        return (others - margin).clamp_min(0.0).square().sum() / max(1, others.numel())

    def forward(self, queries_BHD: Tensor, topk: int, *, deterministic: bool = True) -> tuple[Tensor, Tensor]:
        """Scores [B, H, topk] float32, differentiable in queries, keys and core, and slot ids int64; best first."""
        keys, core = self.scored_keys(), self.core.float()
        index: Tensor = torch.ops.mempool.tucker_choice(
            queries_BHD.detach(), keys.detach(), core.detach(), self.num_slots, self.probes, topk, deterministic
        )
        return _scores(queries_BHD, keys, core, index), index[0] * keys.shape[2] + index[1]

    def scores_of(self, queries_BHD: Tensor, ids_BHK: Tensor) -> Tensor:
        """Scores [B, H, K] float32 of any slots, differentiable in queries, keys and core."""
        keys = self.scored_keys()
        return _scores(queries_BHD, keys, self.core.float(), torch.stack(parts_of(ids_BHK, 2, keys.shape[2])))

    @torch.no_grad()
    def exact(self, queries_BHD: Tensor, topk: int) -> Tensor:
        """Ids [B, H, topk] of the best of all slots, each of them scored; best first."""
        from mempool.kernels import select_topk

        keys, core = self.scored_keys(), self.core.float()
        size, rank = keys.shape[2], core.shape[-1]
        width = keys.shape[3] // rank
        queries = queries_BHD.reshape(*queries_BHD.shape[:2], 2, rank, width)
        rows, columns = torch.einsum("bhcrd,hcnrd->cbhrn", queries, keys.reshape(*keys.shape[:3], rank, width))
        weighed = _weighed(rows, core)
        scores = queries.new_empty(*queries_BHD.shape[:2], 0)
        ids = scores.to(torch.int64)
        chunk = max(1, _CHUNK_SCORES // max(1, size * scores.shape[:2].numel()))
        for first in range(0, size, chunk):
            grid = torch.einsum("bhri,bhrj->bhij", weighed[..., first : first + chunk], columns).flatten(2)
            own = torch.arange(first * size, first * size + grid.shape[-1], dtype=torch.int64, device=ids.device)
            there = own < self.num_slots
            if not there.any():
                break
            scores = torch.cat([scores, grid[..., there]], dim=-1)
            ids = torch.cat([ids, own[there].expand(*ids.shape[:2], -1)], dim=-1)
            best, places = select_topk(scores.flatten(0, 1), min(topk, scores.shape[-1]))
            scores = best.view(*ids.shape[:2], places.shape[1])
            ids = ids.gather(-1, places.view(scores.shape))
        return ids

    def extra_repr(self) -> str:
        return f"half_keys={list(self.half_keys.shape)}, rank={self.core.shape[-1]}, probes={self.probes}"


def _scores(queries_BHD: Tensor, keys_H2ND: Tensor, core_HRR: Tensor, index_2BHK: Tensor) -> Tensor:
    rows, columns = _parts(queries_BHD, keys_H2ND, core_HRR.shape[-1], index_2BHK).unbind(2)
    return (_weighed(rows, core_HRR) * columns).sum(2)


def _parts(queries_BHD: Tensor, keys_H2ND: Tensor, rank: int, index_2BHK: Tensor) -> Tensor:
    """Scores of each part of chosen half-keys: [B, H, 2, R, K]."""
    num_bags, num_heads, dim = queries_BHD.shape
    size, width = keys_H2ND.shape[2], dim // 2 // rank
    codebooks = torch.arange(2 * num_heads, dtype=torch.int64, device=index_2BHK.device).view(num_heads, 2, 1)
    places = index_2BHK.movedim(0, 2) + codebooks * size
    places = places[..., None, :] * rank + torch.arange(rank, dtype=torch.int64, device=places.device)[:, None]
    found = dots(queries_BHD.reshape(-1, width), keys_H2ND.reshape(-1, width), places.flatten(0, 3))
    return found.view(num_bags, num_heads, 2, rank, index_2BHK.shape[-1])


def _weighed(rows_BHRK: Tensor, core_HRR: Tensor) -> Tensor:
    """Sums over the first half's parts, of each part of the second: [B, H, R, K]. In the same order for any batch."""
    return (rows_BHRK[:, :, :, None] * core_HRR[..., None]).sum(2)


def _at_ends(queries_BD: Tensor, keys_ND: Tensor, probes: int, deterministic: bool) -> Tensor:
    """[B, 2 * probes] int64: the first and the last keys by (score descending, id ascending), in the order of ids.

    Of one order, so that where there are as many keys they are as many different ones, also where all scores are equal.
    """
    k = min(probes, keys_ND.shape[0])
    _, first = best_keys(queries_BD, keys_ND, k, deterministic=deterministic)
    _, last = best_keys(-queries_BD, keys_ND.flip(0), k, deterministic=deterministic)
    last = keys_ND.shape[0] - 1 - some_of(last)
    return torch.cat([some_of(first), last], dim=1).sort(dim=1).values


def _best_in(
    box: Box, queries: Tensor, keys: Tensor, core: Tensor, probes: int, topk: int, deterministic: bool
) -> Found:
    from mempool.kernels import select_topk

    num_bags, num_heads, _ = queries.shape
    rank = core.shape[-1]
    vectors = torch.linalg.svd(core.nan_to_num())
    leading = torch.stack([vectors.U[:, :, 0], vectors.Vh[:, 0]], dim=1)  # [H, 2, R]
    weighted = queries.reshape(num_bags, num_heads, 2, rank, keys.shape[3] // rank) * leading[..., None]
    ends = [
        torch.stack(
            [
                _at_ends(weighted[:, head, half].flatten(1), keys[head, half, first:end], probes, deterministic) + first
                for head in range(num_heads)
            ],
            dim=1,
        )
        for half, (first, end) in enumerate(box)
    ]
    width = max(each.shape[-1] for each in ends)
    index = torch.stack([nn.functional.pad(each, (0, width - each.shape[-1]), value=-1) for each in ends])
    repeated = index == index.roll(1, dims=-1)
    repeated[..., 0] = False
    scores = _parts(queries, keys, rank, index.clamp_min(0))
    scores = scores.masked_fill((repeated | (index < 0)).movedim(0, 2)[:, :, :, None], torch.nan)
    rows, columns = scores.unbind(2)
    weighed = _weighed(rows, core)[..., : ends[0].shape[-1]]
    columns = columns[..., : ends[1].shape[-1]]
    # Both lists ascend, so that places in the grid do with ids, and ties go by id.
    k = min(topk, weighed.shape[-1] * columns.shape[-1])
    best, places = queries.new_empty(num_bags, num_heads, k), index.new_empty(num_bags, num_heads, k)
    chunk = max(1, _CHUNK_SCORES // max(1, num_heads * rank * weighed.shape[-1] * columns.shape[-1]))
    for first in range(0, num_bags, chunk):
        part = slice(first, first + chunk)
        grid = (weighed[part, ..., :, None] * columns[part, ..., None, :]).sum(2)
        found = select_topk(grid.flatten(0, 1).flatten(1), k)
        best[part], places[part] = (each.view(grid.shape[0], num_heads, k) for each in found)
    columns_wide = columns.shape[-1]
    return Found(best, (ends[0].gather(-1, places // columns_wide), ends[1].gather(-1, places % columns_wide)))


@torch.library.custom_op("mempool::tucker_choice", mutates_args=())
def _choice_op(
    queries: Tensor, keys: Tensor, core: Tensor, num_slots: int, probes: int, topk: int, deterministic: bool
) -> Tensor:
    """Half-keys of both codebooks, [2, B, H, K] int64."""
    keys, size = alias(keys), keys.shape[2]
    with torch.autocast(queries.device.type, enabled=False):
        found = [
            _best_in(box, queries, keys, core, probes, topk, deterministic) for box in boxes(0, num_slots, size, ways=2)
        ]
        return torch.stack(best_of(found, topk, size).parts)


@_choice_op.register_fake
def _(
    queries: Tensor,
    keys: Tensor,  # noqa: ARG001
    core: Tensor,  # noqa: ARG001
    num_slots: int,  # noqa: ARG001
    probes: int,  # noqa: ARG001
    topk: int,
    deterministic: bool,  # noqa: ARG001
) -> Tensor:
    return queries.new_empty((2, *queries.shape[:2], topk), dtype=torch.int64)
