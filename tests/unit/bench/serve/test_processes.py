"""Processes of a benchmark: each ends with what has started it, also where it does not end by itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mempool
from mempool.bench.processes import child, cpu, standing
from mempool.bench.processes.child import Child
from mempool.bench.serve.contenders import actor
from mempool.bench.serve.shapes import TableSize
from tests.support.waiting import until

_LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="nothing is stopped elsewhere")

_STUBBORN = """
import subprocess, sys, time

def serve(parent, *, answer):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("not for the parent")
    parent.say([answer, started.pid])
    time.sleep(60)
"""


_BUSY = """
import threading

def serve(parent):
    def poll():
        while True:
            pass
    threading.Thread(target=poll, daemon=True).start()
    parent.say("up")
    parent.wait()
"""

_PARENT = """
import os, sys, time
from mempool.bench.processes import standing
from mempool.bench.processes.child import Child

child = Child("busy:serve")
child.hear()
standing.hold([child.pid])
print(child.pid, flush=True)
time.sleep(60)
"""


def _path(*first: Path) -> str:
    return os.pathsep.join(filter(None, (*map(str, first), os.environ.get("PYTHONPATH"))))


def _has_ended(pid: int) -> bool:
    """Also where nobody has taken notice of it yet."""
    try:
        return _state(pid) == "Z"
    except OSError:
        return True


def _state(pid: int) -> str:
    """One letter; "T": it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_one_that_does_not_end_is_killed_with_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stubborn.py").write_text(_STUBBORN)
    monkeypatch.setattr(child, "_END_TIMEOUT_S", 0.05)
    with Child("stubborn:serve", {"answer": "up"}, variables={"PYTHONPATH": _path(tmp_path)}) as process:
        answer, started = process.hear()
        assert answer == "up"
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    deadline_s = time.monotonic() + 10.0
    while not _has_ended(started):
        assert time.monotonic() < deadline_s, "what the child has started is still there"
        time.sleep(0.01)


@_LINUX_ONLY
def test_one_that_stands_still_takes_no_core_and_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(_BUSY)
    with Child("busy:serve", variables={"PYTHONPATH": _path(tmp_path)}) as process:
        assert process.hear() == "up"
        standing.hold([process.pid])
        until(lambda: _state(process.pid) == "T")
        before = cpu.spent_s([process.pid])
        time.sleep(0.1)
        assert cpu.spent_s([process.pid]) == before
        standing.go_on([process.pid])
        until(lambda: cpu.spent_s([process.pid]) != before)
        standing.hold([process.pid])
    assert process._process.returncode == 0, "it was told to end, not killed"
    standing.hold([process.pid])  # it has ended


@_LINUX_ONLY
def test_one_that_stands_still_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(_BUSY)
    environment = os.environ | {"PYTHONPATH": _path(tmp_path, Path(mempool.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent, parent.stdout:
        pid = int(parent.stdout.readline())
        until(lambda: _state(pid) == "T")
        parent.kill()
    until(lambda: _has_ended(pid))


def test_cpu_of_a_process_grows_as_it_works() -> None:
    before = cpu.spent_s([os.getpid()])
    if before is None:
        pytest.skip("this system does not tell")
    sum(range(1_000_000))
    after = cpu.spent_s([os.getpid(), os.getpid()])
    assert after is not None
    assert after > 2 * before > 0.0
    assert cpu.spent_s([]) == 0.0


def test_ray_ends_on_failure_and_leaves_this_processes_signals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = signal.getsignal(signal.SIGTERM)
    done: list[str] = []

    def init(**options: Any) -> None:
        assert options["address"] == "local"
        assert Path(options["_temp_dir"]).is_dir()
        done.append(options["_temp_dir"])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def no_actor(_: type) -> None:
        assert signal.getsignal(signal.SIGTERM) is mine
        raise RuntimeError("no room for an actor")

    ray = SimpleNamespace(init=init, remote=no_actor, shutdown=lambda: done.append("ended"))
    monkeypatch.setattr(actor.importlib, "import_module", lambda _: ray)
    with pytest.raises(RuntimeError, match="no room"), actor.ray_actor(TableSize(4, 4)):
        pass
    assert done[1:] == ["ended"]
    assert not Path(done[0]).exists()
