"""The controller: which tables and shards a pool has, where pages are, and the moves of a rescale.

It speaks to shards through the ``ShardHost`` protocol and starts them through a ``Launcher``; whether those are engines
in this process or Ray actors on other hosts is for the composition roots to choose.
"""

from mempool.controller.controller import Controller
from mempool.controller.launcher import Launcher

__all__ = ["Controller", "Launcher"]
