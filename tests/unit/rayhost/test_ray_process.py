"""Ray's process: found by pid and port, ended alone, refused quickly where there is none."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mempool.errors import ConfigError, PoolUnreachable
from mempool.rayhost import ray_process
from mempool.rayhost.state import folders

IDLE = "while true; do sleep 0.1; done"
SLEEPER = "import time; time.sleep(60)"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line looks like that of a Ray head at port 4321."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, "--head", "--port=4321"])
    while b"--head" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait(10)


def test_only_our_own_ray_is_ended(sleeper: "subprocess.Popen[bytes]", monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    said: list[str] = []
    assert not ray_process.runs(sleeper.pid, "127.0.0.1:4322")
    ray_process.end(sleeper.pid, "127.0.0.1:4322", say=said.append)
    assert sleeper.poll() is None
    assert said == []
    assert ray_process.runs(sleeper.pid, "127.0.0.1:4321")
    ray_process.end(sleeper.pid, "127.0.0.1:4321", say=said.append)
    assert said == [f"ending Ray (pid {sleeper.pid})"]
    assert not Path(f"/proc/{sleeper.pid}").exists()
    assert not ray_process.runs(sleeper.pid, "127.0.0.1:4321")
    ray_process.end(sleeper.pid, "127.0.0.1:4321", say=said.append)
    assert len(said) == 1


def test_nobody_at_an_address() -> None:
    port = ray_process.free_port()
    with pytest.raises(PoolUnreachable, match=rf"no Ray at '127.0.0.1:{port}'.*ray start --head"):
        ray_process.attach(f"127.0.0.1:{port}")


def test_token_is_made_once_and_for_its_owner_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / ".ray" / "auth_token"
    ray_process._make_ray_token()
    token = path.read_text()
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    ray_process._make_ray_token()
    assert path.read_text() == token
    path.unlink()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray_process._make_ray_token()
    assert not path.exists()


def test_token_without_a_home_lies_beside_the_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "none" / "home"))
    monkeypatch.setenv("MEMPOOL_STATE", str(tmp_path / "state"))
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    ray_process._make_ray_token()
    path = tmp_path / "state" / "ray_auth_token"
    assert len(path.read_text()) == 64
    assert path.stat().st_mode & 0o777 == 0o600


class ActedRay:
    """Stands for `python -m ray.scripts.scripts start`: a shell script that is given its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._program = tmp_path / "ray"
        self.state = tmp_path / "state"
        self.said: list[str] = []
        monkeypatch.setenv("MEMPOOL_STATE", str(self.state))
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        monkeypatch.setattr(ray_process.sys, "executable", str(self._program))
        monkeypatch.setattr(ray_process, "attach", lambda address: address)

    def start(self, script: str, **options: float) -> tuple[str, int]:
        self._program.write_text(f"#!/bin/sh\n{script}\n")
        self._program.chmod(0o700)
        return ray_process.start(self.said.append, **options)

    def log(self) -> Path:
        (log,) = self.state.glob("ray-*.log")
        return log


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ActedRay:
    return ActedRay(monkeypatch, tmp_path)


def test_a_ray_that_ends_is_told_with_its_log_which_stays(acted: ActedRay) -> None:
    with pytest.raises(PoolUnreachable, match="its process ended with 3") as caught:
        acted.start("echo no port for you; exit 3")
    assert acted.log().read_text() == "no port for you\n"
    assert acted.log().stat().st_mode & 0o777 == 0o600
    assert str(acted.log()) in caught.value.message
    assert caught.value.message.endswith("no port for you")


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # as it shall be
def test_a_ray_may_take_its_time_while_something_happens(acted: ActedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_process, "_STILL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ray_process, "_SAY_EVERY_S", 0.2)
    steps = f"for step in 1 2 3 4 5 6; do echo $step; sleep 0.4; done; echo Ray runtime started; {IDLE}"
    _, pid = acted.start(steps)
    try:
        assert any("still starting" in line for line in acted.said)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(("still_s", "timeout_s", "why"), [(0.3, 60.0, "nothing happened"), (60.0, 0.3, "--timeout")])
def test_a_ray_that_stands_still_is_ended(
    still_s: float, timeout_s: float, why: str, acted: ActedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_process, "_STILL_TIMEOUT_S", still_s)
    with pytest.raises(PoolUnreachable, match=rf"{why}.*\n?.*half way"):
        acted.start(f"echo half way; echo $$ > pid; {IDLE}", timeout_s=timeout_s)
    pid = int((acted.state / "pid").read_text())  # it stands in the state folder, not where the command stands
    assert not Path(f"/proc/{pid}").exists()
    assert acted.log().exists()


def test_a_full_disk_is_the_reason(acted: ActedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    full = "no space left on device: /there has 0 bytes free, and 1 are needed"
    acted.state.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(folders, "room_problem", lambda *_: full)
        with pytest.raises(ConfigError, match="no space left on device"):
            acted.start("exit 1")
    assert list(acted.state.glob("ray-*.log")) == []
    monkeypatch.setattr(ray_process, "room_problem", lambda *_: full)  # it fills while Ray starts
    with pytest.raises(PoolUnreachable, match=r"no space left on device.*ended with 1.*is empty"):
        acted.start("exit 1")


def test_two_rays_of_a_host_share_no_port(acted: ActedRay) -> None:
    with pytest.raises(PoolUnreachable) as caught:
        acted.start('echo "$@"; exit 1')
    arguments = dict(part.split("=") for part in caught.value.message.splitlines()[-1].split() if "=" in part)
    ports = {int(arguments[name]) for name in ("--port", "--ray-client-server-port")}
    assert len(ports) == 2
    assert 10001 not in ports, "Ray's default for its clients"
    assert not ports & set(range(10002, 20000)), "Ray's workers may get it"
    assert arguments["--temp-dir"] == os.environ["RAY_TMPDIR"]


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("32768\t60999\n", {*range(20_000, 32_768), *range(61_000, 65_536)}),
        ("20002 65535", {20_000, 20_001}),
        ("1024 65535", set(range(20_000, 65_536))),
        ("nonsense", {*range(20_000, 32_768), *range(61_000, 65_536)}),
    ],
)
def test_a_free_port_is_none_that_the_system_gives_connections(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, allowed: set[int]
) -> None:
    monkeypatch.setattr(ray_process, "_PORT_RANGE", tmp_path / "range")
    (tmp_path / "range").write_text(given)
    assert {ray_process.free_port() for _ in range(20)} <= allowed


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    port = ray_process.free_port()
    monkeypatch.setattr(ray_process, "_OUR_PORTS", range(port, port + 1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(PoolUnreachable, match=rf"ports from {port} on"):
            ray_process.free_port()
    assert ray_process.free_port() == port


def test_a_taken_port_has_a_reason() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ray_process.port_problem("127.0.0.1", port) == "Address already in use"
    assert ray_process.port_problem("127.0.0.1", port) is None
    assert "assign" in (ray_process.port_problem("203.0.113.1", port) or ""), "no address of this host"


def test_workers_do_not_look_where_the_command_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMPOOL_STATE", str(tmp_path / "state"))
    assert ray_process._neutral_folder() == Path("/")
    (tmp_path / "state").mkdir()
    assert ray_process._neutral_folder() == tmp_path / "state"
    monkeypatch.chdir(tmp_path)
    assert ray_process._absolute_path({"PYTHONPATH": f"here{os.pathsep}/there"}) == {
        "PYTHONPATH": f"{tmp_path}/here{os.pathsep}/there"
    }
    assert ray_process._absolute_path({}) == {}
