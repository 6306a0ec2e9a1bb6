"""Optimizers: those a table's shards run, to put in its config, and those a training loop steps."""

from mempool.config import SGD, Adagrad, Adam, AdamW, RowWiseAdagrad, RowWiseAdam
from mempool.nn import PoolOptimizer
from mempool.nn.stable.schedule import ValueLR
from mempool.optim.joint import JointOptimizer

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "JointOptimizer",
    "PoolOptimizer",
    "RowWiseAdagrad",
    "RowWiseAdam",
    "ValueLR",
]
