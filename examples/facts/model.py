"""The two models: the same encoder and the same speller around a memory layer, or around its dense twin.

What they cost is counted in `flops.py`, how they learn is in `train.py`.

Shape legend: B questions, W words, U distinct words of all questions, E word dim, P pools, D model dim, T answer
positions, C characters, H heads, K top-k, n half-keys, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mempool
from facts.text import WORD_DIM, AnswerSpelling, WordBook
from mempool import nn as memory_nn


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Widths of both models.

    Attributes:
        dim: width between the parts.
        pools: how many weighted means of its words stand for a question.
        score_dim: hidden width of the word scores.
        heads: queries of the memory layer.
        topk: slots a head looks up.
        key_dim: width of a query.
    """

    dim: int = 256
    pools: int = 4
    score_dim: int = 64
    heads: int = 4
    topk: int = 16
    key_dim: int = 128


FLAT = ModelSize(heads=1, topk=16)
"""With a key for each slot: one query."""


class QuestionEncoder(nn.Module):
    """Weighted means of the word vectors: half of the pools start at rare words (names), half at all words alike."""

    def __init__(self, word_book: WordBook, *, size: ModelSize) -> None:
        super().__init__()
        self.vectors = word_book.vectors  # [num_words + 1, E], fixed: plain tensors, not parameters
        self.log_weights = word_book.log_weights
        self.score = nn.Sequential(
            nn.Linear(WORD_DIM, size.score_dim), nn.Tanh(), nn.Linear(size.score_dim, size.pools)
        )
        self.rarity = nn.Parameter(torch.arange(size.pools).remainder(2).float())
        self.project = nn.Linear(size.pools * WORD_DIM, size.dim)

    def forward(self, words_BW: Tensor) -> Tensor:
        """[B, W] word numbers to [B, D]."""
        # A word is scored once, however often it is there.
        distinct_U, places_BW = torch.unique(words_BW, return_inverse=True)
        vectors_UE = self.vectors[distinct_U]
        rarity_UP = (self.log_weights[distinct_U, None] * self.rarity).masked_fill(distinct_U[:, None] == 0, -1e4)
        scores_BWP = F.embedding(places_BW, self.score(vectors_UE) + rarity_UP)
        vectors_BWE = F.embedding(places_BW, vectors_UE)
        pooled_BPE = scores_BWP.softmax(dim=1).transpose(1, 2) @ vectors_BWE
        projected: Tensor = self.project(pooled_BPE.flatten(1))
        return projected


class FactModel(nn.Module):
    """question -> encoder -> x + block(norm(x)) -> one softmax over the characters for each position of the answer.

    Attributes:
        block: what the twins differ in: a `mempool.nn.MemoryLayer`, or `DenseBlock`.
    """

    def __init__(self, word_book: WordBook, spelling: AnswerSpelling, *, block: nn.Module, size: ModelSize) -> None:
        super().__init__()
        self.encoder = QuestionEncoder(word_book, size=size)
        self.block_norm = nn.LayerNorm(size.dim)
        self.block = block
        self.spell_norm = nn.LayerNorm(size.dim)
        self.spell = nn.Linear(size.dim, spelling.num_positions * spelling.num_codes)
        self.num_codes = spelling.num_codes

    def forward(self, words_BW: Tensor) -> Tensor:
        """[B, W] word numbers to logits [B, T, C]."""
        x_BD = self.encoder(words_BW)
        x_BD = x_BD + self.block(self.block_norm(x_BD))
        logits: Tensor = self.spell(self.spell_norm(x_BD))
        return logits.view(len(logits), -1, self.num_codes)


class DenseBlock(nn.Module):
    """The twin of the memory layer: a feed-forward layer wide enough to cost at least as many FLOPs."""

    def __init__(self, dim: int, *, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_BD: Tensor) -> Tensor:
        """[B, D] to [B, D]."""
        out: Tensor = self.down(F.silu(self.up(x_BD)))
        return out


def memory_block(table: mempool.Table, *, size: ModelSize) -> memory_nn.MemoryLayer:
    """A Memory+ layer whose values live in the pool and whose keys and projections are this model's; or keys, too,
    where the table trains them.

    Batch norm behind the query projection, as in "Large Memory Layers with Product Keys" (arXiv 1907.05242, section
    4.5): it takes away what all questions share, so that they do not all look up the same slots.
    """
    keys: Literal["model", "pool"] = "pool" if table.trains_keys else "model"
    return memory_nn.MemoryLayer(
        size.dim, table=table, keys=keys, heads=size.heads, topk=size.topk, key_dim=size.key_dim, query_norm="batch"
    )


def spelling_loss(logits_BTC: Tensor, codes_BT: Tensor) -> Tensor:
    """Mean over the questions of the summed cross entropy of the answer's characters and its first END."""
    lengths_B1 = (codes_BT != 0).sum(dim=1, keepdim=True)
    counted_BT = torch.arange(codes_BT.shape[1]) <= lengths_B1
    total = F.cross_entropy(logits_BTC[counted_BT], codes_BT[counted_BT], reduction="sum")
    return total / codes_BT.shape[0]


def share_start(source: FactModel, target: FactModel) -> None:
    """Copies all parameters outside the blocks, so that the twins start alike."""
    shared = {name: value for name, value in source.state_dict().items() if not name.startswith("block.")}
    target.load_state_dict(shared, strict=False)
