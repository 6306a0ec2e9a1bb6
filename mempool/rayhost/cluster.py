"""`up` and `down`: a pool on an existing Ray cluster, or on one started here, from the command's own process.

Leaves what runs afterwards to the actors, and Ray's own coming and going to ``ray_process``.
"""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mempool.config import ClusterConfig, is_loopback
from mempool.errors import AlreadyExists, ConfigError, MempoolError, NotFound, PoolUnreachable, StorageFailed
from mempool.rayhost import ray_process
from mempool.rayhost.actors import NAMESPACE, cluster_resources, controller_name, make_actor, node_ip, pool_of
from mempool.rayhost.apply import create_tables, still_to_create
from mempool.rayhost.controller_actor import ControllerProcess
from mempool.rayhost.keys import PoolKeys, client_tls_of
from mempool.rayhost.launcher import RayLauncher
from mempool.rayhost.resources import amount_text, asked
from mempool.rayhost.serving import advertised_host
from mempool.rayhost.state.folders import state_folder
from mempool.rayhost.state.kept import drop_kept, kept_shards
from mempool.rayhost.state.records import (
    PoolRecord,
    forget_record,
    hand_over_ray,
    read_record,
    record_path,
    write_record,
)
from mempool.wire.channels import loop

_UP_TIMEOUT_S = 300.0
_ROOM_TIMEOUT_S = 60.0
"""Ray answers at once what it has free."""
_SAY_EVERY_S = 15.0
_ASK_TIMEOUT_S = 2.0
_DOWN_TIMEOUT_S = 60.0

Say = Callable[[str], None]


def up(config: ClusterConfig, *, say: Say = print, timeout_s: float = _UP_TIMEOUT_S) -> PoolRecord:
    """Start a pool and its tables; the pool goes on when this process ends.

    Args:
        config: What to start.
        say: Told each step, and now and then what is waited for.
        timeout_s: How long Ray may take to start, and then the shards; filling tables has no limit of its own here.

    Raises:
        AlreadyExists: A pool of that name runs already.
        ConfigError: The pool's port is taken, or there is no folder or no room for what has to be written down.
        PoolUnreachable: Ray cannot be reached or started.
        ShardUnavailable: The shards ask for more than Ray has free, and no nodes join by themselves.
        MempoolError: The pool did not start; what was started for it was ended again.
    """
    name, keys = config.pool.name, PoolKeys.of(config)
    if not config.pool.port:  # taken now, so that it is the same when the controller comes back
        config = config.model_copy(update={"pool": config.pool.model_copy(update={"port": ray_process.free_port()})})
    _require_down(name)
    state_folder()  # where there can be none, nothing is started
    _require_port(config)
    ray_address, ray_pid = _ray_for(config, say, timeout_s)
    try:
        if _actors(name):
            raise _already(name, ray_address)
        before = read_record(name)
        shards = config.pool.shards
        say(f"starting pool {name!r}: {shards} {'shard' if shards == 1 else 'shards'}")
        loop.run(RayLauncher(config, keys=keys).require_room(shards), timeout_s=_ROOM_TIMEOUT_S)
        for line in (*_shortages(config), *_out_of_reach(config), *_not_kept(config)):
            say(line)
        try:
            controller = _make_controller(config, keys, timeout_s)
        except ValueError:  # another `up` came first: what runs under this name is not this one's to end
            raise _already(name, ray_address) from None
        try:
            address = _started(controller, say=say, timeout_s=timeout_s)
            record = PoolRecord(name=name, address=address, ray_address=ray_address, ray_pid=ray_pid, config=config)
            write_record(record)
            tables = config.tables
            if config.shard.storage is not None:
                tables = still_to_create(config, address=address, token=keys.token, tls=keys.client_tls, say=say)
            create_tables(tables, address=address, token=keys.token, tls=keys.client_tls, say=say)
        except BaseException:
            _kill(name)
            if before is None:
                forget_record(name)
            else:  # of a pool of this name on another Ray
                write_record(before)
            raise
    except BaseException:
        ray.shutdown()
        if ray_pid is not None:
            ray_process.end(ray_pid, ray_address, say=say)
        raise
    ray.shutdown()
    return record


