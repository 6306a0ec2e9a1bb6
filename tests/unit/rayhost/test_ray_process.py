"""Ray's process: found by pid and port, ended alone, refused quickly where there is none."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mempool.errors import PoolUnreachable
from mempool.rayhost import ray_process

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
