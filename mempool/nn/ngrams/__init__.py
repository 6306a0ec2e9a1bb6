"""Hashed n-grams (Engram, arXiv 2601.07372): a token's last n tokens stand for slots of a table."""

from mempool.nn.ngrams.canonical import canonical_ids
from mempool.nn.ngrams.lookup import NgramLookup, NgramRows
from mempool.nn.ngrams.memory import NgramMemory
from mempool.nn.ngrams.sizes import Ngrams

__all__ = ["NgramLookup", "NgramMemory", "NgramRows", "Ngrams", "canonical_ids"]
