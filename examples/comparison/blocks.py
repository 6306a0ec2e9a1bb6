"""What the models differ in: their blocks, each as wide as one budget of FLOPs a token allows.

A model has `Sizes.depth` blocks. "dense" has feed-forward layers only; "moe" mixtures of experts; in "peer", "memory"
and "memory+1" the middle one is a layer of a pool, and in "memory+3" all are, of one table; "ngram" is dense with an
n-gram memory before its middle block.

Shape legend: D dim, E experts, H heads, K top-k, n half-keys of a codebook, V value dim, W width of n-grams' rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mempool
from facts.model import DenseBlock
from mempool import nn as memory_nn
from mempool import optim

KINDS = ("dense", "moe", "peer", "memory", "memory+1", "memory+3", "ngram")
WITH_TABLES = KINDS[2:]
BALANCE = 0.01
"""Factor of a balance loss, of experts or of keys."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths of all models.

    Attributes:
        dim: D, also of values.
        depth: blocks; odd, so that there is a middle one.
        slots: of the memory: a square. Experts of PEER are half as many (each is two rows wide), n-grams' slots as many
            as have the same number of parameters.
        heads, topk, key_dim: of a memory layer, and of PEER.
        experts: E of the mixture; two of them take each token.
        ngram_orders, ngram_heads, ngram_dim: of the n-gram memory; its rows are ngram_dim wide.
    """

    dim: int = 256
    depth: int = 3
    slots: int = 512**2
    heads: int = 4
    topk: int = 16
    key_dim: int = 128
    experts: int = 16
    ngram_orders: tuple[int, ...] = (2, 3)
    ngram_heads: int = 4
    ngram_dim: int = 32

    @property
    def middle(self) -> int:
        """The block that a memory takes the place of."""
        return self.depth // 2

    @property
    def peer_experts(self) -> int:
        """A square, about half of the slots."""
        return math.isqrt(self.slots // 2) ** 2

    @property
    def ngrams(self) -> memory_nn.Ngrams:
        """As many parameters as the values of the memory."""
        heads = len(self.ngram_orders) * self.ngram_heads
        return memory_nn.Ngrams(
            orders=self.ngram_orders,
            heads=self.ngram_heads,
            slots=max(2, self.slots * self.dim // self.ngram_dim // heads),
        )


def flops_of(part: str, sizes: Sizes, *, hidden: int = 0) -> float:
    """FLOPs of a block for one token, forward: a multiply and an add are two. Products and weighted sums are counted,
    and the top-k's comparisons; norms and activations are not.

    Args:
        part: "dense", "moe", "peer", "memory", "memory+" or "ngram".
        hidden: width of a feed-forward layer, or of an expert of a mixture.
    """
    dim, queries = sizes.dim, sizes.heads * sizes.key_dim
    chosen = sizes.heads * sizes.topk

    def found(slots: int) -> int:  # query projection, two codebooks each half as wide, candidates
        return 2 * dim * queries + 2 * queries * math.isqrt(slots) + 2 * sizes.heads * sizes.topk**2

    width = sizes.ngrams.columns * sizes.ngram_dim
    return {
        "dense": 4 * dim * hidden,
        "moe": 2 * 4 * dim * hidden + 2 * dim * sizes.experts,
        "peer": found(sizes.peer_experts) + 4 * chosen * dim,
        "memory": found(sizes.slots) + 2 * chosen * dim,
        "memory+": found(sizes.slots) + 2 * chosen * dim + 4 * dim * dim,
        "ngram": 4 * width * dim + 2 * dim + 8 * dim,
    }[part]


def flops_of_all(parts: Sequence[str], sizes: Sizes, *, hidden: int, ngram_tokens: float) -> float:
    """FLOPs of all blocks for one token, forward, with an n-gram memory that reads so many tokens for it."""
    return sum(flops_of(part, sizes, hidden=hidden) for part in parts) + ngram_tokens * flops_of("ngram", sizes)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a kind of model has, and what that costs.

    Attributes:
        parts: of each block its part, as `flops_of` names them.
        ngram_tokens: tokens that an n-gram memory reads for each token of the blocks; 0: there is none.
        hidden: of feed-forward layers and of experts.
        flops: of all blocks, for one token.
    """

    parts: tuple[str, ...]
    ngram_tokens: float
    hidden: int
    flops: float


def plan(kind: str, sizes: Sizes, *, ngram_tokens: float = 1.0) -> Plan:
    """Blocks that are as wide as the budget allows: that of "memory+3".

    Args:
        kind: of `KINDS`.
        sizes: of all models.
        ngram_tokens: as in `Plan`.

    Raises:
        ValueError: an unknown kind, or one that exceeds the budget without a feed-forward layer.
    """
    if kind not in KINDS:
        raise ValueError(f"model {kind!r} is none of {', '.join(KINDS)}")
    parts = ["moe" if kind == "moe" else "memory+" if kind == "memory+3" else "dense"] * sizes.depth
    if kind in ("peer", "memory", "memory+1"):
        parts[sizes.middle] = {"memory+1": "memory+"}.get(kind, kind)
    read = ngram_tokens if kind == "ngram" else 0.0
    budget = sizes.depth * flops_of("memory+", sizes)

    def total(hidden: int) -> float:
        return flops_of_all(parts, sizes, hidden=hidden, ngram_tokens=read)

    each = total(8) - total(0)
    hidden = 0 if not each else 8 * int((budget - total(0)) // each)
    if each and hidden < 8:
        raise ValueError(
            f"model {kind!r} costs {total(0):,.0f} FLOPs a token without its feed-forward layers, and the budget is"
            f" {budget:,.0f}: give larger sizes"
        )
    return Plan(tuple(parts), read, hidden, total(hidden))


class Mixture(nn.Module):
    """Two of E feed-forward experts for each token, weighted by a softmax over these two; Switch's balance loss.

    Attributes:
        extra_loss: of the last call, to be added to the loss.
    """

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(DenseBlock(dim, hidden=hidden) for _ in range(experts))
        self.extra_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        tokens = x.flatten(0, -2)
        scores = self.router(tokens)
        best, chosen = scores.topk(2, dim=-1)
        weights = best.softmax(dim=-1)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, rows, weights[rows, places, None] * expert(tokens[rows]))
        share = F.one_hot(chosen, len(self.experts)).float().mean(dim=(0, 1))
        self.extra_loss = BALANCE * len(self.experts) * (share * scores.softmax(dim=-1).mean(0)).sum()
        return y.view(x.shape)


