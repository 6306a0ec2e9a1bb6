"""`up` and `down`: a pool on an existing Ray cluster, or on one started here, from the command's own process.

A Ray that `up` starts runs in a process session of its own and outlives the command; its pid is written down under the
pool's name, and `down` ends that process and nothing else.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mempool.config import ClusterConfig, resolve
from mempool.control.controller_actor import ControllerProcess
from mempool.control.naming import NAMESPACE, controller_name
from mempool.errors import AlreadyExists, MempoolError, NotFound, PoolUnreachable

_RAY_START_TIMEOUT_S = 60.0
_RAY_END_TIMEOUT_S = 30.0
_UP_TIMEOUT_S = 300.0
_DOWN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRecord:
    """What `up` writes down for `down`. ray_pid: the Ray it started; None where it joined one."""

    name: str
    address: str
    ray_address: str
    ray_pid: int | None


def up(config: ClusterConfig, *, say: Callable[[str], None] = print) -> PoolRecord:
    """Start a pool and its tables; the pool goes on when this process ends.

    Args:
        config: What to start.
        say: Told each step.

    Raises:
        AlreadyExists: A pool of that name runs on this Ray.
        PoolUnreachable: Ray cannot be reached or started.
        MempoolError: The pool did not start; a Ray started for it was ended again.
    """
    token = config.pool.token()
    ray_address, ray_pid = _ray_for(config, say)
    try:
        _attach(ray_address)
        if _controller(config.pool.name) is not None:
            raise AlreadyExists(
                f"pool {config.pool.name!r} runs already on Ray at {ray_address}; change it with `mempool apply -f "
                f"FILE`, or end it with `mempool down --pool {config.pool.name}`"
            )
        say(f"starting pool {config.pool.name!r}: {config.pool.shards} shards")
        address = _start_controller(config, token)
        record = PoolRecord(name=config.pool.name, address=address, ray_address=ray_address, ray_pid=ray_pid)
        _write_record(record)
    except BaseException:
        if ray_pid is not None:
            ray.shutdown()
            _end_process(ray_pid, say)
        raise
    _create_tables(config, address, token, say)
    ray.shutdown()
    return record


def down(pool: str, *, say: Callable[[str], None] = print) -> None:
    """End a pool; Ray too where `up` started it.

    Raises:
        NotFound: There is no such pool on this machine's record nor on Ray.
        PoolUnreachable: Ray cannot be reached.
    """
    record = _read_record(pool)
    ray_address = "auto" if record is None else record.ray_address
    found = False
    try:
        _attach(ray_address)
        found = _stop_actors(pool, say)
    except PoolUnreachable:
        if record is None or record.ray_pid is None:
            raise
        say(f"Ray at {ray_address} does not answer")
    finally:
        ray.shutdown()
    if record is not None:
        if record.ray_pid is not None:
            _end_process(record.ray_pid, say)
        _record_path(pool).unlink(missing_ok=True)
    elif not found:
        raise NotFound(f"no pool {pool!r} on Ray at {ray_address}, and none was started by `mempool up` here")


def _ray_for(config: ClusterConfig, say: Callable[[str], None]) -> tuple[str, int | None]:
    """Ray's address, and the pid of the Ray started here for this pool."""
    wanted = config.ray.address
    if wanted not in ("auto", "local"):
        return wanted, None
    if wanted == "auto":
        try:
            _attach("auto")
            return str(ray.get_runtime_context().gcs_address), None
        except PoolUnreachable:
            say("no Ray here yet")
    return _start_ray(say)


def _start_ray(say: Callable[[str], None]) -> tuple[str, int]:
    port = _free_port()
    log = _state_dir() / f"ray-{port}.log"
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--include-dashboard=false", "--disable-usage-stats",
    ]  # fmt: skip
    say(f"starting Ray at 127.0.0.1:{port} (log: {log})")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"127.0.0.1:{port}"
    deadline = time.monotonic() + _RAY_START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if _listens(port):
            try:
                _attach(address)
                return address, process.pid
            except PoolUnreachable:
                pass
        time.sleep(0.2)
    _end_process(process.pid, say)
    tail = log.read_text(errors="replace").strip()[-2000:]
    raise PoolUnreachable(f"Ray did not start within {_RAY_START_TIMEOUT_S:g} s; its log {log} ends with:\n{tail}")


def _attach(address: str) -> None:
    """Connect this process to Ray. Raises PoolUnreachable."""
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise PoolUnreachable(
            f"no Ray at {address!r} ({str(error).strip().splitlines()[0]}); start one with `ray start --head`, or set "
            "ray.address in the config to `local`"
        ) from None


def _controller(pool: str) -> "ray.actor.ActorHandle[ControllerProcess] | None":
    try:
        return ray.get_actor(controller_name(pool), namespace=NAMESPACE)
    except ValueError:
        return None


def _start_controller(config: ClusterConfig, token: str | None) -> str:
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = (
        ray.remote(concurrency_groups={"health": 1})(ControllerProcess)
        .options(
            name=controller_name(config.pool.name),
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=node,
        )
        .remote(config, token)
    )
    try:
        address: str = ray.get(actor.start.remote(), timeout=_UP_TIMEOUT_S)
        return address
    except RayError as error:
        ray.kill(actor, no_restart=True)
        cause = getattr(error, "cause", None)
        if isinstance(cause, MempoolError):
            raise cause from None
        raise PoolUnreachable(f"the pool's controller did not start: {error}") from error


def _create_tables(config: ClusterConfig, address: str, token: str | None, say: Callable[[str], None]) -> None:
    from mempool.client import connect

    with connect(address, token=token) as pool:
        for table in config.tables:
            schema = resolve(table)
            say(f"creating table {schema.name!r}: {schema.num_slots:,} x {schema.value_dim} {schema.dtype}")
            pool.create_table(table)


def _stop_actors(pool: str, say: Callable[[str], None]) -> bool:
    controller = _controller(pool)
    if controller is None:
        return False
    say(f"stopping pool {pool!r}")
    try:
        ray.get(controller.stop.remote(), timeout=_DOWN_TIMEOUT_S)
    except RayError as error:
        say(f"the controller did not stop by itself ({type(error).__name__}); ending its actors")
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(f"{pool}/"):
                ray.kill(ray.get_actor(entry["name"], namespace=NAMESPACE), no_restart=True)
    else:
        ray.kill(controller, no_restart=True)
    return True


def _state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base) / "mempool"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _record_path(pool: str) -> Path:
    return _state_dir() / f"{pool}.json"


def _write_record(record: PoolRecord) -> None:
    _record_path(record.name).write_text(json.dumps(asdict(record), indent=2) + "\n")


def _read_record(pool: str) -> PoolRecord | None:
    path = _record_path(pool)
    return PoolRecord(**json.loads(path.read_text())) if path.exists() else None


def _end_process(pid: int, say: Callable[[str], None]) -> None:
    """End the Ray that `up` started, by its pid; it takes its children with it."""
    if not _is_ray(pid):  # ended long ago; the number may be another process's now
        return
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    say(f"ending Ray (pid {pid})")
    deadline = time.monotonic() + _RAY_END_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
        time.sleep(0.1)
    say(f"Ray (pid {pid}) did not end within {_RAY_END_TIMEOUT_S:g} s; it is still ending, or stuck: see its log")


def _is_ray(pid: int) -> bool:
    """Whether a process is a `ray start`, as far as this system tells."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    except OSError:
        return False
    return b"start" in arguments and b"--head" in arguments


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
