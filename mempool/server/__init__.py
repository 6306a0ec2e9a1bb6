"""gRPC in front of a shard or a controller: requests in, validated protocol calls, replies or clear errors out.

It holds no state of the memory; it never imports Ray. Naming ``LookupCoordinator`` loads torch; the rest does not.
"""

from typing import TYPE_CHECKING, Any

from mempool.server.server import Server
from mempool.server.views import ShardViews

if TYPE_CHECKING:
    from mempool.server.lookup import LookupCoordinator

__all__ = ["LookupCoordinator", "Server", "ShardViews"]


def __getattr__(name: str) -> Any:
    if name == "LookupCoordinator":
        from mempool.server.lookup import LookupCoordinator

        return LookupCoordinator
    raise AttributeError(f"module 'mempool.server' has no attribute {name!r}")
