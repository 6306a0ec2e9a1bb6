"""Queries that are normalised, as the paper of PEER has them."""

import math
from typing import Any, Literal

from torch import Tensor, nn

from mempool.errors import InvalidRequest

QueryNorm = Literal["batch", "layer", "none"]


class NormedQuery(nn.Module):
    """From [..., dim] to queries [..., heads * key_dim], each component (batch) or each head's query (layer)
    normalised, with a learned gain and bias.

    Attributes:
        linear: Linear(dim, heads * key_dim).
        norm: BatchNorm1d(heads * key_dim), whose statistics are of all leading dimensions (of this rank, where several
            train: ``SyncBatchNorm.convert_sync_batchnorm`` has them of all), or LayerNorm(key_dim).
    """

    def __init__(
        self, dim: int, *, heads: int, key_dim: int, norm: QueryNorm, bias: bool, made: dict[str, Any]
    ) -> None:
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
    norm: QueryNorm, dim: int, *, heads: int, key_dim: int, bias: bool, made: dict[str, Any]
) -> nn.Module | None:
    """The query module with that norm; None where it has none. Raises InvalidRequest for an unknown one."""
    if norm not in ("batch", "layer", "none"):
        raise InvalidRequest(f'query_norm must be "batch", "layer" or "none", got {norm!r}')
    return None if norm == "none" else NormedQuery(dim, heads=heads, key_dim=key_dim, norm=norm, bias=bias, made=made)
