"""A memory of several modalities in float64 and plain words: brute force over all slots, invisible ones at -inf.

Shape legend: B inputs, H heads, D key dim, N slots, V value dim.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mempool.nn import MultiModalMemory

from .reference import leaf, product_scores, rms_normalised


class LocalMemory:
    """Leaf copies of a memory's parameters, and of the values of each modality's table (one leaf where they share it).

    Args:
        memory: What it is the twin of.
        values: By modality [N, V].
        sees: By modality the slots it may choose; None: all.
    """

    def __init__(
        self, memory: MultiModalMemory, values: Mapping[str, Tensor], sees: Mapping[str, set[int]] | None = None
    ) -> None:
        self.memory = memory
        self.parameters = {name: leaf(parameter) for name, parameter in own_parameters(memory).items()}
        leaves = {id(each): leaf(each) for each in values.values()}
        self.values = {name: leaves[id(each)] for name, each in values.items()}
        self.sees = sees or {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def scores(self, x: Tensor, modality: str, of: str) -> Tensor:
        """Of every slot, [B, H, N]; -inf of those that are not seen."""
        memory, view = self.memory, self.memory.views[of]
        queries = self.linear(f"queries.{modality}", x).view(x.shape[0], memory.heads, memory.key_dim)
        shared = "keys.half_keys" in self.parameters
        keys = self.parameters["keys.half_keys" if shared else f"views.{of}.half_keys"]
        if view.qk_norm:
            parts = [rms_normalised(part) for part in queries.chunk(memory.ways, dim=-1)]
            queries, keys = torch.cat(parts, dim=-1) / memory.key_dim**0.5, rms_normalised(keys)
        scores = product_scores(queries, keys)
        offsets = self.parameters.get(f"views.{of}.search.offsets")
        if offsets is not None:
            every = torch.zeros(memory.heads, 1, dtype=torch.float64)
            for part in offsets.unbind(1):
                every = (every[:, :, None] + part[:, None, :]).flatten(1)
            scores = scores + every
        scores = scores[..., : view.table.num_slots]
        if of in self.sees:
            hidden = torch.tensor([slot not in self.sees[of] for slot in range(view.table.num_slots)])
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores

    def lookup(self, x: Tensor, modality: str, of: str) -> Tensor:
        view = self.memory.views[of]
        scores, ids = self.scores(x, modality, of).topk(view.topk, dim=-1)
        weights = torch.softmax(scores, dim=-1) if view.scores == "softmax" else torch.relu(scores)
        y = torch.einsum("bhk,bhkv->bv", weights, self.values[of][ids])
        if self.memory.gates is not None:
            y = y * nn.functional.silu(self.linear(f"gates.{modality}", x))
        return y if self.memory.out is None else self.linear("out", y)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        found = [self.lookup(x, name, name) for name, x in inputs.items()]
        if self.memory.fusion.fuse == "concat":
            return self.linear("fusion.join", torch.cat(found, dim=-1))
        if self.memory.fusion.fuse == "sum":
            return sum(found[1:], found[0])
        logits = torch.stack([self.linear(f"fusion.mix.{name}", x)[..., 0] for name, x in inputs.items()])
        shares = logits.exp() / logits.exp().sum(0)
        return (shares[..., None] * torch.stack(found)).sum(0)


def own_parameters(memory: MultiModalMemory) -> dict[str, nn.Parameter]:
    """All but those that stand for tables' values."""
    return {name: each for name, each in memory.named_parameters() if not name.endswith(".values")}