class Memory(nn.Module):
    """A memory layer, and its balance loss where one is asked for.

    Attributes:
        extra_loss: of the last call, to be added to the loss; None without one.
    """

    def __init__(self, layer: memory_nn.MemoryLayer, *, balance: float = 0.0) -> None:
        super().__init__()
        self.layer, self.balance = layer, balance
        self.extra_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        y, lookup = self.layer(x, return_lookup=True)
        self.extra_loss = self.balance * self.layer.balance_loss(lookup) if self.balance else None
        out: Tensor = y
        return out


@dataclass(slots=True)
class Tables:
    """Makes the tables of one model, and drops them.

    Attributes:
        pool: where.
        name: of the model; tables' names begin with it.
        lr: learning rate of values.
        seed: of their start.
        made: all tables.
    """

    pool: mempool.Pool
    name: str
    lr: float
    seed: int = 0
    made: list[mempool.Table] = field(default_factory=list)

    def make(self, part: str, **options: Any) -> mempool.Table:
        """A table of the pool, trained by Adagrad."""
        config = mempool.TableConfig(
            name=f"{self.name}-{part}", optimizer=optim.Adagrad(lr=self.lr), seed=self.seed, **options
        )
        self.made.append(self.pool.create_table(config))
        return self.made[-1]

    def drop(self) -> None:
        """Give their memory back."""
        for table in self.made:
            self.pool.drop_table(table.name)
        self.made.clear()


class Blocks(nn.Module):
    """The blocks of a model, with the layer norms before them; what is around them is the model's.

    Attributes:
        plan: what they are.
        blocks, norms: one of each.
        ngram: before the middle block, or None.
    """

    def __init__(
        self,
        plan: Plan,
        sizes: Sizes,
        tables: Tables,
        *,
        vocabulary: int,
        options: Mapping[str, Any] | None = None,
        balance: float = 0.0,
    ) -> None:
        super().__init__()
        self.plan, self._middle = plan, sizes.middle
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.dim) for _ in plan.parts)
        makes: dict[str, Callable[[], nn.Module]] = {
            "dense": lambda: DenseBlock(sizes.dim, hidden=plan.hidden),
            "moe": lambda: Mixture(sizes.dim, plan.hidden, sizes.experts),
        }
        common: dict[str, Any] = {
            "heads": sizes.heads,
            "topk": sizes.topk,
            "key_dim": sizes.key_dim,
            "query_norm": "batch",
        }
        common |= options or {}
        if "peer" in plan.parts:
            experts = tables.make("experts", num_slots=sizes.peer_experts, value_dim=2 * sizes.dim, layout="rows")
            makes["peer"] = lambda: memory_nn.PEERLayer(sizes.dim, table=experts, **common)
        elif {"memory", "memory+"} & set(plan.parts):
            values = tables.make("values", num_slots=sizes.slots, value_dim=sizes.dim)
            makes["memory+"] = lambda: Memory(memory_nn.MemoryLayer(sizes.dim, table=values, **common), balance=balance)
            makes["memory"] = lambda: Memory(
                memory_nn.MemoryLayer(sizes.dim, table=values, gate="none", **common), balance=balance
            )
        self.blocks = nn.ModuleList(makes[part]() for part in plan.parts)
        self.ngram: memory_nn.NgramMemory | None = None
        if plan.ngram_tokens:
            rows = tables.make("ngrams", num_slots=sizes.ngrams.num_slots, value_dim=sizes.ngram_dim)
            lookup = memory_nn.NgramLookup(rows, sizes.ngrams, vocab_size=vocabulary)
            self.ngram = memory_nn.NgramMemory(sizes.dim, lookup)

    def before(self, number: int) -> memory_nn.NgramMemory | None:
        """What comes before a block."""
        return self.ngram if number == self._middle else None

    def forward(self, x: Tensor, number: int) -> Tensor:
        """What block ``number`` adds to [..., D]."""
        added: Tensor = self.blocks[number](self.norms[number](x))
        return added

    def extra_loss(self) -> Tensor | None:
        """Of all blocks, for the last call."""
        losses = [loss for block in self.blocks if (loss := getattr(block, "extra_loss", None)) is not None]
        return torch.stack(losses).sum() if losses else None

    def layers(self) -> list[memory_nn.MemoryLayer]:
        """The memory layers."""
        return [each for each in self.modules() if isinstance(each, memory_nn.MemoryLayer)]
