"""torch modules over a pool's tables: the memory layer, and the optimizer that commits its gradients."""

from mempool.nn.choice import MemoryLookup
from mempool.nn.gradient import TableGradient
from mempool.nn.layer import MemoryLayer
from mempool.nn.optimizer import PoolOptimizer

__all__ = ["MemoryLayer", "MemoryLookup", "PoolOptimizer", "TableGradient"]
