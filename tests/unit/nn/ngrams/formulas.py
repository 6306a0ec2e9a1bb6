"""The paper's formulas, one token after the other, in float64 and Python's integers: what modules must agree with."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mempool.nn import NgramMemory


def slots_of(memory: NgramMemory, tokens: Sequence[int]) -> list[list[int]]:
    """Of one sequence: by token, the slots of all heads of all orders."""
    lookup = memory.lookup
    ngrams, canonical = lookup.ngrams, lookup.canonical
    ids = [token if canonical is None else int(canonical[token]) for token in tokens]
    pad = int(lookup.state_dict()["pad"])
    found = []
    for at in range(len(ids)):
        row, offset = [], 0
        for order, primes in zip(ngrams.orders, ngrams.primes, strict=True):
            for head, prime in enumerate(primes):
                own = lookup.multipliers
                factors = own[0, 0] if own.shape[0] == 1 else own[list(ngrams.orders).index(order), head]
                mix = 0
                for back in range(order):
                    mix ^= (ids[at - back] if at >= back else pad) * int(factors[back])
                row.append(offset + mix % prime)
                offset += prime
        found.append(row)
    return found


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def output_of(memory: NgramMemory, parts: dict[str, Tensor], hidden: Tensor, tokens: Sequence[int]) -> Tensor:
    """Of one sequence.

    Args:
        parts: Parameters by name, and "rows" [slots, V], float64.
        hidden: [T, D] float64.
    """
    eps = float(memory.key_norm.eps or 0.0)
    gated = []
    for at, slots in enumerate(slots_of(memory, tokens)):
        read = torch.cat([parts["rows"][slot] for slot in slots])
        key = parts["key.weight"] @ read + parts.get("key.bias", torch.zeros(()))
        value = parts["value.weight"] @ read + parts.get("value.bias", torch.zeros(()))
        query = rms(hidden[at], parts["hidden_norm.weight"], eps)
        score = (query * rms(key, parts["key_norm.weight"], eps)).sum() / math.sqrt(memory.dim)
        if memory.gate == "signed_sqrt":
            score = torch.sign(score) * score.abs().sqrt()
        gated.append(torch.sigmoid(score) * value)
    if memory.conv is None:
        return torch.stack(gated)
    found = []
    for at, here in enumerate(gated):
        total = torch.zeros_like(here)
        for taps in range(memory.kernel_size):
            before = at - taps * memory.dilation
            if before >= 0:
                normed = rms(gated[before], parts["conv_norm.weight"], eps)
                total = total + parts["conv"][:, memory.kernel_size - 1 - taps] * normed
        found.append(here + total * torch.sigmoid(total))
    return torch.stack(found)
