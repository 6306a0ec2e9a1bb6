"""torch modules over a pool's tables: the memory layer, the optimizer that commits its gradients, the pool's state,
and memory for models that others built."""

from mempool.nn.choice import MemoryLookup
from mempool.nn.decoders import from_pretrained, retrofit, save_pretrained
from mempool.nn.experts import PEERLayer
from mempool.nn.gradient import TableGradient
from mempool.nn.layer import MemoryLayer
from mempool.nn.modalities import InfoNCE, MultiModalMemory
from mempool.nn.ngrams import NgramLookup, NgramMemory, NgramRows, Ngrams, canonical_ids
from mempool.nn.optimizer import PoolOptimizer
from mempool.nn.pending import PendingMemory
from mempool.nn.stable.initial import init_values
from mempool.nn.state import PoolState
from mempool.nn.tables import reading

__all__ = [
    "InfoNCE",
    "MemoryLayer",
    "MemoryLookup",
    "MultiModalMemory",
    "NgramLookup",
    "NgramMemory",
    "NgramRows",
    "Ngrams",
    "PEERLayer",
    "PendingMemory",
    "PoolOptimizer",
    "PoolState",
    "TableGradient",
    "canonical_ids",
    "from_pretrained",
    "init_values",
    "reading",
    "retrofit",
    "save_pretrained",
]
