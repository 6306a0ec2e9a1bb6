"""mempool: memory layers whose memory lives outside the training job, in a pool that trains behind an RPC.

    pool = mempool.connect("localhost:7077")      # or mempool.local(shards=2): embedded, no network, no Ray
    table = pool.create_table(mempool.TableConfig(name="facts", num_slots=512**2, value_dim=256))
    layer = mempool.nn.MemoryLayer(dim=512, table=table)
    memory_optimizer = mempool.optim.PoolOptimizer(layer)

Names are loaded at first use, so that ``import mempool`` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mempool import errors, nn, optim
    from mempool.client import Lookup, Pool, Table, connect
    from mempool.config import FlatKeys, HierarchicalKeys, ProductKeys, TableConfig
    from mempool.embedded import local

__version__ = "0.1.0"

__all__ = [
    "FlatKeys",
    "HierarchicalKeys",
    "Lookup",
    "Pool",
    "ProductKeys",
    "Table",
    "TableConfig",
    "__version__",
    "connect",
    "errors",
    "local",
    "nn",
    "optim",
]

_HOMES = {
    "FlatKeys": "mempool.config",
    "HierarchicalKeys": "mempool.config",
    "Lookup": "mempool.client",
    "Pool": "mempool.client",
    "ProductKeys": "mempool.config",
    "Table": "mempool.client",
    "TableConfig": "mempool.config",
    "connect": "mempool.client",
    "local": "mempool.embedded",
}
_MODULES = ("errors", "nn", "optim")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mempool.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mempool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
