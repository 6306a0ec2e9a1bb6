"""Ray itself: attach this process to it, start one of our own, end the one we started and nothing else.

A Ray started here runs in a process session of its own and outlives the command; it is known by its pid and port.
"""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ray
from ray.exceptions import RayError

from mempool.errors import PoolUnreachable
from mempool.rayhost.actors import NAMESPACE
from mempool.rayhost.records import state_folder

_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 45.0
_CONNECT_TIMEOUT_S = 3.0
# Nothing of a pool goes through the object store; by default Ray would take 30 % of the memory for it.
_OBJECT_STORE_BYTES = 100 * 2**20
_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


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
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PoolUnreachable(
            f"no Ray {where} ({reason}). Start one with `ray start --head`, set ray.address in the config to "
            "`local`, or, where Ray asks for its token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    return str(ray.get_runtime_context().gcs_address)


def start(say: Callable[[str], None]) -> tuple[str, int]:
    """Start Ray's head on this machine, attach to it, answer (address, pid).

    Raises:
        PoolUnreachable: It did not start; the message ends with its log.
    """
    _make_ray_token()
    port = free_port()
    log = state_folder() / f"ray-{port}.log"
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--include-dashboard=false", "--disable-usage-stats", "--log-color=false",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
    ]  # fmt: skip
    say(f"starting Ray at 127.0.0.1:{port} (log: {log})")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"127.0.0.1:{port}"
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    try:
        # Ray says so in its log once all its processes are there; its port is open a little before.
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline_s:
                tail = log.read_text(errors="replace").strip()[-2000:]
                raise PoolUnreachable(
                    f"Ray did not start within {_START_TIMEOUT_S:g} s; its log {log} ends with:\n{tail}"
                )
            time.sleep(0.1)
        attach(address)
    except BaseException:
        end(process.pid, address, say=say)
        raise
    return address, process.pid


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


def end(pid: int, address: str, *, say: Callable[[str], None]) -> None:
    """End the Ray that was started here, by its pid; it takes its own processes with it."""
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
    (state_folder() / f"ray-{address.rpartition(':')[2]}.log").unlink(missing_ok=True)


def free_port() -> int:
    """A port of this machine that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _alive(pid: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # reaps it where it is a child of this very process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _found() -> str:
    """The address of the Ray of this machine. Raises OSError where there is none."""
    try:
        from ray._private.services import canonicalize_bootstrap_address
    except ImportError:
        return "auto"
    return canonicalize_bootstrap_address("auto") or "auto"


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
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _make_ray_token() -> None:
    """Ray listens on all interfaces and runs whatever it is asked to: a Ray of ours asks for its token.

    The token is where Ray looks for it, so that `ray status` works too. The user's own settings go first.
    """
    if any(variable in os.environ for variable in _AUTH_VARIABLES):
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
