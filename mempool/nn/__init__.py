"""torch modules over a pool's tables: the memory layer."""

from mempool.nn.layer import MemoryLayer

__all__ = ["MemoryLayer"]
