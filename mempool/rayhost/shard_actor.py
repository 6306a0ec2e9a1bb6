"""The Ray actor around one shard.

[CONTROLLER] creates the actor; ``describe`` answers a boot id that is new at each start of the process. ``admit`` gives
this start its incarnation, and only then is there an engine and a server: a process that Ray restarted serves nothing
before the controller knows that it is another start, whose pages are gone or were read back. Data never passes through
Ray: clients speak to the server.
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError

from mempool.config import ClusterConfig
from mempool.errors import MempoolError
from mempool.rayhost.actors import NAMESPACE, controller_name, node_id, node_ip, run_beside_others
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.state.kept import Wanted, read_wanted, remove_kept, write_wanted
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run

if TYPE_CHECKING:
    from mempool.rayhost.shard_serving import ShardServing

_CALL_TIMEOUT_S = 60.0
_SOON_S = 5.0
"""A controller waits so long for a shard that reads what it has kept, before it looks after others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a shard process says of itself.

    Attributes:
        boot_id: New at each start of the process.
        info: None until this start of it was admitted.
        wanted: What it was given to keep: how many shards the pool is meant to have; None: nothing.
        refusal: Why it could not be admitted, when it was tried last.
        node_id: The node of Ray's that it runs on.
        strayed: It is bound to another node.
    """

    boot_id: str
    info: ShardInfo | None
    wanted: Wanted | None = None
    refusal: str = ""
    node_id: str = ""
    strayed: bool = False


class ShardProcess:
    """One start of a shard's process. Made an actor by ``RayLauncher``.

    Args:
        config: The pool's configuration.
        shard: Its number.
        keys: The pool's.
        home: The node of Ray's that this actor is bound to; "": to none yet; None: it may run anywhere.
        stands_in: For another actor of this shard.
    """

    def __init__(
        self, config: ClusterConfig, shard: int, keys: PoolKeys, home: str | None = None, stands_in: bool = False
    ) -> None:
        run_beside_others()
        # Here and not above: the controller names this class too, and needs no torch.
        began_s = time.monotonic()
        import mempool.rayhost.shard_serving  # noqa: F401

        self._imported_s = time.monotonic() - began_s
        self._config = config
        self._shard = shard
        self._keys = keys
        self._boot_id = uuid.uuid4().hex
        self._node_id = node_id()
        self._strayed = home is not None and home != self._node_id
        self._serving: ShardServing | None = None
        self._info: ShardInfo | None = None
        self._wanted: Wanted | None = None
        self._refusal = ""
        self._keeping = threading.Lock()
        if stands_in or ray.get_runtime_context().was_current_actor_reconstructed:
            _tell_controller(config.pool.name)

    @ray.method(concurrency_group="health")  # answers whatever the engine does
    def describe(self) -> Description:
        """Who this is."""
        return Description(
            boot_id=self._boot_id,
            info=self._info,
            wanted=self._wanted,
            refusal=self._refusal,
            node_id=self._node_id,
            strayed=self._strayed,
        )

    @ray.method(concurrency_group="health")
    def keep(self, wanted: Wanted) -> None:
        """Keep this for a controller that is started anew; what is older than what is kept changes nothing.

        Raises:
            StorageFailed: The shard has storage, and that does not take it.
        """
        with self._keeping:
            if self._wanted is None or wanted > self._wanted:
                if self._info is not None:  # else with all that is there
                    self._write(wanted)
                self._wanted = wanted

    def admit(self, incarnation: int, fresh: bool = False) -> ShardInfo:
        """Start the engine and its server as this incarnation; a repeat answers the same.

        A shard with storage is what it was then, however long that takes.

        Args:
            incarnation: Of this start.
            fresh: What a shard of this number has kept is nothing to this pool any more.

        Raises:
            ConfigError: No port is free, there is no such device, or what lies there is another pool's.
            DataLoss: What it has kept is damaged.
            StorageFailed: It cannot be read or written.
        """
        if self._info is None:
            began_s = time.monotonic()
            storage, pool = self._config.shard.storage, self._config.pool.name
            if fresh and storage is not None:
                remove_kept(storage.path, pool, self._shard)
            info: ShardInfo | None = None
            try:
                info = run(self._serve(incarnation, node_ip()), timeout_s=_CALL_TIMEOUT_S if storage is None else None)
                self._keep_info(info)
            except MempoolError as error:
                self._refusal = error.message
                serving, self._serving = self._serving, None
                if info is not None and serving is not None:  # a later try must not find the folder locked by this one
                    run(serving.stop(), timeout_s=_CALL_TIMEOUT_S)
                raise
            if time.monotonic() - began_s > _SOON_S:
                _tell_controller(pool)  # which looks after others meanwhile
        assert self._info is not None
        return self._info

    def stop(self, drop: bool = False) -> None:
        """Let calls under way finish, then close.

        drop: Remove what it has kept, too; so is that of a shard which is wanted no more and owns nothing.
        """
        if self._serving is not None:
            owns = run(self._serving.owns(), timeout_s=_CALL_TIMEOUT_S)
            run(self._serving.stop(), timeout_s=_CALL_TIMEOUT_S)
            self._serving = None
            unwanted = self._wanted is not None and self._shard >= self._wanted.shards and not owns
            storage = self._config.shard.storage
            if storage is not None and (drop or unwanted):
                remove_kept(storage.path, self._config.pool.name, self._shard)

    def _keep_info(self, info: ShardInfo) -> None:
        """It serves, with what it was given to keep beside all else that is there."""
        storage = self._config.shard.storage
        with self._keeping:
            if storage is not None:
                kept = read_wanted(storage.path, self._config.pool.name, self._shard)
                self._wanted = max((one for one in (kept, self._wanted) if one is not None), default=None)
                if self._wanted is not None and self._wanted != kept:
                    self._write(self._wanted)
            self._info = info

    def _write(self, wanted: Wanted) -> None:
        storage = self._config.shard.storage
        if storage is not None:
            write_wanted(storage.path, self._config.pool.name, self._shard, wanted)

    async def _serve(self, incarnation: int, node_ip: str) -> ShardInfo:
        from mempool.rayhost.shard_serving import ShardServing

        self._serving = ShardServing(
            self._config,
            shard=self._shard,
            incarnation=incarnation,
            node_ip=node_ip,
            keys=self._keys,
            imported_s=self._imported_s,
        )
        return await self._serving.start()


def _tell_controller(pool: str) -> None:
    """Say that a shard's process is there again. A controller that does not hear it finds out by looking."""
    try:
        controller = ray.get_actor(controller_name(pool), namespace=NAMESPACE)
        controller.shard_is_back.remote()
    except (ValueError, RayError):  # it is away too; it asks all shards when it comes back
        return
