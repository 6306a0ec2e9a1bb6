"""How often each head of a layer chose which slots, as its own process has seen it."""

from mempool.nn.usage.counts import HeadCounts, LayerUsage

__all__ = ["HeadCounts", "LayerUsage"]
