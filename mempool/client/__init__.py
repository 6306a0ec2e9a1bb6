"""A pool's client: routing by placement, merging, retries, the trainer's step, autograd, and the ways to reach shards.

Leaves pages, arithmetic on values and optimizers to the shards, and modules and optimizers of torch to ``nn`` and
``optim``.
"""

from mempool.client.attempt import Seen
from mempool.client.bags import Bags
from mempool.client.connect import connect
from mempool.client.lookup import Lookup
from mempool.client.pool import Pool
from mempool.client.pool_grpc import GrpcPool
from mempool.client.router import Router
from mempool.client.session import Prepared, Session, SessionCounters
from mempool.client.table import Table
from mempool.client.transport_grpc import GrpcDialer, GrpcShard

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
