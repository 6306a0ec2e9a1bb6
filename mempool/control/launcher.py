"""Starts, finds, watches and stops a pool's shard actors."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from mempool.config import ClusterConfig
from mempool.control.naming import NAMESPACE, shard_name, shard_of
from mempool.control.shard_actor import Description, ShardProcess
from mempool.errors import ShardUnavailable
from mempool.types import ShardInfo

_LOG = logging.getLogger("mempool.control")
_START_TIMEOUT_S = 120.0
_DESCRIBE_TIMEOUT_S = 5.0
_POLL_S = 0.2


class RayLauncher:
    """The controller's ``Launcher`` on Ray: one detached, named, restartable actor a shard.

    Args:
        config: Resources of a shard, and what its server binds to.
        token: The pool's token, handed to the actors (they may run on hosts without the token's file).
    """

    def __init__(self, config: ClusterConfig, *, token: str | None) -> None:
        self._config = config
        self._token = token
        self._pool = config.pool.name
        self._actors: dict[int, Any] = {}
        self._boots: dict[int, str] = {}

    async def start(self, shard: int) -> ShardInfo:
        """Create the actor and admit it.

        Raises:
            ShardUnavailable: Ray cannot place it, or it does not start in time.
        """
        actor = await asyncio.to_thread(self._create, shard)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                return await self._admit(shard, actor, await _describe(actor))
        except (TimeoutError, RayError) as error:
            self._actors.pop(shard, None)
            ray.kill(actor, no_restart=True)
            raise ShardUnavailable(self._no_start(shard, error), shard=shard) from error

    async def stop(self, info: ShardInfo) -> None:
        """Let the shard end its calls, then end its actor for good."""
        self._boots.pop(info.shard, None)
        actor = self._actors.pop(info.shard, None)
        if actor is None:
            return
        try:
            await asyncio.wait_for(_await(actor.stop.remote()), timeout=_DESCRIBE_TIMEOUT_S)
        except (TimeoutError, RayError) as error:
            _LOG.warning("shard %d did not stop by itself (%s); ending its process", info.shard, type(error).__name__)
        ray.kill(actor, no_restart=True)

    async def find(self) -> list[ShardInfo]:
        """The shards of this pool that run already, for a controller that was restarted. Waits for those restarting."""
        infos = []
        for entry in await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True):
            shard = shard_of(self._pool, entry["name"])
            if shard is None or entry["namespace"] != NAMESPACE:
                continue
            actor = await asyncio.to_thread(ray.get_actor, entry["name"], namespace=NAMESPACE)
            async with asyncio.timeout(_START_TIMEOUT_S):
                description = await _describe(actor)
            infos.append(await self._admit(shard, actor, description))
        return infos

    async def restarts(self, interval_s: float = 0.5) -> AsyncIterator[ShardInfo]:
        """Yields each shard that came back as a new process, admitted as a new incarnation. Never ends by itself."""
        while True:
            await asyncio.sleep(interval_s)
            shards = list(self._boots)
            descriptions = await asyncio.gather(*(self._glance(shard) for shard in shards))
            for shard, description in zip(shards, descriptions, strict=True):
                if description is not None and description.boot_id != self._boots.get(shard, description.boot_id):
                    _LOG.warning("shard %d was restarted by Ray: its pages are gone", shard)
                    yield await self._admit(shard, self._actors[shard], description)

    async def _glance(self, shard: int) -> Description | None:
        """The shard's description, or None while it is down or on its way up: its clients know it as unavailable."""
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                description: Description = await _await(self._actors[shard].describe.remote())
                return description
        except (TimeoutError, KeyError, RayError):
            return None

    def _create(self, shard: int) -> Any:
        shard_config = self._config.shard
        threads = str(shard_config.threads)
        options: dict[str, Any] = {
            "name": shard_name(self._pool, shard),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "num_cpus": shard_config.num_cpus,
            "num_gpus": shard_config.num_gpus,
            "resources": dict(shard_config.resources),
            "max_restarts": shard_config.max_restarts,
            "max_task_retries": 0,  # at most once: calls of the controller are repeated by the controller
            "scheduling_strategy": "SPREAD",
            # Ray sets OMP_NUM_THREADS=1 for actors without CPUs; torch and numba read it when they are imported.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}},
        }
        actor_class = ray.remote(concurrency_groups={"health": 1})(ShardProcess)
        self._actors[shard] = actor_class.options(**options).remote(self._config, shard, self._token)
        return self._actors[shard]

    async def _admit(self, shard: int, actor: Any, description: Description) -> ShardInfo:
        info = description.info
        if info is None:
            # Milliseconds of now: ascending also over a restart of the controller, which remembers nothing.
            info = await _await(actor.admit.remote(time.time_ns() // 1_000_000))
        self._actors[shard] = actor
        self._boots[shard] = description.boot_id
        return info

    def _no_start(self, shard: int, error: Exception) -> str:
        config = self._config.shard
        wanted = f"num_cpus={config.num_cpus}, num_gpus={config.num_gpus}"
        free = ray.available_resources()
        detail = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return (
            f"shard {shard} of pool {self._pool!r} did not start within {_START_TIMEOUT_S:g} s ({detail}); it asks Ray "
            f"for {wanted}, free now: CPU={free.get('CPU', 0):g}, GPU={free.get('GPU', 0):g}. "
            "Lower shard.num_cpus / shard.num_gpus in the config, or add nodes"
        )


async def _describe(actor: Any) -> Description:
    """The actor's description, waiting while Ray starts or restarts it. The caller bounds the wait."""
    while True:
        try:
            return await _await(actor.describe.remote())
        except ActorUnavailableError:
            await asyncio.sleep(_POLL_S)


async def _await(reference: Any) -> Any:
    """A Ray result without blocking the IO loop."""
    return await asyncio.wrap_future(reference.future())
