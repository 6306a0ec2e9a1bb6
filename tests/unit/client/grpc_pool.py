"""A pool on loopback in this process: engines, a controller, and a gRPC server before each, as on Ray."""

from collections.abc import Sequence

from mempool.client import GrpcDialer, Router
from mempool.controller import Controller
from mempool.server import LookupCoordinator, Server, ShardViews
from mempool.shard import Engine
from mempool.types import ShardInfo
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.loop import run

CONTROLLER_KEY = "for controllers only"
_BOUND_S = 60.0


class GrpcPoolHere:
    """Starts, restarts and ends it; all methods block.

    Args:
        near: Clients of this host get lines.
        lease_s: Of trainers.

    Attributes:
        address: The controller's.
        infos: The shards, by number.
    """

    def __init__(self, *, shards: int = 2, token: str | None = None, near: bool = False, lease_s: float = 10.0) -> None:
        self.token = token
        self._lease_s = lease_s
        self._near = near
        self.infos: dict[int, ShardInfo] = {}
        self._engines: dict[int, Engine] = {}
        self._servers: dict[int, Server] = {}
        self._dialer = GrpcDialer(GrpcChannels(token=token, controller_key=CONTROLLER_KEY))
        self._front: Server | None = None
        self._controller = Controller("here", launcher=self, dial=self._dialer.dial)
        self.address = run(self._open(shards), _BOUND_S)

    async def require_room(self, shards: int) -> None:
        """There is room."""

    async def keep_wanted(self, shards: int) -> None:
        """Nobody will ask."""

    async def starting(self) -> str:
        return ""

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:  # noqa: ARG002
        """For the controller."""
        return await self._start(shard, incarnation=1)

    async def stop(self, info: ShardInfo) -> None:
        """For the controller."""
        await self._stop_shard(info.shard)

    def restart_shard(self, shard: int) -> None:
        """It comes back at another port, without its pages; the controller hears of it."""

        async def restart() -> None:
            incarnation = self.infos[shard].incarnation + 1
            await self._stop_shard(shard)
            await self._controller.shard_restarted(await self._start(shard, incarnation=incarnation))

        run(restart(), _BOUND_S)

    def stop_shard(self, shard: int) -> None:
        run(self._stop_shard(shard), _BOUND_S)

    def freeze(self, table_id: int) -> None:
        """Hold off writes and commits on shard 0."""
        run(self._engines[0].freeze(table_id, 5.0, token="here", lease_s=_BOUND_S), _BOUND_S)

    def stop_controller(self) -> None:
        if self._front is not None:
            run(self._front.stop(0.0), _BOUND_S)
            self._front = None

    def close(self) -> None:
        run(self._close(), _BOUND_S)

    async def _open(self, shards: int) -> str:
        await self._controller.open(shards)
        self._front = Server(token=self.token)
        port = self._front.bind("127.0.0.1", [0])
        router = Router(self._controller, dial=self._dialer.dial, pool="here")
        await self._front.start(shard=None, pool=self._controller, lookup=LookupCoordinator(router).lookup)
        return f"127.0.0.1:{port}"

    async def _start(self, shard: int, *, incarnation: int) -> ShardInfo:
        server = Server(token=self.token, controller_key=CONTROLLER_KEY)
        port = server.bind("127.0.0.1", [0])
        info = ShardInfo(shard=shard, address=f"127.0.0.1:{port}", incarnation=incarnation)
        engine = Engine(info, peers=self._dialer.dial, held_lease_s=self._lease_s)
        views = ShardViews("here", shard=engine, dial=self._dialer.dial, controller="test")
        router = Router(views, dial=self._dialer.dial, pool="here")
        await server.start(
            shard=engine,
            pool=views,
            lookup=LookupCoordinator(router, info=info).lookup,
            address=info.address if self._near else "",
            at_once=engine.at_once if self._near else None,
        )
        self.infos[shard], self._engines[shard], self._servers[shard] = info, engine, server
        return info

    async def _stop_shard(self, shard: int) -> None:
        server = self._servers.pop(shard, None)
        if server is not None:
            await server.stop(0.0)
            await self._engines.pop(shard).close()

    async def _close(self) -> None:
        if self._front is not None:
            await self._front.stop(0.0)
        for shard in list(self._servers):
            await self._stop_shard(shard)
        await self._dialer.close()


def addresses(pool: GrpcPoolHere, shards: Sequence[int]) -> str:
    """Bootstrap addresses of these shards."""
    return ",".join(pool.infos[shard].address for shard in shards)