def down(pool: str, *, say: Say = print, drop: bool = False, config: ClusterConfig | None = None) -> None:
    """End a pool; Ray too where `up` started it and no other pool runs on it. What its shards have kept stays.

    Args:
        drop: Remove that, too; of a pool that does not run any more, on this machine.
        config: Where the pool's storage is, should no record say so.

    Raises:
        NotFound: There is no such pool on this machine's record, nor on its Ray if there is one.
        PoolUnreachable: The Ray of the record cannot be reached, and it is not one that `up` started for this pool;
            nothing was changed.
        StorageFailed: The pool is down, and what it has kept could not be removed.
    """
    record = read_record(pool)
    config = config if record is None else record.config
    storage = None if config is None else config.shard.storage
    kept = storage is not None and bool(kept_shards(storage.path, pool))
    try:
        _down(pool, record, say, drop=drop)
    except NotFound:
        if not (drop and kept):
            raise
    if storage is None:
        return
    if drop:
        drop_kept(storage.path, pool, say=say)
    elif kept:
        say(
            f"what its shards hold stays in {storage.path}: `mempool up -f FILE` brings it back, `mempool down --drop "
            "-f FILE` removes it"
        )


def _down(pool: str, record: PoolRecord | None, say: Say, *, drop: bool) -> None:
    found, others = False, set[str]()
    if record is None or record.ray_pid is None or ray_process.runs(record.ray_pid, record.ray_address):
        ray_address = "auto" if record is None else record.ray_address
        try:
            ray_process.attach(ray_address)
            found = bool(_actors(pool))
            if found:
                say(f"stopping pool {pool!r}")
                _stop(pool, say, drop=drop)
            others = {other for name in _actors(None) if (other := pool_of(name)) not in (None, pool)}
        except PoolUnreachable as error:
            if record is None:
                raise NotFound(
                    f"no pool {pool!r} was started here by `mempool up`, and no Ray of this machine answers that could "
                    f"run one ({error.message.split('. ')[0]})"
                ) from None
            if record.ray_pid is None:  # perhaps its head is away for a while, and the pool goes on
                raise PoolUnreachable(
                    f"{error.message}. Pool {pool!r} was started on that Ray, so it cannot be ended now. If that Ray "
                    f"is gone for good the pool is too: delete {record_path(pool)}"
                ) from None
            say(f"Ray at {ray_address} does not answer: the pool is gone with it")
        finally:
            ray.shutdown()
    if record is None:
        if not found:
            raise NotFound(f"no pool {pool!r} on the Ray of this machine, and none was started here by `mempool up`")
        return
    if record.ray_pid is not None:
        heir = next((other for other in sorted(others) if hand_over_ray(record, other)), None)
        if others and heir is None:  # of another user, or another state folder: not ours to end
            say(f"Ray (pid {record.ray_pid}) stays: pool {min(others)!r} runs on it; end that first, then that process")
        elif heir is None:
            ray_process.end(record.ray_pid, record.ray_address, say=say)
        else:
            say(f"Ray stays: pool {heir!r} runs on it")
    forget_record(pool)


def _require_down(pool: str) -> None:
    record = read_record(pool)
    if record is not None and record.ray_pid is not None and ray_process.runs(record.ray_pid, record.ray_address):
        raise _already(pool, record.ray_address)


def _pool_at(config: ClusterConfig) -> str | None:
    """The pool that listens where this one would; None where it is none, or one with another token."""
    from mempool.client.opening.asking import pool_status

    host = advertised_host(config, "127.0.0.1")
    try:
        tls = client_tls_of(config.pool.tls)
        return pool_status([f"{host}:{config.pool.port}"], token=config.pool.token(), tls=tls, timeout_s=0.0).name
    except MempoolError:
        return None


def _already(pool: str, ray_address: str | None = None) -> AlreadyExists:
    where = "" if ray_address is None else f" on Ray at {ray_address}"
    return AlreadyExists(
        f"pool {pool!r} runs already{where}. Change it with `mempool apply -f FILE`, end it with "
        f"`mempool down --pool {pool}`, or give the new one another pool.name"
    )


def _require_port(config: ClusterConfig) -> None:
    """A port that another process has is known before anything is started: the controller begins on this node."""
    pool = config.pool
    problem = ray_process.port_problem(pool.bind, pool.port)
    if problem is None:
        return
    there = _pool_at(config)
    if there == pool.name:
        raise _already(pool.name)
    if there is not None:
        problem = f"pool {there!r} does"
    raise ConfigError(
        f"pool {pool.name!r} cannot listen on {pool.bind}, port {pool.port}: {problem}. Set pool.port (0 takes a "
        "free one) or pool.bind, or end the process that has it"
    )


