"""A pool's client: routing by placement, merging, retries, the trainer's step, autograd, and the ways to reach shards.

Leaves pages, arithmetic on values and optimizers to the shards, and modules and optimizers of torch to ``nn`` and
``optim``.
"""

from mempool.client.lookup import Lookup
from mempool.client.pool import Pool
from mempool.client.remote import connect
from mempool.client.routing.attempt import Seen
from mempool.client.routing.router import Router
from mempool.client.table import Table
from mempool.client.training.session import Prepared, Session, SessionCounters
from mempool.client.transport.pool import GrpcPool
from mempool.client.transport.shard import GrpcDialer, GrpcShard
from mempool.types.bags import Bags

__all__ = [
    "Bags",
    "GrpcDialer",
    "GrpcPool",
    "GrpcShard",
    "Lookup",
    "Pool",
    "Prepared",
    "Router",
    "Seen",
    "Session",
    "SessionCounters",
    "Table",
    "connect",
]
