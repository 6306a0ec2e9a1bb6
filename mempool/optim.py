"""Optimizers: those a table's shards run, to put in its config, and the one a training loop steps."""

from mempool.config import SGD, Adagrad, Adam, AdamW, RowWiseAdagrad, RowWiseAdam
from mempool.nn import PoolOptimizer

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "PoolOptimizer", "RowWiseAdagrad", "RowWiseAdam"]
