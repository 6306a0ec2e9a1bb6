"""Starts, finds, watches and stops a pool's shard actors."""

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mempool.config import ClusterConfig
from mempool.errors import MempoolError, ShardUnavailable, StorageFailed
from mempool.rayhost.actors import NAMESPACE, free_resources, make_actor, shard_name, shard_of, shard_variables
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.nodes.placing import Placing
from mempool.rayhost.resources import PROCESS_BYTES, asked, remedies, shortage
from mempool.rayhost.shard_actor import Description, ShardProcess
from mempool.rayhost.state.kept import Wanted
from mempool.types import ShardInfo

_LOG = logging.getLogger("mempool.rayhost")
_START_TIMEOUT_S = 120.0
_FIND_TIMEOUT_S = 10.0
_DESCRIBE_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.2
_FREE_LOOKS = 10
_FREE_PAUSE_S = 0.5
"""Ray hears of what an actor gave back about a second later."""


class RayLauncher:
    """The controller's ``Launcher`` on Ray: one detached, named, restartable actor a shard.

    Args:
        config: Resources of a shard, and what its server binds to.
        keys: The pool's, handed to the actors (they may run on hosts without the files).
        start_timeout_s: How long a shard may take to be placed and to start.

    Attributes:
        drops: Shards that are stopped remove what they have kept.
        refusals: Why shards that were started again by Ray cannot start, by shard, as their processes say.
    """

    def __init__(self, config: ClusterConfig, *, keys: PoolKeys, start_timeout_s: float = _START_TIMEOUT_S) -> None:
        self._config = config
        self._keys = keys
        self._start_timeout_s = start_timeout_s
        self._pool = config.pool.name
        self._actors: dict[int, Any] = {}
        self._generations: dict[int, int] = {}
        self._boots: dict[int, str] = {}
        self._incarnation = 0
        self._starting: set[int] = set()
        self._wanted: Wanted | None = None
        self._placing = Placing(config)
        self.drops = False
        self.refusals: dict[int, str] = {}

    async def require_room(self, shards: int) -> None:
        """Look at what Ray has free; what was given back a moment ago is waited for.

        Raises:
            ShardUnavailable: So many shards more ask for more than is free, and no nodes join by themselves.
        """
        config, lacking = self._config, ""
        if config.ray.autoscaling:
            return
        for _ in range(_FREE_LOOKS):
            free = await asyncio.to_thread(free_resources)
            lacking = shortage(asked(config.shard), free, shards=shards)
            if not lacking:
                return
            await asyncio.sleep(_FREE_PAUSE_S)
        raise ShardUnavailable(
            f"Ray has no room for {shards} more shard(s) of pool {self._pool!r}: they need {lacking}. Nothing was "
            f"started. Ask for fewer shards, {remedies(asked(config.shard), free, shards=shards)}, or add nodes; where "
            "nodes join by themselves, set ray.autoscaling in the config"
        )

    async def starting(self) -> str:
        """What starts under way wait for, for people; "" if there are none."""
        if not self._starting:
            return ""
        starting = ", ".join(str(shard) for shard in sorted(self._starting))
        free = await asyncio.to_thread(free_resources)
        lacking = shortage(asked(self._config.shard), free, shards=len(self._starting))
        if lacking:
            return f"Ray to place shard {starting}: needs {lacking}"
        return f"shard {starting} to start" + ("" if self._config.shard.storage is None else ", with what it has kept")

    @property
    def wanted(self) -> int:
        """How many shards the pool is meant to have, as its shards' processes kept it; 0: nobody knows."""
        return 0 if self._wanted is None else self._wanted.shards

    async def keep_wanted(self, shards: int) -> None:
        """Give it to the process of every shard; one that keeps it is enough.

        Raises:
            ShardUnavailable: None took it.
        """
        number = time.time_ns() // 1_000_000
        if self._wanted is not None:
            number = max(number, self._wanted.number + 1)  # whatever the clock says
        wanted = Wanted(number, shards)
        kept = await asyncio.gather(*(self._keep(shard, wanted) for shard in self._actors))
        if not any(kept):
            raise ShardUnavailable(
                f"none of the {len(self._actors)} shards of pool {self._pool!r} answers, so nothing was begun; see "
                "which are up: mempool status"
            )
        self._wanted = wanted

    async def _keep(self, shard: int, wanted: Wanted) -> bool:
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                await _await(self._actors[shard].keep.remote(wanted))
        except (TimeoutError, KeyError, RayError) as error:
            _LOG.warning("shard %d did not keep how many shards are wanted (%s)", shard, type(error).__name__)
            return False
        return True

    def heard(self, incarnation: int) -> None:
        """An incarnation that some shard of this pool has or had: every new one is higher, whatever the clock says."""
        self._incarnation = max(self._incarnation, incarnation)

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:
        """Create the actor and admit it. fresh: whatever a shard of that number has kept.

        Raises:
            ShardUnavailable: Ray cannot place it, or it does not start in time.
            ConfigError: It has no free port, or there is no such device.
        """
        self._starting.add(shard)
        try:
            return await self._start(shard, fresh)
        finally:
            self._starting.discard(shard)

    async def _start(self, shard: int, fresh: bool) -> ShardInfo:
        home = await self._placing.place(shard, fresh=fresh)
        self._hear_wanted(self._placing.wanted)
        actor = await asyncio.to_thread(self._create, shard, home)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                started = await self._admit(shard, await _describe(actor), fresh=fresh)
        except BaseException as error:
            actor = self._forgotten(shard)
            await asyncio.to_thread(ray.kill, actor, no_restart=True)
            cause = getattr(error, "cause", None)
            if isinstance(cause, MempoolError):
                raise cause from None
            if isinstance(error, TimeoutError | RayError):
                raise ShardUnavailable(await asyncio.to_thread(self._no_start, shard, error), shard=shard) from error
            raise
        assert started.info is not None
        self._boots[shard] = started.boot_id
        return started.info

    async def stop(self, info: ShardInfo) -> None:
        """Let the shard end its calls, then end its actor for good.

        Raises:
            StorageFailed: What it has kept could not be removed; all else is done.
        """
        self._boots.pop(info.shard, None)
        self.refusals.pop(info.shard, None)
        actor = self._forgotten(info.shard)
        if actor is None:
            return
        failure: StorageFailed | None = None
        try:
            await asyncio.wait_for(_await(actor.stop.remote(self.drops)), timeout=_STOP_TIMEOUT_S)
        except (TimeoutError, RayError) as error:
            if isinstance(cause := getattr(error, "cause", None), StorageFailed):
                failure = cause
            _LOG.warning("shard %d did not stop by itself (%s); ending its process", info.shard, type(error).__name__)
            if self.drops and failure is None:
                failure = StorageFailed(f"shard {info.shard} did not answer, so what it has kept may still be there")
        await asyncio.to_thread(ray.kill, actor, no_restart=True)
        if failure is not None:
            raise failure

    async def find(self) -> list[ShardInfo]:
        """The shards of this pool that there are, for a controller that was restarted.

        One that does not answer soon, or has no incarnation yet, is named without an address; ``changed`` tells when it
        is there: by then those that answer have told what incarnations there were.
        """
        entries = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = {entry["name"] for entry in entries if entry["namespace"] == NAMESPACE}
        actors = {one: name for name in names if (one := shard_of(self._pool, name)) is not None}
        self._generations = dict(sorted(actors))  # of each shard the highest, which came last
        shards = sorted(self._generations)
        for (shard, generation), name in actors.items():
            actor = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
            if generation == self._generations[shard]:
                self._actors[shard] = actor
            else:  # a controller died as the other one took its place
                await asyncio.to_thread(ray.kill, actor, no_restart=True)
        found = await asyncio.gather(*(self._found(shard) for shard in shards))
        for description in found:
            if description is not None and description.info is not None:
                self.heard(description.info.incarnation)
        kept = [description.wanted for description in found if description is not None and description.wanted]
        self._wanted = max(kept, default=None)
        if not any(description is not None and description.info is not None for description in found):
            # All are new: nobody knows of others.
            found = await asyncio.gather(*(self._admitted(shard, found[i]) for i, shard in enumerate(shards)))
        return [self._known(shard, description) for shard, description in zip(shards, found, strict=True)]

    async def changed(self) -> list[Description]:
        """The shards that came back as a new process, each admitted as a new incarnation.

        Each is told again and again until ``acknowledge``.
        """
        starts = await asyncio.gather(*(self._new_start(shard) for shard in list(self._boots)))
        return [start for start in starts if start is not None]

    def acknowledge(self, start: Description) -> None:
        """The pool knows of this start of a shard."""
        if start.info is not None and start.info.shard in self._boots:
            self._boots[start.info.shard] = start.boot_id

    def _create(self, shard: int, home: str | None, *, stands_in: bool = False) -> Any:
        """Its actor, bound to a node as long as that lives, or to none."""
        shard_config = self._config.shard
        self._actors[shard] = make_actor(
            ShardProcess,
            self._config,
            shard,
            self._keys,
            home,
            stands_in,
            name=shard_name(self._pool, shard, self._generations.get(shard, 0)),
            num_cpus=shard_config.num_cpus,
            num_gpus=shard_config.num_gpus,
            memory=PROCESS_BYTES,
            resources=dict(shard_config.resources),
            max_restarts=shard_config.max_restarts,
            max_task_retries=0,  # at most once: calls of the controller are repeated by the controller
            # Bound to a node that is there, but full, it waits: elsewhere it would have lost its pages.
            scheduling_strategy=NodeAffinitySchedulingStrategy(home, soft=True) if home else "SPREAD",
            variables=shard_variables(shard_config.threads),
        )
        return self._actors[shard]

    def _stand_in(self, shard: int, home: str) -> None:
        """Another actor in place of one that has no page yet, bound to this node: Ray binds no actor anew, and one
        whose node is gone could start anywhere each time.
        """
        strayed = self._actors[shard]
        self._generations[shard] = self._generations.get(shard, 0) + 1
        self._create(shard, home, stands_in=True)
        ray.kill(strayed, no_restart=True)

    def _forgotten(self, shard: int) -> Any:
        """The actor of a shard that is no more; None where it had none."""
        self._placing.forget(shard)
        self._generations.pop(shard, None)
        return self._actors.pop(shard, None)

    async def _found(self, shard: int) -> Description | None:
        """What a shard's process says of itself; None where it does not answer soon."""
        try:
            async with asyncio.timeout(_FIND_TIMEOUT_S):
                description = await _describe(self._actors[shard])
                self._placing.found(shard, description.node_id)
                return description
        except (TimeoutError, RayError) as error:
            _LOG.warning("shard %d does not answer yet (%s)", shard, type(error).__name__)
            return None

    async def _admitted(self, shard: int, description: Description | None) -> Description | None:
        """The same start with its incarnation; None where it does not answer soon."""
        try:
            async with asyncio.timeout(_FIND_TIMEOUT_S):
                return None if description is None else await self._admit(shard, description)
        except (TimeoutError, RayError) as error:
            _LOG.warning("shard %d does not answer any more (%s)", shard, type(error).__name__)
            return None

    def _known(self, shard: int, description: Description | None) -> ShardInfo:
        if description is None or description.info is None:
            self._boots[shard] = ""
            return ShardInfo(shard=shard, address="", incarnation=0)
        self._boots[shard] = description.boot_id
        return description.info

    async def _new_start(self, shard: int) -> Description | None:
        """A shard's newest start, admitted, where the pool does not know it; None too while it is on its way up."""
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                description: Description = await _await(self._actors[shard].describe.remote())
            self._note(shard, description.refusal if description.info is None else "")
            if description.boot_id == self._boots[shard]:
                return None
            _LOG.warning("shard %d was started again by Ray: %s", shard, self._pages)
            # One that reads back what it has kept keeps no other one waiting: it says when it is there.
            async with asyncio.timeout(_START_TIMEOUT_S if self._config.shard.storage is None else _DESCRIBE_TIMEOUT_S):
                admitted = await self._admit(shard, description)
            self._note(shard, "")
            return admitted
        except (TimeoutError, KeyError, RayError) as error:
            if isinstance(cause := getattr(error, "cause", None), MempoolError):  # of its disk, say
                self._note(shard, cause.message)
                _LOG.warning("shard %d cannot start, and is tried again: %s", shard, cause.message)
            else:
                _LOG.debug("shard %d does not answer: %r", shard, error)
            return None

    def _note(self, shard: int, refusal: str) -> None:
        if refusal and shard in self._boots:
            self.refusals[shard] = refusal
        else:
            self.refusals.pop(shard, None)

    async def _admit(self, shard: int, description: Description, *, fresh: bool = False) -> Description:
        """Give a start of a shard its incarnation, unless it has one."""
        while description.strayed and description.info is None:
            _LOG.warning("shard %d is on node %s now, and stays there", shard, description.node_id)
            await asyncio.to_thread(self._stand_in, shard, description.node_id)
            description = await _describe(self._actors[shard])
        self._placing.found(shard, description.node_id)
        actor = self._actors[shard]
        if description.info is None:
            # Milliseconds of now, so that they ascend over a restart of the controller, which remembers nothing; above
            # all it has heard of, as its clock may be behind.
            self._incarnation = max(self._incarnation + 1, time.time_ns() // 1_000_000)
            description = replace(description, info=await _await(actor.admit.remote(self._incarnation, fresh)))
            if self._config.shard.storage is not None:
                self._hear_wanted((await _describe(actor)).wanted)
            if self._wanted is not None:
                await _await(actor.keep.remote(self._wanted))
        return description

    def _hear_wanted(self, kept: Wanted | None) -> None:
        self._wanted = max((one for one in (kept, self._wanted) if one is not None), default=None)

    @property
    def _pages(self) -> str:
        """What became of a shard's pages, for the log."""
        storage = self._config.shard.storage
        return "its pages are gone" if storage is None else f"it has its pages in {storage.path}"

    def _no_start(self, shard: int, error: Exception) -> str:
        free = free_resources()
        detail = f"no answer within {self._start_timeout_s:g} s"
        if not isinstance(error, TimeoutError):
            detail = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return (
            f"shard {shard} of pool {self._pool!r} did not start ({detail}); it asks Ray for "
            f"{self._asked()}; free now: CPU={free.get('CPU', 0):g}, GPU={free.get('GPU', 0):g}. "
            "Lower shard.num_cpus / shard.num_gpus in the config, or add nodes"
        )

    def _asked(self) -> str:
        config = self._config.shard
        asked = f"num_cpus={config.num_cpus:g}, num_gpus={config.num_gpus:g}"
        return f"{asked}, resources={config.resources}" if config.resources else asked


async def _describe(actor: Any) -> Description:
    """The actor's description, waiting while Ray starts or restarts it. The caller bounds the wait."""
    while True:
        try:
            description: Description = await _await(actor.describe.remote())
            return description
        except ActorUnavailableError:
            await asyncio.sleep(_POLL_S)


async def _await(reference: Any) -> Any:
    """A Ray result without blocking the IO loop."""
    return await asyncio.wrap_future(reference.future())
