"""A shard's server: engine, router for thin clients, gRPC. Loads torch and the kernels, so only a shard's process does.

Everything here runs on the process's IO loop; the engine has its own thread.
"""

import asyncio
import logging
import os
import sys
from functools import partial
from typing import NoReturn

from mempool.client import GrpcDialer, Router
from mempool.config import TCP_LINES_VARIABLE, ClusterConfig, ShardConfig
from mempool.errors import ConfigError
from mempool.observe import Stages
from mempool.rayhost import collector
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.serving import advertised_host
from mempool.server import LookupCoordinator, Server, ShardViews
from mempool.shard import Engine
from mempool.shard.durable.store import Store
from mempool.types import ShardHost, ShardInfo
from mempool.wire.channels.channel import MAX_ANSWER_BYTES, MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES

_LOG = logging.getLogger(__name__)
_SWITCH_S = 0.0005
"""How long a thread that computes in Python keeps another waiting: the loop, busy with calls, would keep the engine's
waiting for Python's 5 ms several times a job, and everyone who waits for the engine with it."""
_EXIT_FATAL = 70  # "internal software error" of sysexits.h


def end_process(error: BaseException) -> NoReturn:
    """End this process at once: a shard that cannot go on must not answer, and Ray starts it again."""
    _LOG.critical("this shard cannot go on and ends its process: %s: %s", type(error).__name__, error)
    logging.shutdown()
    os._exit(_EXIT_FATAL)


class ShardServing:
    """One start of a shard: its engine and its server.

    Args:
        config: The pool's configuration.
        shard: The shard's number.
        incarnation: Of this start.
        node_ip: This node's address, as others see it.
        keys: The pool's.
        imported_s: How long this process took to import what it needs, seconds.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        shard: int,
        incarnation: int,
        node_ip: str,
        keys: PoolKeys,
        imported_s: float = 0.0,
    ) -> None:
        self._config = config
        self._host = advertised_host(config, node_ip)
        self._shard = shard
        self._incarnation = incarnation
        self._stages = Stages()
        self._stages.record("start: imports", imported_s)
        self._server = Server(
            token=keys.token,
            controller_key=keys.controller_key,
            tls=keys.server_tls,
            in_flight_bytes=in_flight_bytes(config.shard),
            line_ports=None if os.environ.get(TCP_LINES_VARIABLE) == "0" else _ports(config.pool.line_ports),
            stages=self._stages,
        )
        self._dialer = GrpcDialer(keys.channels())
        self._engine: Engine | None = None
        self._store: Store | None = None

    async def start(self) -> ShardInfo:
        """Bind, start, answer where the shard is.

        Raises:
            ConfigError: No port is free, or the device cannot be used. Port and engine are given back: it will be tried
                again, and a range of ports is soon used up.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> ShardInfo:
        sys.setswitchinterval(_SWITCH_S)
        pool = self._config.pool
        port = self._server.bind(pool.bind, _ports(pool.shard_ports))
        info = ShardInfo(shard=self._shard, address=f"{self._host}:{port}", incarnation=self._incarnation)
        # It reads what lies on the disk. A port that is bound and not served holds callers off meanwhile.
        with self._stages.measure("recover: open"):
            store = self._store = await asyncio.to_thread(self._opened)
        engine = self._engine = Engine(
            info,
            device=engine_device(self._config.shard),
            peers=self._dialer.dial,
            pool=pool.name,
            memory_bytes=self._config.shard.page_bytes,
            client_memory_bytes=self._config.shard.client_bytes,
            context_budget_bytes=self._config.shard.context_memory,
            commit_memory_bytes=self._config.shard.commit_bytes,
            version_memory_bytes=self._config.shard.version_memory,
            held_lease_s=self._config.shard.trainer_lease,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_answer_bytes=MAX_ANSWER_BYTES,
            on_fatal=end_process,
            on_loaded=partial(collector.settle, young=True),
            stages=self._stages,
            store=store,
        )
        await engine.recover()

        def dial(peer: ShardInfo) -> ShardHost:
            return engine if peer.shard == info.shard else self._dialer.dial(peer)

        views = ShardViews(pool.name, shard=engine, dial=dial, controller=f"port {pool.port} of the controller's node")
        router = Router(views, dial=dial, pool=pool.name)
        await self._server.start(
            shard=engine,
            pool=views,
            lookup=LookupCoordinator(router, info=info).lookup,
            address=info.address,
            at_once=engine.at_once,
        )
        collector.settle()
        return info

    def _opened(self) -> Store | None:
        """What the shard keeps; None: nothing. Raises as ``Store`` does."""
        storage, pool = self._config.shard.storage, self._config.pool.name
        if storage is None:
            return None
        return Store(
            storage.path,
            pool=pool,
            pool_id=f"ray/{pool}",  # one of this name on one path: what it is called tells it from others
            shard=self._shard,
            sync=storage.sync,
            journal_limit=storage.journal_limit,
        )

    async def owns(self) -> bool:
        """Whether it has, or has lost, any page of any table; or may get some by a round that it has part in."""
        tables = () if self._engine is None else (await self._engine.status()).tables
        return any(table.is_needed for table in tables)

    async def stop(self) -> None:
        """Let calls under way finish, then end the engine."""
        await self._server.stop()
        await self._dialer.close()
        if self._engine is not None:
            await self._engine.close()
        elif self._store is not None:  # there is no such device, say: the next try opens it again
            await self._store.close()


def in_flight_bytes(shard: ShardConfig) -> int:
    """What a shard's callers may have it hold of messages at a time: a part of its memory, and three large ones."""
    return max(shard.memory // 4, 3 * MAX_REQUEST_BYTES)


def engine_device(shard: ShardConfig) -> str:
    """The device a shard's pages lie on: "auto" takes the GPU that Ray gave it, if any.

    Raises:
        ConfigError: "cuda" and this process sees no GPU.
    """
    import torch

    cuda = torch.cuda.is_available()
    if shard.device == "cuda" and not cuda:
        raise ConfigError(
            "shard.device = 'cuda' and a shard finds no GPU that torch can use: this torch "
            f"({torch.__version__}) is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}. "
            "Install torch with CUDA there, or set shard.device to 'auto' or 'cpu'"
        )
    if shard.device == "auto":
        return "cuda" if shard.num_gpus and cuda else "cpu"
    return shard.device


def _ports(ports: tuple[int, int] | None) -> list[int]:
    return [0] if ports is None else list(range(ports[0], ports[1] + 1))
