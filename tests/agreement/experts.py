"""PEER (arXiv 2407.04153) with local tensors, in plain words and torch's own autograd: what a PEERLayer agrees with."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.nn import PEERLayer

from .reference import all_rows

ACTS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class LocalExperts(nn.Module):
    """The same layer, with its own queries and keys, and all rows [slots, dim + out_dim] as a parameter.

    Args:
        layer: What it begins as.
        dtype: Of all of it.
    """

    def __init__(self, layer: PEERLayer, dtype: torch.dtype) -> None:
        super().__init__()
        assert layer.half_keys is not None
        self.query = copy.deepcopy(layer.query).to(dtype)
        self.half_keys = nn.Parameter(layer.half_keys.detach().to(dtype, copy=True))
        self.rows = nn.Parameter(all_rows(layer.table).to(dtype))
        self.dim, self.heads, self.topk = layer.dim, layer.heads, layer.topk
        self.act, self.scores = ACTS[layer.act], layer.scores

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim] -> [B, out_dim], by the scores of all slots."""
        queries = self.query(x).view(x.shape[0], self.heads, -1)
        first, second = queries.chunk(2, dim=-1)
        one = torch.einsum("bhd,hnd->bhn", first, self.half_keys[:, 0])
        other = torch.einsum("bhd,hnd->bhn", second, self.half_keys[:, 1])
        scores, ids = (one[..., :, None] + other[..., None, :]).flatten(-2).topk(self.topk, dim=-1)
        gates = torch.softmax(scores, dim=-1) if self.scores == "softmax" else torch.relu(scores)
        u, v = F.embedding(ids, self.rows, sparse=self.rows.dtype == torch.float32).split(
            [self.dim, self.rows.shape[1] - self.dim], dim=-1
        )
        answers = self.act(torch.einsum("bhki,bi->bhk", u, x))
        return torch.einsum("bhk,bhko->bo", gates * answers, v)
