"""The Ray actor around the controller: serves the pool's address, watches its shards.

It may die and come back at any time: clients and shards go on without it, and it learns the pool's state from them.
"""

import asyncio
import logging
from contextlib import suppress

import ray

from mempool.config import ClusterConfig
from mempool.controller import Controller
from mempool.rayhost.actors import node_ip, run_beside_others
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.launcher import RayLauncher
from mempool.rayhost.serving import ControllerServing
from mempool.rayhost.shard_actor import Description
from mempool.wire.channels.loop import run

_LOG = logging.getLogger("mempool.rayhost")
_BIND_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
# A shard that Ray restarted says so itself; looking finds what was not heard, and costs every process.
_LOOK_S = 10.0
_RETRY_S = 1.0


class ControllerProcess:
    """One start of the controller's process. Made an actor by ``cluster.up``.

    Args:
        config: The pool's configuration.
        keys: The pool's.
        start_timeout_s: How long shards may take to start with the pool.
    """

    def __init__(self, config: ClusterConfig, keys: PoolKeys, start_timeout_s: float) -> None:
        run_beside_others()
        self._config = config
        self._launcher = RayLauncher(config, keys=keys, start_timeout_s=start_timeout_s)
        self._start_timeout_s = start_timeout_s
        self._watching: asyncio.Task[None] | None = None
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        run(self._make(node_ip(), keys, restarted), timeout_s=_BIND_TIMEOUT_S)

    async def _make(self, node_ip: str, keys: PoolKeys, restarted: bool) -> None:
        # On the IO loop, to which gRPC's servers belong from their making.
        self._loop = asyncio.get_running_loop()
        self._heard = asyncio.Event()
        self._serving = ControllerServing(self._config, node_ip=node_ip, keys=keys)
        self._controller = Controller(
            self._config.pool.name,
            launcher=self._launcher,
            address=self._serving.address,
            dial=self._serving.dial,
            trainer_lease_s=self._config.shard.trainer_lease,
            rescale_by=self._config.pool.rescale_by,
            refusals=self._launcher.refusals,
        )
        if restarted:  # nobody calls start() a second time
            self._watching = asyncio.create_task(self._resume())

    def start(self) -> str:
        """Start the shards, serve, and answer the pool's address. A repeat answers the same.

        Raises:
            MempoolError: The address is taken, or a shard does not start; nothing is left running then.
        """
        return run(self._start(), timeout_s=self._start_timeout_s + _BIND_TIMEOUT_S)

    @ray.method(concurrency_group="health")
    def waiting_for(self) -> str:
        """What a start of the pool waits for, for people."""
        return run(self._launcher.starting(), timeout_s=_BIND_TIMEOUT_S) or "the shards' servers"

    @ray.method(concurrency_group="health")
    def shard_is_back(self) -> None:
        """A shard's process says that Ray has started it again: look at once."""
        self._loop.call_soon_threadsafe(self._heard.set)

    def stop(self, drop: bool = False) -> None:
        """Stop all shards, then the server. drop: what shards have kept is removed.

        Raises:
            StorageFailed: It could not be, for some shard; all are stopped.
        """
        self._launcher.drops = drop
        run(self._stop(), timeout_s=_STOP_TIMEOUT_S)

    async def _start(self) -> str:
        if self._serving.serves:
            return self._serving.address
        self._serving.bind()  # a taken address is known before any shard is started
        try:
            if self._config.shard.storage is None:
                await self._controller.open(self._config.pool.shards)
            else:  # they may have tables of a pool that was switched off
                await self._controller.bring_back(self._config.pool.shards, wanted=lambda: self._launcher.wanted)
            address = await self._serving.start(self._controller)
        except BaseException:
            await self._controller.close()
            raise
        self._watching = asyncio.create_task(self._watch())
        return address

    async def _resume(self) -> None:
        """Serve again after Ray restarted this process, however long Ray takes to find the shards."""
        while True:
            try:
                await self._controller.adopt(await self._launcher.find(), wanted=self._launcher.wanted)
                self._launcher.heard(self._controller.highest_incarnation)
                await self._serving.start(self._controller)
                break
            except Exception as error:  # whatever it is: a process that gives up here serves nobody, and nobody sees it
                _LOG.warning("the controller could not resume yet, will try again: %r", error)
                await asyncio.sleep(_RETRY_S)
        self._heard.set()  # shards that came back too are admitted now
        await self._watch()

    async def _watch(self) -> None:
        """Admit restarted shards; now and then bring views up to date. Ends with the process."""
        pause_s = _LOOK_S
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._heard.wait()
            self._heard.clear()
            try:
                self._launcher.heard(self._controller.highest_incarnation)
                left = await self._admit(await self._launcher.changed())
                await self._controller.reconcile()
                # One that is on its way up for the first time does not say when it is there.
                here = not left and all(info.incarnation for info in self._controller.shards)
                pause_s = _LOOK_S if here else _RETRY_S
            except Exception as error:  # whatever it is, the next look may do better; without looks nothing recovers
                _LOG.warning("looking after the shards failed, will be tried again: %r", error)
                pause_s = _RETRY_S

    async def _admit(self, starts: list[Description]) -> list[Description]:
        """Admit shards that came back; those that do not answer keep no other one away. Answers those."""
        left = []
        for start in starts:
            assert start.info is not None, "admitted"
            try:
                await self._controller.shard_restarted(start.info)
            except Exception as error:  # it is told of again
                _LOG.warning(
                    "shard %d is back and could not be admitted, will be tried again: %r", start.info.shard, error
                )
                left.append(start)
            else:
                self._launcher.acknowledge(start)
        return left

    async def _stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await self._controller.close()
        await self._serving.stop()
