"""torch modules over a pool's tables: the memory layer, the optimizer that commits its gradients, the pool's state,
and memory for models that others built."""

from mempool.nn.choice import MemoryLookup
from mempool.nn.decoders import from_pretrained, retrofit, save_pretrained
from mempool.nn.experts import PEERLayer
from mempool.nn.gradient import TableGradient
from mempool.nn.layer import MemoryLayer
from mempool.nn.optimizer import PoolOptimizer
from mempool.nn.pending import PendingMemory
from mempool.nn.state import PoolState
from mempool.nn.tables import reading

__all__ = [
    "MemoryLayer",
    "MemoryLookup",
    "PEERLayer",
    "PendingMemory",
    "PoolOptimizer",
    "PoolState",
    "TableGradient",
    "from_pretrained",
    "reading",
    "retrofit",
    "save_pretrained",
]
