"""Queries that are normalised, as the papers of product keys (arXiv 1907.05242) and PEER (2407.04153) have them."""

import math
from typing import Any, Literal

from torch import Tensor, nn

from mempool.errors import InvalidRequest

QueryNorm = Literal["rms", "batch", "layer"]


class NormedQuery(nn.Module):
    """From [..., dim] to queries [..., heads * key_dim], each component (batch) or each head's query (layer)
    normalised, with a learned gain and bias.

    Attributes:
        linear: Linear(dim, heads * key_dim).
        norm: BatchNorm1d(heads * key_dim), whose statistics are of all leading dimensions (of this rank, where several
            train: ``SyncBatchNorm.convert_sync_batchnorm`` has them of all), or LayerNorm(key_dim).
    """

    def __init__(self, dim: int, *, heads: int, key_dim: int, norm: str, bias: bool, made: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.key_dim = heads, key_dim
        self.linear = nn.Linear(dim, heads * key_dim, bias=bias, **made)
        self.norm: nn.Module = (
            nn.BatchNorm1d(heads * key_dim, **made) if norm == "batch" else nn.LayerNorm(key_dim, **made)
        )

    def forward(self, x: Tensor) -> Tensor:
        queries: Tensor = self.linear(x)
        shape = (*queries.shape[:-1], self.heads, self.key_dim)
        if not isinstance(self.norm, nn.LayerNorm):  # a SyncBatchNorm may have come in its place
            shape = (math.prod(queries.shape[:-1]), queries.shape[-1])
        normed: Tensor = self.norm(queries.reshape(shape))
        return normed.reshape(queries.shape)


def query_part(
    query: nn.Module | None,
    norm: bool | QueryNorm,
    dim: int,
    *,
    heads: int,
    key_dim: int,
    bias: bool,
    made: dict[str, Any],
) -> nn.Module:
    """The module from [..., dim] to [..., heads * key_dim]: the caller's, or one with that norm.

    Raises:
        InvalidRequest: An unknown norm, or one that is part of the module beside a module of the caller's.
    """
    if norm not in (True, False, "rms", "batch", "layer"):
        raise InvalidRequest(f'query_norm must be "rms" (or True), "batch", "layer" or False, got {norm!r}')
    own_norm = norm if norm in ("batch", "layer") else None
    if query is not None:
        if own_norm is not None:
            raise InvalidRequest(
                f"query_norm = {norm!r} comes with a query module of its own, and query is a {type(query).__name__}:"
                " put the norm into that, and leave query_norm out"
            )
        return query
    if own_norm is not None:
        return NormedQuery(dim, heads=heads, key_dim=key_dim, norm=own_norm, bias=bias, made=made)
    return nn.Linear(dim, heads * key_dim, bias=bias, **made)
