"""The Ray actor around the controller: serves the pool's address, watches its shards.

It may die and come back at any time: clients and shards go on without it, and it learns the pool's state from them.
"""

import asyncio
import logging

import ray
from ray.exceptions import RayError

from mempool.config import ClusterConfig
from mempool.control.launcher import RayLauncher
from mempool.control.serving import ControllerServing
from mempool.controller import Controller
from mempool.errors import MempoolError
from mempool.wire.loop import run

_LOG = logging.getLogger("mempool.control")
_START_TIMEOUT_S = 300.0
_RECONCILE_S = 5.0
_RETRY_S = 1.0


class ControllerProcess:
    """One start of the controller's process. Made an actor by ``cluster.up``."""

    def __init__(self, config: ClusterConfig, token: str | None) -> None:
        self._config = config
        self._launcher = RayLauncher(config, token=token)
        self._serving = ControllerServing(config, node_ip=ray.util.get_node_ip_address(), token=token)
        self._controller = Controller(config.pool.name, launcher=self._launcher, dial=self._serving.dial)
        self._watching: asyncio.Task[None] | None = None
        if ray.get_runtime_context().was_current_actor_reconstructed:
            run(self._begin_restart(), timeout_s=_START_TIMEOUT_S)  # nobody calls start() a second time

    def start(self) -> str:
        """Start or find the shards, serve, and answer the pool's address. A repeat answers the same.

        Raises:
            MempoolError: The address is taken, or a shard does not start; nothing is left running then.
        """
        return run(self._start(), timeout_s=_START_TIMEOUT_S)

    @ray.method(concurrency_group="health")
    def address(self) -> str | None:
        """The pool's address once it is served."""
        return self._serving.address

    def stop(self) -> None:
        """Stop all shards, then the server."""
        run(self._stop(), timeout_s=_START_TIMEOUT_S)

    async def _start(self) -> str:
        if self._serving.address is not None:
            return self._serving.address
        self._serving.bind()  # a taken address is known before any shard is started
        found = await self._launcher.find()
        try:
            if found:
                await self._controller.adopt(found)
            else:
                await self._controller.open(self._config.pool.shards)
            address = await self._serving.start(self._controller)
        except MempoolError:
            if not found:
                await self._controller.close()
            raise
        self._watching = asyncio.create_task(self._watch())
        return address

    async def _begin_restart(self) -> None:
        self._watching = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        """Serve again after Ray restarted this process, however long Ray takes to find the shards."""
        while True:
            try:
                await self._start()
                return
            except (MempoolError, TimeoutError, RayError) as error:
                _LOG.warning("the controller could not resume yet, will try again: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _watch(self) -> None:
        """Admit restarted shards; now and then bring views up to date. Ends with the process."""
        reconciling = asyncio.create_task(self._reconcile())
        try:
            async for info in self._launcher.restarts():
                try:
                    await self._controller.shard_restarted(info)
                except MempoolError as error:
                    _LOG.warning("shard %d came back and could not be attached: %s", info.shard, error)
        finally:
            reconciling.cancel()

    async def _reconcile(self) -> None:
        while True:
            await asyncio.sleep(_RECONCILE_S)
            try:
                await self._controller.reconcile()
            except MempoolError as error:
                _LOG.warning("bringing shards up to date failed, will be tried again: %s", error)

    async def _stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await self._controller.close()
        await self._serving.stop()
