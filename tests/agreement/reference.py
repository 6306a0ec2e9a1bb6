"""The paper's memory layer (arXiv 2412.09764, section 2) in float64 and plain words: brute force over all slots.

Shape legend: B bags, H heads, K top-k, D key dim, N half-keys of a codebook, V value dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mempool.client import Table
from mempool.nn import MemoryLayer


@dataclass
class Reference:
    """A float64 twin of a MemoryLayer: leaf copies of its parameters and of the values, all with gradients."""

    layer: MemoryLayer
    parameters: dict[str, Tensor]
    values: Tensor

    @classmethod
    def of(cls, layer: MemoryLayer, values: Tensor) -> "Reference":
        parameters = {name: leaf(parameter) for name, parameter in dense_parameters(layer).items()}
        return cls(layer, parameters, leaf(values))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])

    def queries(self, x: Tensor) -> Tensor:
        """[B, H, D]"""
        layer = self.layer
        queries = self.linear("query", x).view(x.shape[0], layer.heads, layer.key_dim)
        if layer.qk_norm:
            parts = [rms_normalised(part) for part in queries.chunk(layer.ways, dim=-1)]
            return torch.cat(parts, dim=-1) / layer.key_dim**0.5
        return rms_normalised(queries) if layer.query_norm else queries

    def all_scores(self, x: Tensor) -> Tensor:
        """Scores of every slot, [B, H, slots]."""
        keys = self.parameters["half_keys"]
        if self.layer.qk_norm:
            keys = rms_normalised(keys)
        return product_scores(self.queries(x), keys)[..., : self.layer.table.num_slots]

    def bags(self, x: Tensor) -> Tensor:
        """[B, V]"""
        scores, ids = self.all_scores(x).topk(self.layer.topk, dim=-1)
        weights = torch.softmax(scores, dim=-1)
        return torch.einsum("bhk,bhkv->bv", weights, self.values[ids])

    def __call__(self, x: Tensor) -> Tensor:
        """[B, dim] -> [B, dim]"""
        bags = self.bags(x)
        if self.layer.gate is not None:
            bags = bags * nn.functional.silu(self.linear("gate", x))
        return bags if self.layer.out is None else self.linear("out", bags)


def product_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores of all products of half-keys [H, P, N, D / P], the first one's slowest: [B, H, N ** P]."""
    scores = torch.zeros_like(queries[..., :1])
    for number, part in enumerate(queries.chunk(keys.shape[1], dim=-1)):
        own = torch.einsum("bhd,hnd->bhn", part, keys[:, number])
        scores = (scores[..., :, None] + own[..., None, :]).flatten(-2)
    return scores


def dense_parameters(layer: MemoryLayer) -> dict[str, nn.Parameter]:
    """All but the one that stands for the table's values."""
    return {name: parameter for name, parameter in layer.named_parameters() if name != "values"}


def rms_normalised(vectors: Tensor) -> Tensor:
    """Vectors of root mean square 1; 1e-6 keeps the zero vector at zero."""
    return vectors / (vectors.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def leaf(tensor: Tensor) -> Tensor:
    """A float64 copy that takes a gradient."""
    return tensor.detach().to(torch.float64, copy=True).requires_grad_(True)


def relative_error(actual: Tensor, expected: Tensor, *, floor: float = 1e-30) -> float:
    """Norm of the difference over the norm of what is expected, or over ``floor`` where that is larger.

    floor: For gradients that are small by cancellation (softmax), whose rounding errors are not.
    """
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm().clamp_min(floor))


def all_rows(table: Table) -> Tensor:
    """Every value of a table, [N, V] as stored."""
    return table.rows(torch.arange(table.num_slots))
