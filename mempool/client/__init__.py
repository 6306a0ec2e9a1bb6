"""A pool's client: routing by placement, merging, retries, the trainer's step, autograd, and the ways to reach shards.

Leaves pages, arithmetic on values and optimizers to the shards, and modules and optimizers of torch to ``nn`` and
``optim``. Names are loaded at first use: who only asks a pool (commands, the controller) needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mempool.client.gathers.pending import PendingGather
    from mempool.client.lookup import Lookup, PendingLookup
    from mempool.client.opening.remote import connect
    from mempool.client.pool import Pool
    from mempool.client.reading.table_at import TableAt
    from mempool.client.routing.attempt import Seen
    from mempool.client.routing.router import Router
    from mempool.client.table import Table
    from mempool.client.training.commitment import Prepared
    from mempool.client.training.session import Session, SessionCounters
    from mempool.client.transport.pool import GrpcPool
    from mempool.client.transport.shard import GrpcDialer, GrpcShard
    from mempool.types.bags import Bags

__all__ = [
    "Bags",
    "GrpcDialer",
    "GrpcPool",
    "GrpcShard",
    "Lookup",
    "PendingGather",
    "PendingLookup",
    "Pool",
    "Prepared",
    "Router",
    "Seen",
    "Session",
    "SessionCounters",
    "Table",
    "TableAt",
    "connect",
]

_HOMES = {
    "Bags": "mempool.types.bags",
    "GrpcDialer": "mempool.client.transport.shard",
    "GrpcPool": "mempool.client.transport.pool",
    "GrpcShard": "mempool.client.transport.shard",
    "Lookup": "mempool.client.lookup",
    "PendingGather": "mempool.client.gathers.pending",
    "PendingLookup": "mempool.client.lookup",
    "Pool": "mempool.client.pool",
    "Prepared": "mempool.client.training.commitment",
    "Router": "mempool.client.routing.router",
    "Seen": "mempool.client.routing.attempt",
    "Session": "mempool.client.training.session",
    "SessionCounters": "mempool.client.training.session",
    "Table": "mempool.client.table",
    "TableAt": "mempool.client.reading.table_at",
    "connect": "mempool.client.opening.remote",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mempool.client' has no attribute {name!r}")
