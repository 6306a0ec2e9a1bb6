"""The pool on Ray: actors, placement on nodes, restarts. Nothing of the data path passes through here."""

from mempool.control.cluster import down, up

__all__ = ["down", "up"]
