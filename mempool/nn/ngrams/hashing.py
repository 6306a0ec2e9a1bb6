"""From tokens to slots: canonical ids, the last n of them, and a hash for each head.

Hashed on the CPU, where ids are sent from. Legend: B batch, T tokens, O orders, H heads, N the longest order.
"""

import hashlib
from typing import Literal

import torch
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.nn.ngrams.packing import Places
from mempool.nn.ngrams.sizes import Ngrams

Multipliers = Literal["shared", "per_head"]

_LARGEST = 2**63 - 1


class NgramHash:
    """The hash of each order n and head k, of canonical ids c::

        mix = c[t] * m[0]  XOR  c[t - 1] * m[1]  XOR  ...  XOR  c[t - n + 1] * m[n - 1]
        id  = offset of (n, k) + mix modulo prime of (n, k)

    The multipliers m are odd, and small enough that no product overflows. Before a sequence's begin there is a pad.

    Args:
        ngrams: Orders, heads and primes.
        num_ids: Canonical ids that there are, without the pad.
        pad: The canonical id before a sequence's begin; ``num_ids`` for one that no token has.
        seed: Of the multipliers: the same on every machine.
        multipliers: "shared": by the token's distance alone, heads differ by their primes. "per_head": each head of
            each order has its own.

    Attributes:
        multipliers: [1, 1, N] or [O, H, N] int64 on the CPU.
        primes: [O, H] int64 on the CPU.
        pad: [1] int64 on the CPU.
    """

    def __init__(self, ngrams: Ngrams, *, num_ids: int, pad: int, seed: int, multipliers: Multipliers) -> None:
        self._orders = tuple(ngrams.orders)
        self.pad = torch.tensor([pad], dtype=torch.int64, device="cpu")
        longest = self._orders[-1]
        half = max(1, _LARGEST // (num_ids + 1) // 2)

        def drawn_for(order: int, head: int) -> list[int]:
            return [_drawn(seed, order, head, back) % half * 2 + 1 for back in range(longest)]

        orders, heads = (self._orders, ngrams.heads) if multipliers == "per_head" else ((0,), 1)
        drawn = [[drawn_for(order, head) for head in range(heads)] for order in orders]
        self.multipliers = torch.tensor(drawn, dtype=torch.int64, device="cpu")
        self.primes = torch.tensor(ngrams.primes, dtype=torch.int64, device="cpu")
        flat = self.primes.reshape(-1)
        self._offsets = (flat.cumsum(0) - flat).view_as(self.primes)

    def slots(self, ids: Tensor, places: Places) -> Tensor:
        """ids [B, T] int64 on the CPU, canonical -> slots [B, T, O * H] int64. Of padding they mean nothing."""
        orders, heads = self.primes.shape
        own = self.multipliers.shape[1]
        mixed = torch.zeros(*ids.shape, orders, own, dtype=torch.int64, device="cpu")
        for back in range(self._orders[-1]):
            first = sum(order <= back for order in self._orders)
            before = ids
            if back:
                before = self.pad.expand_as(ids).clone()
                before[:, back:] = torch.where(places.positions[:, back:] >= back, ids[:, :-back], self.pad)
            factors = self.multipliers[..., back].expand(orders, own)[first:]
            mixed[:, :, first:] ^= before[:, :, None, None] * factors
        return (mixed % self.primes + self._offsets).view(*ids.shape, orders * heads)


def _drawn(seed: int, order: int, head: int, back: int) -> int:
    text = f"{seed}/{order}/{head}/{back}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def checked_multipliers(multipliers: object) -> Multipliers:
    """Raises InvalidRequest for what is none of the names."""
    if multipliers == "shared":
        return "shared"
    if multipliers == "per_head":
        return "per_head"
    raise InvalidRequest(f'multipliers = {multipliers!r}: must be "shared" or "per_head"')
