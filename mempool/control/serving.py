"""Servers of the two kinds of process: a shard's (engine, router for thin clients, gRPC) and the controller's.

Everything here runs on the process's IO loop; the engine has its own thread.
"""

from mempool.client import GrpcShard, Router
from mempool.config import ClusterConfig
from mempool.controller import Controller
from mempool.errors import ShardUnavailable
from mempool.server import LookupCoordinator, Server, ShardViews
from mempool.shard import Engine
from mempool.types import ShardHost, ShardInfo

_ANYWHERE = ("0.0.0.0", "::", "[::]")


def advertised_host(config: ClusterConfig, node_ip: str) -> str:
    """The host that others reach this node's servers by."""
    if config.pool.advertise is not None:
        return config.pool.advertise
    return node_ip if config.pool.bind in _ANYWHERE else config.pool.bind


class Peers:
    """The shards a process speaks to: connections by (shard, incarnation), kept while they are of use.

    Args:
        token: The pool's token.
        own: The shard of this very process, served without a network.
    """

    def __init__(self, *, token: str | None, own: tuple[ShardInfo, ShardHost] | None = None) -> None:
        self._token = token
        self._own = own
        self._hosts: dict[int, tuple[ShardInfo, GrpcShard]] = {}
        self._old: list[GrpcShard] = []

    def dial(self, info: ShardInfo) -> ShardHost:
        """The host of a shard; a new address or incarnation gets a new connection."""
        if self._own is not None and self._own[0].shard == info.shard:
            return self._own[1]
        if not info.address:
            raise ShardUnavailable(f"shard {info.shard} has no address yet", shard=info.shard)
        known = self._hosts.get(info.shard)
        if known is None or known[0] != info:
            if known is not None:
                self._old.append(known[1])  # calls on it may be under way; it is closed at the end
            known = self._hosts[info.shard] = (info, GrpcShard(info, token=self._token))
        return known[1]

    async def close(self) -> None:
        """End all connections."""
        for host in (*self._old, *(host for _, host in self._hosts.values())):
            await host.close()
        self._hosts.clear()
        self._old.clear()


class ShardServing:
    """One start of a shard: its engine and its server.

    Args:
        config: The pool's configuration.
        shard: The shard's number.
        incarnation: Of this start.
        node_ip: This node's address, as others see it.
        token: The pool's token.
    """

    def __init__(self, config: ClusterConfig, *, shard: int, incarnation: int, node_ip: str, token: str | None) -> None:
        self._config = config
        self._host = advertised_host(config, node_ip)
        self._shard = shard
        self._incarnation = incarnation
        self._token = token
        self._server = Server(token=token)
        self._engine: Engine | None = None
        self._peers: Peers | None = None

    async def start(self) -> ShardInfo:
        """Bind, start, answer where the shard is.

        Raises:
            ConfigError: No port is free, or the device cannot be used.
        """
        pool = self._config.pool
        port = self._server.bind(pool.bind, _shard_ports(self._config))
        info = ShardInfo(shard=self._shard, address=f"{self._host}:{port}", incarnation=self._incarnation)
        self._engine = Engine(
            info,
            device=engine_device(self._config.shard.device),
            peers=lambda source: peers.dial(source),
            pool=pool.name,
            memory_bytes=self._config.shard.memory,
            context_budget_bytes=self._config.shard.context_memory,
        )
        peers = self._peers = Peers(token=self._token, own=(info, self._engine))
        views = ShardViews(
            pool.name, shard=self._engine, dial=peers.dial, controller=f"port {pool.port} of the controller's node"
        )
        router = Router(views, dial=peers.dial, pool=pool.name)
        await self._server.start(shard=self._engine, pool=views, lookup=LookupCoordinator(router).lookup)
        return info

    async def stop(self) -> None:
        """Let calls under way finish, then end the engine."""
        await self._server.stop()
        if self._peers is not None:
            await self._peers.close()
        if self._engine is not None:
            await self._engine.close()


class ControllerServing:
    """The controller's server: the pool's address.

    Args:
        config: The pool's configuration.
        node_ip: This node's address, as others see it.
        token: The pool's token.
    """

    def __init__(self, config: ClusterConfig, *, node_ip: str, token: str | None) -> None:
        self._config = config
        self._host = advertised_host(config, node_ip)
        self._server = Server(token=token)
        self._peers = Peers(token=token)
        self._port = 0
        self.address: str | None = None

    def dial(self, info: ShardInfo) -> ShardHost:
        """The host of a shard."""
        return self._peers.dial(info)

    def bind(self) -> None:
        """Take the pool's port. Raises ConfigError where another process has it."""
        if not self._port:
            self._port = self._server.bind(self._config.pool.bind, [self._config.pool.port])

    async def start(self, controller: Controller) -> str:
        """Serve, and answer the pool's address."""
        router = Router(controller, dial=self.dial, pool=self._config.pool.name)
        await self._server.start(shard=None, pool=controller, lookup=LookupCoordinator(router).lookup)
        self.address = f"{self._host}:{self._port}"
        return self.address

    async def stop(self) -> None:
        await self._server.stop()
        await self._peers.close()


def engine_device(device: str) -> str:
    """The device a shard's pages lie on: "auto" takes the GPU that Ray gave it, if any."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _shard_ports(config: ClusterConfig) -> list[int]:
    ports = config.pool.shard_ports
    return [0] if ports is None else list(range(ports[0], ports[1] + 1))
