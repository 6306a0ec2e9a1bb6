"""One gRPC server of this process: a port, the services on it, health and reflection. Runs on the process's IO loop."""

from collections.abc import Iterable, Mapping

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from mempool.config import is_loopback
from mempool.errors import ConfigError
from mempool.observe import Stages
from mempool.server.services import Handlers, Lookup, Services
from mempool.server.token import TokenInterceptor
from mempool.types import PoolApi, ShardHost
from mempool.wire.channels.channel import MAX_MESSAGE_BYTES, server_options
from mempool.wire.methods import MEMORY_SERVICE, POOL_SERVICE, SHARD_SERVICE
from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2  # noqa: F401  # reflection finds the services by them


class Server:
    """A server, from ``bind`` (which gives the port) over ``start`` to ``stop``.

    Args:
        token: What every call must carry. None is for loopback addresses only.
        max_message_bytes: Neither takes nor sends larger messages.
    """

    def __init__(self, *, token: str | None, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._token = token
        self._stages = Stages()
        self._services = Services(max_message_bytes=max_message_bytes, stages=self._stages)
        self._server = grpc.aio.server(
            interceptors=() if token is None else (TokenInterceptor(token),),
            options=server_options(max_message_bytes=max_message_bytes),
        )
        self._health = HealthServicer()
        self._started = False

    def bind(self, host: str, ports: Iterable[int]) -> int:
        """Take the first free port of ``ports`` (0: any) and answer it.

        Raises:
            ConfigError: No port is free, or the host is not a loopback address and there is no token.
        """
        if self._token is None and not is_loopback(host):
            raise ConfigError(
                f"bind = {host!r} is reachable from other hosts and there is no token; set pool.token_file in the "
                "config (or MEMPOOL_TOKEN), or bind to 127.0.0.1"
            )
        authority = f"[{host}]" if ":" in host and not host.startswith("[") else host
        tried = []
        for port in ports:
            try:
                bound: int = self._server.add_insecure_port(f"{authority}:{port}")
            except RuntimeError:
                bound = 0
            if bound:
                return bound
            tried.append(str(port))
        raise ConfigError(
            f"cannot listen on {host}, port {', '.join(tried)}: taken by another process, or no address of this host; "
            "choose another port in the config, or end that process"
        )

    async def start(self, *, shard: ShardHost | None, pool: PoolApi, lookup: Lookup) -> None:
        """Serve. Without a shard, as on the controller's address, there are PoolService and Lookup only."""
        handlers: Mapping[str, Handlers] = {
            MEMORY_SERVICE: self._services.memory(shard, lookup),
            POOL_SERVICE: self._services.pool(pool),
            **({} if shard is None else {SHARD_SERVICE: self._services.shard(shard)}),
        }
        for service, methods in handlers.items():
            self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*handlers, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._server.start()
        self._started = True
        for service in ("", *handlers):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Tell health probes, let calls under way finish for ``grace_s``, close the port."""
        await self._health.enter_graceful_shutdown()
        if not self._started:  # gRPC keeps the port of a server that never started
            await self._server.start()
        await self._server.stop(grace_s)
