"""What one question costs each model, forward, counted by formula: a multiply and an add are two FLOPs.

The backward pass costs about twice the forward for either twin, so the comparison is the same for training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from facts.model import ModelSize
from facts.text import WORD_DIM


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one question.

    Attributes:
        matmul: in matrix products, which `torch.utils.flop_counter` sees as well.
        other: everything else: activations, norms, comparisons of a top-k (one each), the weighted sum of values.
    """

    matmul: int
    other: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.matmul + self.other

    def __add__(self, more: Flops) -> Flops:
        return Flops(self.matmul + more.matmul, self.other + more.other)


def memory_flops(size: ModelSize, *, codebook_size: int, value_dim: int, flat_keys: int = 0) -> Flops:
    """The memory layer: query, scores of half-keys, top-k, softmax, weighted sum on the shards, gate, output.

    The top-k is counted as it is defined: every half score and every one of the K * K candidate sums is compared once.

    Args:
        size: widths of the model.
        codebook_size: n half-keys in each codebook.
        value_dim: V.
        flat_keys: where there is a key for each slot in place of half-keys: how many.
    """
    queries = size.heads * size.key_dim
    pairs = size.heads * size.topk
    found = size.heads * flat_keys if flat_keys else 2 * size.heads * codebook_size + 2 * size.heads * size.topk**2
    return Flops(
        matmul=2 * size.dim * queries  # query projection
        + 2 * queries * (flat_keys or codebook_size)  # the keys; of two codebooks, each key_dim / 2 wide
        + 2 * size.dim * value_dim  # gate
        + 2 * value_dim * size.dim,  # output projection
        other=4 * queries  # batch norm of the query
        + found  # comparisons: every key; or the best half-keys, and the candidates' sums and their comparisons
        + 4 * pairs  # softmax: subtract, exp, add, divide
        + 2 * pairs * value_dim  # weighted sum
        + 5 * value_dim,  # silu(gate) * bag
    )


def dense_flops(size: ModelSize, *, hidden: int) -> Flops:
    """The dense twin: up, silu, down."""
    return Flops(matmul=2 * 2 * size.dim * hidden, other=4 * hidden)


def twin_hidden(size: ModelSize, memory: Flops) -> int:
    """The narrowest dense twin, in steps of 8, that costs at least what the memory layer does."""
    target = memory.total
    return 8 * math.ceil(target / dense_flops(size, hidden=8).total)


def shared_flops(size: ModelSize, *, num_words: int, num_outputs: int) -> Flops:
    """What both twins have: encoder, norms, residual sum, speller.

    Args:
        size: widths of the model.
        num_words: words of the question.
        num_outputs: answer positions times characters.
    """
    pooled = size.pools * WORD_DIM
    return Flops(
        matmul=2 * num_words * (WORD_DIM * size.score_dim + size.score_dim * size.pools)  # word scores
        + 2 * num_words * pooled  # weighted means
        + 2 * pooled * size.dim
        + 2 * size.dim * num_outputs,
        other=num_words * (size.score_dim + 6 * size.pools)  # tanh; rarity and softmax over the words
        + 2 * 8 * size.dim  # two layer norms
        + size.dim,  # residual sum
    )
