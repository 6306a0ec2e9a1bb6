"""gRPC in front of a shard or a controller: requests in, validated protocol calls, replies or clear errors out.

It holds no state of the memory; it never imports Ray.
"""

from mempool.server.lookup import LookupCoordinator
from mempool.server.server import Server
from mempool.server.views import ShardViews

__all__ = ["LookupCoordinator", "Server", "ShardViews"]
