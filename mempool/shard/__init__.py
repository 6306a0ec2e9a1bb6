"""A shard: pages of tables on one device, behind the ``ShardHost`` protocol."""

from mempool.shard.engine import Engine

__all__ = ["Engine"]
