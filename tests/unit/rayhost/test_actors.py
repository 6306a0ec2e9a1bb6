"""Names of actors, and the environment of their processes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import mempool
from mempool.rayhost import actors
from mempool.rayhost.actors import controller_name, kernel_variables, pool_of, shard_name, shard_of, shard_variables


@pytest.mark.parametrize("pool", ["local", "a.b-c_d", "shard-1"])
def test_names_lead_back(pool: str) -> None:
    assert shard_of(pool, shard_name(pool, 12)) == (12, 0)
    assert shard_of(pool, shard_name(pool, 12, 3)) == (12, 3)
    assert shard_of(pool, controller_name(pool)) is None
    assert pool_of(shard_name(pool, 0)) == pool_of(controller_name(pool)) == pool


def test_other_pools_and_other_actors_are_not_ours() -> None:
    assert shard_of("local", shard_name("local2", 1)) is None
    assert shard_of("local", "local/shard-x") is None
    assert shard_of("local", "local/shard--1") is None
    assert shard_of("local", "local/shard-1.") is None
    assert shard_of("local", "local/shard-1.x") is None
    assert pool_of("somebody's actor") is None


def test_threads_of_kernels_sleep_when_idle() -> None:
    variables = kernel_variables(3)
    assert (variables["OMP_NUM_THREADS"], variables["NUMBA_NUM_THREADS"]) == ("3", "3")
    quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    assert quiet.items() <= variables.items()


_PUT_BACK = """
import os, threading
from mempool.rayhost.actors import run_beside_others
os.nice(7)
before = threading.Thread(target=threading.Event().wait, daemon=True)
before.start()
run_beside_others()
print(*(os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs Linux, and the right to be served first"
)
def test_an_actor_runs_as_its_node_does() -> None:
    said = subprocess.run([sys.executable, "-c", _PUT_BACK], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert {int(nice) for nice in said.stdout.split()} == {os.getpriority(os.PRIO_PROCESS, 0)}


def test_an_actor_that_may_not_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(actors.os, "getpriority", lambda _, pid: 0 if pid == os.getppid() else 15)
    monkeypatch.setattr(actors.os, "setpriority", refuse)
    actors.run_beside_others()
    assert "at nice 15" in caplog.text
    assert "RAY_worker_niceness=0" in caplog.text


@pytest.mark.parametrize("installed", [False, True])
def test_workers_import_this_mempool(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(mempool.__file__).resolve().parents[1])
    monkeypatch.setattr(actors.sysconfig, "get_path", lambda _: here if installed else "/elsewhere")
    made: list[dict[str, object]] = []

    class Made:
        def options(self, **options: object) -> "Made":
            made.append(options)
            return self

        def remote(self, *_: object) -> None:
            pass

    monkeypatch.setattr(actors.ray, "remote", lambda **_: lambda _: Made())
    actors.make_actor(object, name="a", variables={"X": "1"})
    actors.make_actor(object, name="b")
    path = {} if installed else {"PYTHONPATH": here + ":${PYTHONPATH}"}
    assert made[0]["runtime_env"] == {"env_vars": {**path, "X": "1"}}
    assert made[1].get("runtime_env") == ({"env_vars": path} if path else None)


_HEAPS = """
import ctypes, re, threading
malloc = ctypes.CDLL(None).malloc
malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
met = threading.Barrier(13)
def allocate():
    met.wait(20)
    for _ in range(100):
        malloc(1000)
    met.wait(20)
    met.wait(20)
threads = [threading.Thread(target=allocate, daemon=True) for _ in range(12)]
for thread in threads:
    thread.start()
met.wait(20)
met.wait(20)
starts = [int(line.split("-")[0], 16) for line in open("/proc/self/maps") if " rw-p " in line]
print(sum(start % 2**26 == 0 for start in starts))
met.wait(20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its heaps")
def test_threads_of_a_shard_share_their_heaps(monkeypatch: pytest.MonkeyPatch) -> None:
    def heaps(**variables: str) -> int:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        found = subprocess.run(
            [sys.executable, "-c", _HEAPS], env=environment | variables, capture_output=True, text=True, timeout=60,
            check=True,
        )  # fmt: skip
        return int(found.stdout)

    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert heaps(**shard_variables(1)) <= 2
    assert heaps() > 2, "it tells nothing: they would share them anyway"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    assert shard_variables(1)["MALLOC_ARENA_MAX"] == "7", "whoever keeps the pool knows better"
