"""What users say of tables and pools: validated models, cluster files, and what an edit of a file asks of a pool.

Leaves doing it to ``mempool.rayhost``. Reading a file needs PyYAML (``mempool[server]``); nothing else here does.
"""

from mempool.config.amounts import format_bytes, parse_bytes
from mempool.config.changes import Changes, FieldChange, diff
from mempool.config.cluster import (
    TCP_LINES_VARIABLE,
    TLS_NAME_VARIABLE,
    TLS_VARIABLE,
    TOKEN_VARIABLE,
    ClusterConfig,
    PoolConfig,
    RayConfig,
    ShardConfig,
    StorageConfig,
    TlsConfig,
    is_loopback,
)
from mempool.config.file import load, set_shards
from mempool.config.optimizers import SGD, Adagrad, Adam, AdamW, Optimizer, RowWiseAdagrad, RowWiseAdam
from mempool.config.table import FlatKeys, HierarchicalKeys, ProductKeys, TableConfig, resolve, unsaid

__all__ = [
    "SGD",
    "TCP_LINES_VARIABLE",
    "TLS_NAME_VARIABLE",
    "TLS_VARIABLE",
    "TOKEN_VARIABLE",
    "Adagrad",
    "Adam",
    "AdamW",
    "Changes",
    "ClusterConfig",
    "FieldChange",
    "FlatKeys",
    "HierarchicalKeys",
    "Optimizer",
    "PoolConfig",
    "ProductKeys",
    "RayConfig",
    "RowWiseAdagrad",
    "RowWiseAdam",
    "ShardConfig",
    "StorageConfig",
    "TableConfig",
    "TlsConfig",
    "diff",
    "format_bytes",
    "is_loopback",
    "load",
    "parse_bytes",
    "resolve",
    "set_shards",
    "unsaid",
]
