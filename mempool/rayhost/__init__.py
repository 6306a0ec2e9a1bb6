"""The pool on Ray: actors, placement on nodes, restarts. Nothing of the data path passes through here.

Naming `up` or `down` loads Ray; `apply` and the records do not.
"""

from typing import TYPE_CHECKING, Any

from mempool.rayhost.apply import apply, planned
from mempool.rayhost.state.records import PoolRecord, read_record, read_records

if TYPE_CHECKING:
    from mempool.rayhost.cluster import down, up

__all__ = ["PoolRecord", "apply", "down", "planned", "read_record", "read_records", "up"]


def __getattr__(name: str) -> Any:
    if name in ("down", "up"):
        from mempool.rayhost import cluster

        return getattr(cluster, name)
    raise AttributeError(f"module 'mempool.rayhost' has no attribute {name!r}")
