"""The keys of one table that several modalities look up in, as each of them sees it.

Shape legend: B bags, H heads, K top-k, P parts of a query ("ways"), N half-keys of a codebook, d width of a part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mempool.client import Table
from mempool.client.keys.boxes import Range
from mempool.nn.choice import Scores
from mempool.nn.keys.options import KeyOptions
from mempool.nn.layer import MemoryLayer
from mempool.nn.scoring import product_topk, unit_rms


class Codebooks(nn.Module):
    """Half-keys that all modalities share.

    Attributes:
        half_keys: Parameter [heads, ways, n, key_dim / ways].
    """

    def __init__(self, shape: Sequence[int], *, qk_norm: bool, made: dict[str, Any]) -> None:
        super().__init__()
        self.qk_norm = qk_norm
        self.half_keys = nn.Parameter(torch.empty(tuple(shape), **made))

    def scored(self) -> Tensor:
        """As they are scored, float32."""
        keys = self.half_keys.float()
        return unit_rms(keys) if self.qk_norm else keys

    def draw(self, std: float) -> None:
        """New ones, N(0, std^2)."""
        nn.init.normal_(self.half_keys, std=std)


class SeenKeys(nn.Module):
    """Shared codebooks with what is of one modality: an offset of each half-key, and the slots that it sees.

    Attributes:
        offsets: Parameter [heads, ways, n], zeros at first; None without.
        ranges: (first, end) of slots, ascending.

    Args:
        codebooks: Not a part of this module: who has it has its parameters.
    """

    offsets: nn.Parameter | None

    def __init__(
        self, codebooks: Codebooks, ranges: Sequence[Range], *, with_offsets: bool, made: dict[str, Any]
    ) -> None:
        super().__init__()
        self._codebooks = (codebooks,)  # in a tuple, torch does not take it for a submodule
        self.ranges = tuple(ranges)
        shape = codebooks.half_keys.shape[:3]
        self.offsets = nn.Parameter(torch.zeros(shape, **made)) if with_offsets else None

    def scored(self) -> Tensor:
        """[H, P, N, d] float32; with offsets [H, P, N, d + 1], in the last column."""
        keys = self._codebooks[0].scored()
        return keys if self.offsets is None else torch.cat([keys, self.offsets.float()[..., None]], dim=-1)

    def forward(self, queries_BHD: Tensor, topk: int, *, deterministic: bool = True) -> tuple[Tensor, Tensor]:
        """Scores [B, H, topk] float32, differentiable in queries, half-keys and offsets, and ids int64; best first."""
        keys = self.scored()
        ways, size = keys.shape[1:3]
        if self.offsets is not None:
            parts = queries_BHD.view(*queries_BHD.shape[:2], ways, queries_BHD.shape[2] // ways)
            queries_BHD = torch.cat([parts, torch.ones_like(parts[..., :1])], dim=-1).flatten(2)
        scores, ids = product_topk(
            queries_BHD, keys, topk=topk, stride=size, deterministic=deterministic, ranges=self.ranges
        )
        return scores, ids

    def extra_repr(self) -> str:
        return f"slots={', '.join(f'{first}:{end}' for first, end in self.ranges)}, offsets={self.offsets is not None}"


class MemoryView(MemoryLayer):
    """A table as one modality sees it: from queries of any modality [..., heads * key_dim] to sums of values
    [..., value_dim]. A ``MemoryLayer`` in all but whose its keys are.

    Attributes:
        search: ``SeenKeys``; the half-keys are those of the codebooks that it was given.
    """

    def __init__(
        self,
        table: Table,
        codebooks: Codebooks,
        ranges: Sequence[Range],
        *,
        topk: int,
        scores: Scores,
        qk_norm: bool,
        query_norm: bool,
        query_dropout: float,
        with_offsets: bool,
        deterministic: bool,
        made: dict[str, Any],
    ) -> None:
        heads, ways, _, width = codebooks.half_keys.shape
        super().__init__(
            heads * ways * width,
            table=table,
            heads=heads,
            key_dim=ways * width,
            ways=ways,
            topk=topk,
            query=nn.Identity(),
            gate="none",
            out="none",
            out_dim=table.value_dim,
            scores=scores,
            qk_norm=qk_norm,
            query_norm=query_norm,
            query_dropout=query_dropout,
            deterministic=deterministic,
            **made,
        )
        self.search = SeenKeys(codebooks, ranges, with_offsets=with_offsets, made=made)

    def _make_keys(self, options: KeyOptions, made: dict[str, Any]) -> None:  # noqa: ARG002
        self.search, self.half_keys = None, None

    def reset_parameters(self) -> None:
        """Offsets of zero. The half-keys, which are not of this view alone, stay."""
        if isinstance(self.search, SeenKeys) and self.search.offsets is not None:
            nn.init.zeros_(self.search.offsets)

    def scoring_keys(self) -> Tensor:
        """[heads, ways, n, key_dim / ways] float32; with offsets a last column more, which every query meets with 1."""
        assert isinstance(self.search, SeenKeys)
        return self.search.scored()
