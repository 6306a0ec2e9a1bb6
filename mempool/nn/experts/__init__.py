"""Layers whose memory is of experts."""

from mempool.nn.experts.layer import PEERLayer

__all__ = ["PEERLayer"]
