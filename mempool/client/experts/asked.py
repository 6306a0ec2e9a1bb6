"""Rows that are experts, as they are asked for: what each shard is sent, and what its answers make together.

Legend: B bags, L pairs of all bags together, I columns of u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mempool.client.routing.plan import Part, merge_weight_grads
from mempool.types.bags import Act, Bags


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """What is asked of rows that are experts.

    Attributes:
        act: What an expert does to its product.
        inputs: [B, I] float32 or bfloat16 on the CPU, written to by nobody.
    """

    act: Act
    inputs: Tensor

    @property
    def input_dim(self) -> int:
        return self.inputs.shape[1]

    def inputs_of(self, part: Part, number: int, pieces: int) -> Tensor:
        """Those of one of so many messages' bags (as ``attempt.piece_of`` cuts them) of a part."""
        inputs = self.inputs if part.named is None else self.inputs.index_select(0, part.named)
        num_bags = part.bags.num_bags
        return inputs[num_bags * number // pieces : num_bags * (number + 1) // pieces]


def merge_bags(replies: Sequence[tuple[Part, Tensor]], *, num_bags: int, width: int) -> Tensor:
    """Sums [B, width] float32 of what shards answer for the bags that they have pairs of, in ascending order."""
    if len(replies) == 1 and replies[0][0].named is None:
        return replies[0][1].to(torch.float32)
    sums = torch.zeros(num_bags, width, dtype=torch.float32, device="cpu")
    for part, reply in replies:
        own = reply.to(torch.float32)
        if part.named is None:
            sums += own
        else:
            sums.index_add_(0, part.named, own)
    return sums


def merge_expert_grads(grads: Sequence[tuple[Part, Tensor]], bags: Bags, *, input_dim: int) -> Tensor:
    """d_weights [L] and behind them d_inputs [B * I], float32, from shards' [l + b * I]."""
    of_weights = [(part, grad[: part.bags.num_pairs]) for part, grad in grads]
    of_inputs = [(part, grad[part.bags.num_pairs :].reshape(-1, input_dim)) for part, grad in grads]
    weight_grad = merge_weight_grads(of_weights, num_pairs=bags.num_pairs)
    input_grad = merge_bags(of_inputs, num_bags=bags.num_bags, width=input_dim)
    return torch.cat([weight_grad, input_grad.reshape(-1)])
