"""The embedded pool: the same router, controller and engines as a pool on Ray, in this process, without a network.

(The public name is ``mempool.local``; the package has another name because a module cannot share a function's.)
"""

from mempool.embedded.pool import EngineLauncher, local

__all__ = ["EngineLauncher", "local"]
