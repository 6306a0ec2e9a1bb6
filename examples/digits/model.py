"""Three towers into one space, with one memory between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import mempool

EMBEDDING = 64
HIDDEN = 128
NUM_SLOTS = 64**2
VALUE_DIM = 64
_ROW = 64
_RESERVED_ROWS = 12


def table_config(name: str) -> mempool.TableConfig:
    """The table that all three ways share."""
    return mempool.TableConfig(
        name=name, num_slots=NUM_SLOTS, value_dim=VALUE_DIM, optimizer=mempool.optim.Adagrad(lr=0.05)
    )


class Towers(nn.Module):
    """An embedding of each way's features: ``head(h) + memory.lookup(h)`` of ``h = gelu(enter(features))``.

    Each way has some slots of its own; the others are all's. Without a table there is no memory, and only the head.

    Attributes:
        enter, head: Linear layers by way.
        memory: ``mempool.nn.MultiModalMemory``, or None.
        loss_of: ``mempool.nn.InfoNCE``.
    """

    memory: mempool.nn.MultiModalMemory | None

    def __init__(self, widths: Mapping[str, int], table: mempool.Table | None) -> None:
        super().__init__()
        self.enter = nn.ModuleDict({name: nn.Linear(width, HIDDEN) for name, width in widths.items()})
        self.head = nn.ModuleDict({name: nn.Linear(HIDDEN, EMBEDDING) for name in widths})
        self.memory = None if table is None else memory_between(list(widths), table)
        self.loss_of = mempool.nn.InfoNCE(temperature=0.2)

    def embed(self, way: str, features: Tensor) -> Tensor:
        """[B, width] -> [B, EMBEDDING]."""
        hidden = nn.functional.gelu(self.enter[way](features))
        embedding: Tensor = self.head[way](hidden)
        if self.memory is None:
            return embedding
        found = self.memory.lookup(hidden, modality=way)
        assert isinstance(found, Tensor)
        return embedding + found

    def loss(self, batch: Mapping[str, Tensor], digits: Tensor) -> Tensor:
        """The mean of InfoNCE over all pairs of ways; pairs of one digit are right answers to each other."""
        embeddings = [self.embed(way, features) for way, features in batch.items()]
        pairs = [(a, b) for place, a in enumerate(embeddings) for b in embeddings[:place]]
        return torch.stack([self.loss_of(a, b, digits) for a, b in pairs]).mean()


def memory_between(ways: Sequence[str], table: mempool.Table) -> mempool.nn.MultiModalMemory:
    """One memory of them all, some of its slots reserved for each."""
    own = _RESERVED_ROWS * _ROW
    return mempool.nn.MultiModalMemory(
        dict.fromkeys(ways, HIDDEN),
        table=table,
        reserved={name: range(place * own, (place + 1) * own) for place, name in enumerate(ways)},
        heads=2,
        topk=16,
        key_dim=32,
        out_dim=EMBEDDING,
        qk_norm=True,
    )
