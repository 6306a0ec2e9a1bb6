"""One gRPC server of this process: a port, the services on it, health and reflection. Runs on the process's IO loop."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import grpc
import grpc.aio

from mempool.config import is_loopback
from mempool.errors import ConfigError
from mempool.observe import Stages
from mempool.server.admission import Admission
from mempool.server.calls import Door
from mempool.server.lines.server import LineServer
from mempool.server.memory import Trimming
from mempool.server.public import PublicServices
from mempool.server.services import AtOnce, Handlers, Lookup, Services, line_calls
from mempool.server.token import TokenInterceptor
from mempool.types import PoolApi, ShardHost
from mempool.wire.channels.channel import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, server_options
from mempool.wire.channels.tls import ServerTls
from mempool.wire.lines.line import can_be_served, supported
from mempool.wire.methods import MEMORY_SERVICE, POOL_SERVICE, SHARD_SERVICE
from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2  # noqa: F401  # reflection finds the services by them

IN_FLIGHT_BYTES = 4 * MAX_REQUEST_BYTES
RECEIVE_TIMEOUT_S = 30.0
_CALL_BYTES = 16 * 2**10
"""What a call costs besides its message and answer: its task, its stream, gRPC's objects."""
_LAST_WORDS_S = 0.5
"""For what is on its way out when all calls have ended."""

_LOG = logging.getLogger("mempool.server")


class Server:
    """A server, from ``bind`` (which gives the port) over ``start`` to ``stop``.

    Args:
        token: What every call must carry. None is for loopback addresses only.
        controller_key: What calls of the controller must carry beside it; None: nobody may make them.
        tls: Who this server is; None: connections are not encrypted.
        max_message_bytes: Neither takes nor sends larger messages.
        in_flight_bytes: Bytes of messages of all callers together; more of them wait. At least one message of the
            largest size. Of answers that one connection has not taken, as many.
        receive_timeout_s: How long a message may take to come.
        line_ports: Where lines over TCP are had, at the first that is free (0: any); None: nowhere. With ``tls``
            there are none in any case, as nothing of theirs is encrypted.
        stages: Where the stages of calls are timed.
    """

    def __init__(
        self,
        *,
        token: str | None,
        controller_key: str | None = None,
        tls: ServerTls | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        in_flight_bytes: int = IN_FLIGHT_BYTES,
        receive_timeout_s: float = RECEIVE_TIMEOUT_S,
        line_ports: Sequence[int] | None = None,
        stages: Stages | None = None,
    ) -> None:
        self._token = token
        self._line_ports = None if tls is not None else line_ports
        self._host, self._port = "", 0
        self._tls = tls
        self._admission = Admission(
            budget_bytes=in_flight_bytes,
            message_bytes=min(max_message_bytes, MAX_REQUEST_BYTES),
            call_bytes=_CALL_BYTES,
        )
        self._trimming = Trimming(self._admission)
        self._door = Door(
            admission=self._admission,
            stages=stages or Stages(),
            controller_key=controller_key,
            receive_timeout_s=receive_timeout_s,
        )
        self._services = Services(max_message_bytes=max_message_bytes, door=self._door)
        self._server = grpc.aio.server(
            interceptors=() if token is None else (TokenInterceptor(token),),
            options=server_options(max_message_bytes=min(max_message_bytes, MAX_REQUEST_BYTES)),
        )
        self._public = PublicServices(message_bytes=self._admission.message_bytes)
        self._started = False
        self._lines: LineServer | None = None

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
        if self._tls is None and not is_loopback(host):
            _LOG.warning(
                "%s is reachable from other hosts and nothing is encrypted: the token and all data travel in clear "
                "text, for anyone on the way to read and to use. Set pool.tls, or keep to a network you trust",
                host,
            )
        authority = f"[{host}]" if ":" in host and not host.startswith("[") else host
        tried = []
        for port in ports:
            try:
                bound = self._take(f"{authority}:{port}")
            except RuntimeError:
                bound = 0
            if bound:
                self._host, self._port = host, bound
                return bound
            tried.append(str(port))
        raise ConfigError(
            f"cannot listen on {host}, port {', '.join(tried)}: taken by another process, or no address of this host; "
            "choose another port in the config, or end that process"
        )

    async def start(
        self,
        *,
        shard: ShardHost | None,
        pool: PoolApi,
        lookup: Lookup,
        address: str = "",
        at_once: AtOnce | None = None,
    ) -> None:
        """Serve. Without a shard, as on the controller's address, there are PoolService and Lookup only.

        Args:
            address: The shard's, as clients know it; those of this host get shared memory. "": they do not.
            at_once: The shard, where it is asked on the thread that a call comes to.
        """
        near = bool(address) and supported()
        if shard is not None and can_be_served() and (near or self._line_ports is not None):
            lines = self._lines = LineServer(
                address or f"{self._host}:{self._port}",
                token=self._token,
                calls=line_calls(shard),
                at_once=at_once,
                stages=self._door.stages,
                max_message_bytes=self._services.max_message_bytes,
            )
            if self._line_ports is not None:
                lines.listen(self._host, self._line_ports)
        open_line = None if self._lines is None else self._lines.open_line
        handlers: Mapping[str, Handlers] = {
            MEMORY_SERVICE: self._services.memory(shard, lookup, at_once=at_once, open_line=open_line),
            POOL_SERVICE: self._services.pool(pool),
            **({} if shard is None else {SHARD_SERVICE: self._services.shard(shard, clients=self._line_clients)}),
        }
        for service, methods in handlers.items():
            self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])
        self._public.add_to(self._server, handlers)
        await self._server.start()
        self._started = True
        self._trimming.start()
        if self._lines is not None and near:
            self._lines.start()

    async def stop(self, grace_s: float = 2.0) -> None:
        """Tell health probes, refuse new calls, let calls under way finish for ``grace_s``, close the port."""
        self._public.end()
        self._door.closed = True
        self._trimming.stop()
        if self._lines is not None:
            self._lines.closing = True
        if not self._started:  # gRPC keeps the port of a server that never started
            await self._server.start()
        await self._admission.empty(grace_s)
        if self._lines is not None:
            await self._lines.stop(grace_s)
        await self._server.stop(min(grace_s, _LAST_WORDS_S))

    def _line_clients(self) -> tuple[int, int]:
        if self._lines is None:
            return 0, 0
        return self._lines.num_clients(near=True), self._lines.num_clients(near=False)

    def _take(self, address: str) -> int:
        if self._tls is None:
            return int(self._server.add_insecure_port(address))
        return int(self._server.add_secure_port(address, self._tls.credentials()))
