"""The controller's server, and the host by which any server of a pool is told. Loads no torch: a controller needs none.

Everything here runs on the process's IO loop. A shard's server is ``shard_serving``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mempool.client import GrpcDialer
from mempool.config import ClusterConfig
from mempool.controller import Controller
from mempool.rayhost import collector
from mempool.rayhost.keys import PoolKeys
from mempool.server import Server
from mempool.types import ShardHost, ShardInfo

if TYPE_CHECKING:
    from mempool.server.services import Lookup
    from mempool.wire.codecs.lookup import LookupReply, LookupRequest

_ANYWHERE = ("0.0.0.0", "::", "[::]")


def advertised_host(config: ClusterConfig, node_ip: str) -> str:
    """The host that others reach this node's servers by."""
    if config.pool.advertise is not None:
        return config.pool.advertise
    host = node_ip if config.pool.bind in _ANYWHERE else config.pool.bind
    return f"[{host}]" if ":" in host else host


class ControllerServing:
    """The controller's server: the pool's address.

    Args:
        config: The pool's configuration.
        node_ip: This node's address, as others see it.
        keys: The pool's.

    Attributes:
        serves: It has started.
    """

    def __init__(self, config: ClusterConfig, *, node_ip: str, keys: PoolKeys) -> None:
        self._config = config
        self._host = advertised_host(config, node_ip)
        self._server = Server(token=keys.token, tls=keys.server_tls)
        self._dialer = GrpcDialer(keys.channels())
        self._port = 0
        self.serves = False

    @property
    def address(self) -> str:
        """The pool's, as others reach it."""
        return f"{self._host}:{self._port or self._config.pool.port}"

    def dial(self, info: ShardInfo) -> ShardHost:
        """The host of a shard."""
        return self._dialer.dial(info)

    def bind(self) -> None:
        """Take the pool's port. Raises ConfigError where another process has it."""
        if not self._port:
            self._port = self._server.bind(self._config.pool.bind, [self._config.pool.port])

    async def start(self, controller: Controller) -> str:
        """Serve, and answer the pool's address."""
        self.bind()
        lookup = _LateLookup(controller, dial=self.dial, pool=self._config.pool.name)
        await self._server.start(shard=None, pool=controller, lookup=lookup)
        self.serves = True
        collector.settle()
        return self.address

    async def stop(self) -> None:
        """Let calls under way finish, then end all connections."""
        await self._server.stop()
        await self._dialer.close()


class _LateLookup:
    """The lookups of thin clients that know the pool's address alone: torch is loaded when the first one comes."""

    def __init__(self, controller: Controller, *, dial: Callable[[ShardInfo], ShardHost], pool: str) -> None:
        self._controller = controller
        self._dial = dial
        self._pool = pool
        self._lookup: Lookup | None = None

    async def __call__(self, request: LookupRequest) -> LookupReply:
        if self._lookup is None:
            from mempool.client import Router
            from mempool.server import LookupCoordinator

            router = Router(self._controller, dial=self._dial, pool=self._pool)
            self._lookup = LookupCoordinator(router).lookup
        return await self._lookup(request)
