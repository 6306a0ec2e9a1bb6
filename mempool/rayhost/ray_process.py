"""Ray itself: attach this process to it, start one of our own, end the one we started and nothing else.

A Ray started here runs in a process session of its own and outlives the command; it is known by its pid and port.
"""

import logging
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path

import ray
from ray.exceptions import RayError

from mempool.errors import PoolUnreachable
from mempool.rayhost.actors import NAMESPACE, NICENESS_VARIABLE
from mempool.rayhost.state.folders import (
    home_folder,
    ray_folder,
    ray_place,
    require_room,
    room_problem,
    state_folder,
    state_place,
)

# How long Ray may take without anything new in its logs; slow machines need minutes in all.
_STILL_TIMEOUT_S = 60.0
_SAY_EVERY_S = 15.0
_END_TIMEOUT_S = 45.0
_CONNECT_TIMEOUT_S = 3.0
# Nothing of a pool goes through the object store; by default Ray would take 30 % of the memory for it.
_OBJECT_STORE_BYTES = 100 * 2**20
_STATE_ROOM_BYTES = 2**20
_RAY_ROOM_BYTES = 64 * 2**20
_LOGS_KEPT = 5
# Ray gives its workers those from 10,002 up to 19,999.
_OUR_PORTS = range(20_000, 65_536)
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES_VARIABLE = "RAY_gcs_server_port_wait_time_s"
_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

Say = Callable[[str], None]


def attach(address: str) -> str:
    """Connect this process to Ray and answer Ray's address. "auto" is the Ray of this machine.

    Raises:
        PoolUnreachable: There is no Ray, or it refuses.
    """
    if ray.is_initialized():
        return str(ray.get_runtime_context().gcs_address)
    logging.getLogger("ray").setLevel(logging.ERROR)  # ray.init does the same, a little later
    where = "on this machine" if address == "auto" else f"at {address!r}"
    try:
        _use_ray_token()
        address = _found() if address == "auto" else address
        _knock(address)
        with chdir(_neutral_folder()), _few_tries():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PoolUnreachable(
            f"no Ray {where} ({reason}). Start one with `ray start --head`, set ray.address in the config to "
            "`local`, or, where Ray asks for its token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    return str(ray.get_runtime_context().gcs_address)


def start(say: Say, *, timeout_s: float = 300.0) -> tuple[str, int]:
    """Start Ray's head on this machine, attach to it, answer (address, pid).

    Args:
        say: Told what happens.
        timeout_s: How long it may take in all; it ends earlier where nothing happens for a minute.

    Raises:
        PoolUnreachable: It did not start; the message says why, ends with its log and names it.
        ConfigError: There is no folder for it, or no room on the disk.
    """
    _make_ray_token()
    state, folder = state_folder(), ray_folder()
    require_room(state, _STATE_ROOM_BYTES)
    require_room(folder, _RAY_ROOM_BYTES)
    _forget_old_logs(state)
    port = free_port()
    log = state / f"ray-{port}.log"
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--include-dashboard=false", "--disable-usage-stats", "--log-color=false",
        f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--temp-dir={folder}",
        f"--ray-client-server-port={free_port()}",  # by default one for the whole host, and Ray ends without
    ]  # fmt: skip
    say(f"starting Ray at 127.0.0.1:{port} (log: {log})")
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        # Not in the folder of the command: Python would import from there, and it could not be unmounted.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=state,
            env=_absolute_path({NICENESS_VARIABLE: "0", **os.environ}),
        )
    address = f"127.0.0.1:{port}"
    try:
        _wait_for_start(process, log, folder, say=say, timeout_s=timeout_s)
        attach(address)
    except BaseException:
        end(process.pid, address, say=say, keep_log=True)
        process.poll()
        raise
    return address, process.pid


def _wait_for_start(process: "subprocess.Popen[bytes]", log: Path, folder: Path, *, say: Say, timeout_s: float) -> None:
    """Until Ray says that it runs; raises PoolUnreachable once it has ended, stands still, or the time is over."""
    began_s = moved_s = said_s = time.monotonic()
    seen: object = None
    # Ray says so in its log once all its processes are there; its port is open a little before.
    while b"Ray runtime started" not in log.read_bytes():
        time.sleep(0.1)
        now_s = time.monotonic()
        if (progress := _progress(log, folder)) != seen:
            seen, moved_s = progress, now_s
        if process.poll() is not None:
            why = f"its process ended with {process.returncode}"
        elif now_s - moved_s > _STILL_TIMEOUT_S:
            why = f"nothing happened for {_STILL_TIMEOUT_S:g} s"
        elif now_s - began_s > timeout_s:
            why = f"it took longer than {timeout_s:g} s; give it more with --timeout"
        else:
            if now_s - said_s > _SAY_EVERY_S:
                said_s = now_s
                say(f"Ray is still starting ({now_s - began_s:.0f} s)")
            continue
        raise PoolUnreachable(_no_start(why, log, folder))


def _progress(log: Path, folder: Path) -> object:
    """What changes while Ray starts: its log, and those of its processes."""
    sizes = [log.stat().st_size]
    with suppress(OSError):
        sizes += sorted(path.stat().st_size for path in (folder / "session_latest" / "logs").iterdir())
    return sizes


