"""A memory that several modalities look up in, and the loss by which they find each other."""

from mempool.nn.modalities.contrast import InfoNCE
from mempool.nn.modalities.memory import MultiModalMemory

__all__ = ["InfoNCE", "MultiModalMemory"]
