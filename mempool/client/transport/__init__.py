"""Shards and the controller over gRPC, as the protocols of ``mempool.types``."""