def _ray_for(config: ClusterConfig, say: Say, timeout_s: float) -> tuple[str, int | None]:
    """Ray's address, and the pid of the Ray started here for this pool. This process is attached to it then."""
    wanted = config.ray.address
    if wanted == "auto":
        try:
            found = ray_process.attach("auto")
        except PoolUnreachable:
            say("no Ray on this machine yet that this user may use")
        else:
            say(f"on the Ray at {found}, which runs already and is not ended with the pool")
            return found, None
    if wanted in ("auto", "local"):
        return ray_process.start(say, timeout_s=timeout_s)
    return ray_process.attach(wanted), None


def _actors(pool: str | None) -> list[str]:
    """Names of the actors of a pool, or of all pools, on the Ray this process is attached to."""
    names = (
        entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True) if entry["namespace"] == NAMESPACE
    )
    return sorted(name for name in names if pool is None or pool_of(name) == pool)


def _shortages(config: ClusterConfig) -> list[str]:
    """A line for each resource of which Ray has less than the shards ask for; nodes may be on their way."""
    total = cluster_resources()
    return [
        f"shards ask for {config.pool.shards} x {amount_text(name, amount)} {name} and Ray has "
        f"{amount_text(name, total.get(name, 0))} in all: "
        "waiting for nodes that join"
        for name, amount in asked(config.shard).items()
        if amount * config.pool.shards > total.get(name, 0)
    ]


def _out_of_reach(config: ClusterConfig) -> list[str]:
    """A line where other machines are let in and told an address that is none to them."""
    host = advertised_host(config, node_ip())
    if is_loopback(config.pool.bind) or not is_loopback(host):
        return []
    return [
        f"pool.bind = {config.pool.bind!r} lets other machines in, and Ray knows this one as {host}, which clients "
        "there would be told: set pool.advertise to this machine's address"
    ]


def _not_kept(config: ClusterConfig) -> list[str]:
    """A line where a shard that dies loses what it has."""
    if config.shard.storage is not None:
        return []
    return ["shards keep nothing on a disk (no shard.storage): one that dies loses its pages. Take checkpoints"]


def _make_controller(config: ClusterConfig, keys: PoolKeys, start_timeout_s: float) -> Any:
    """The controller's actor. Raises ValueError where there is one of that name."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return make_actor(
        ControllerProcess,
        config,
        keys,
        start_timeout_s,
        name=controller_name(config.pool.name),
        num_cpus=0,
        max_restarts=-1,
        scheduling_strategy=here,
    )


def _started(controller: Any, *, say: Say, timeout_s: float) -> str:
    """The pool's address, once the controller has started its shards."""
    began_s = time.monotonic()
    starting = controller.start.remote()
    while True:
        try:
            address: str = ray.get(starting, timeout=_SAY_EVERY_S)
            return address
        except GetTimeoutError:
            spent_s = time.monotonic() - began_s
            waiting = _waiting(controller)
            # The controller itself ends a start that takes too long, and knows better why.
            if spent_s > timeout_s + 2 * _SAY_EVERY_S:
                raise PoolUnreachable(
                    f"the pool did not start within {timeout_s:g} s ({waiting}); give it more with --timeout"
                ) from None
            say(f"still starting ({spent_s:.0f} s): {waiting}")
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, MempoolError):
                raise cause from None
            raise PoolUnreachable(f"the pool's controller did not start: {error}") from error


def _waiting(controller: Any) -> str:
    """What a start waits for."""
    try:
        waiting: str = ray.get(controller.waiting_for.remote(), timeout=_ASK_TIMEOUT_S)
        return waiting
    except RayError:
        return "the controller's process is not there yet"


def _stop(pool: str, say: Say, *, drop: bool) -> None:
    """Let the pool end its calls, then end what is left of its actors."""
    try:
        controller = ray.get_actor(controller_name(pool), namespace=NAMESPACE)
        ray.get(controller.stop.remote(drop), timeout=_DOWN_TIMEOUT_S)
    except (ValueError, RayError) as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, StorageFailed):
            say(cause.message)
        else:
            kept = "; what shards have kept on other machines is still there" if drop else ""
            say(f"the controller does not answer ({type(error).__name__}); ending its actors{kept}")
    _kill(pool)


def _kill(pool: str) -> None:
    """End a pool's actors, the controller first, so that it starts none anew."""
    for name in sorted(_actors(pool), key=lambda name: (name != controller_name(pool), name)):
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
        except ValueError:
            continue  # gone by itself