def _no_start(why: str, log: Path, folder: Path) -> str:
    full = room_problem(log.parent, _STATE_ROOM_BYTES) or room_problem(folder, _RAY_ROOM_BYTES // 2)
    tail = log.read_text(errors="replace").strip()[-2000:]
    said = f"its log {log} ends with:\n{tail}" if tail else f"its log {log} is empty"
    return (
        f"Ray did not start: {f'{full} ({why})' if full else why}. Logs of its processes are in "
        f"{folder / 'session_latest' / 'logs'}; {said}"
    )


def _forget_old_logs(state: Path) -> None:
    """Logs of Rays that did not start are kept, the newest of them."""
    logs = sorted(state.glob("ray-*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[:-_LOGS_KEPT]:
        path.unlink(missing_ok=True)


def runs(pid: int, address: str) -> bool:
    """Whether a process is the Ray that was started at this address, as far as this system tells."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        return _alive(pid)  # no /proc on this system
    except OSError:
        return False
    return b"--head" in arguments and f"--port={address.rpartition(':')[2]}".encode() in arguments


def end(pid: int, address: str, *, say: Say, keep_log: bool = False) -> None:
    """End the Ray that was started here, by its pid; it takes its own processes with it, and its log by default."""
    if not runs(pid, address):  # ended long ago; the number may be another process's now
        return
    say(f"ending Ray (pid {pid})")
    os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + _END_TIMEOUT_S
    while _alive(pid):
        if time.monotonic() > deadline_s:
            say(f"Ray (pid {pid}) did not end within {_END_TIMEOUT_S:g} s; it is still ending, or stuck: see its log")
            return
        time.sleep(0.1)
    if not keep_log:
        (state_folder() / f"ray-{address.rpartition(':')[2]}.log").unlink(missing_ok=True)


def free_port() -> int:
    """A port of this machine that nobody has now, and that nobody is given by chance before it is used, or while a
    controller that had it is away: neither by the system (its ephemeral ports) nor by Ray (its workers')."""
    given = _ephemeral_ports()
    ports = [port for port in _OUR_PORTS if port not in given] or list(_OUR_PORTS)
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
    raise PoolUnreachable(f"none of this machine's ports from {_OUR_PORTS.start} on is free")


def _ephemeral_ports() -> range:
    """Those that the system gives connections."""
    first, last = 32768, 60999
    with suppress(OSError, ValueError):
        first, last = map(int, _PORT_RANGE.read_text().split())
    return range(first, last + 1)


def _alive(pid: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # reaps it where it is a child of this very process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def port_problem(host: str, port: int) -> str | None:
    """What stands in the way of listening there; None where nothing does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was left a moment ago is free
            probe.bind((host.strip("[]"), port))
    except OSError as error:  # a name that is no address too
        return error.strerror or str(error)
    return None


def _found() -> str:
    """The address of the Ray of this machine: as Ray finds it, or one started here by this user's `up`.

    Raises OSError where there is none.
    """
    try:
        from ray._private.services import canonicalize_bootstrap_address
    except ImportError:
        return "auto"
    own = ray_place()
    if (own / "ray_current_cluster").exists():  # its last one; with several on a host Ray takes that of its own folder
        with suppress(OSError):
            address = canonicalize_bootstrap_address("auto", temp_dir=str(own)) or "auto"
            _knock(address)
            return address
    return canonicalize_bootstrap_address("auto") or "auto"


@contextmanager
def _few_tries() -> Iterator[None]:
    """Ray asks twenty times, a second or more apart, whatever it is told: also that its token is another one."""
    given = os.environ.get(_TRIES_VARIABLE)
    if given is None:
        os.environ[_TRIES_VARIABLE] = "4"
    try:
        yield
    finally:
        if given is None:
            del os.environ[_TRIES_VARIABLE]


def _neutral_folder() -> Path:
    """A folder with no Python in it. Ray makes every worker look for modules first where its driver stands.

    Where that holds another `mempool` folder, say a checkout, the pool would run other code than the command.
    """
    place = state_place()
    return place if place is not None and place.is_dir() else Path(os.sep)


def _absolute_path(environment: dict[str, str]) -> dict[str, str]:
    """An environment that finds the same modules from another folder."""
    if path := environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in path.split(os.pathsep))
    return environment


def _knock(address: str) -> None:
    """Raises OSError at once where nobody listens; Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S):
        pass


def _use_ray_token() -> None:
    """Show Ray's token, where there is one, to any Ray.

    Ray does this for "auto" alone and not for an address; a Ray that asks for no token passes over it.
    """
    try:
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    except ImportError:  # an older Ray, without tokens
        return
    own = _own_token_place()
    if not any(variable in os.environ for variable in _AUTH_VARIABLES) and own is not None and own.exists():
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(own)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _make_ray_token() -> None:
    """Ray listens on all interfaces and runs whatever it is asked to: a Ray of ours asks for its token.

    The token is where Ray looks for it, so that `ray status` works too; where no home can be written to, beside the
    records. The user's own settings go first.
    """
    if any(variable in os.environ for variable in _AUTH_VARIABLES):
        return
    home = home_folder()
    try:
        if home is not None:
            _write_token(home / ".ray" / "auth_token")
            return
    except OSError:
        pass
    state_folder()
    own = _own_token_place()
    assert own is not None, "there is a state folder"
    _write_token(own)


def _own_token_place() -> Path | None:
    state = state_place()
    return None if state is None else state / "ray_auth_token"


def _write_token(path: Path) -> None:
    """Write a new token, for its owner only, unless there is one. Raises OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
