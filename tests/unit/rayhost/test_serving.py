"""The controller's server: the host it tells, and that it needs no torch until a thin client looks something up."""

import subprocess
import sys

import pytest

from mempool.config import ClusterConfig, PoolConfig
from mempool.rayhost.serving import advertised_host

TOKEN = "a-token"

# A controller with a launcher of no shards, behind its real server: what its process runs, but for Ray.
CONTROLLER = """
import sys
import mempool.rayhost.controller_actor  # what the actor's process imports
from mempool.client import GrpcPool
from mempool.config import ClusterConfig, PoolConfig
from mempool.controller import Controller
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.serving import ControllerServing
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.loop import run

class NoShards:
    async def start(self, shard, *, fresh=False): raise AssertionError
    async def stop(self, info): raise AssertionError

async def serve():
    config = ClusterConfig(pool=PoolConfig(name="light", shards=1, port=0))
    serving = ControllerServing(config, node_ip="127.0.0.1", keys=PoolKeys(token=None, controller_key="k"))
    address = await serving.start(Controller("light", launcher=NoShards(), dial=serving.dial))
    api = GrpcPool([address], GrpcChannels())
    try:
        assert (await api.status()).name == "light"
        assert await api.tables() == ()
    finally:
        await api.close()
        await serving.stop()

run(serve(), timeout_s=30)
heavy = {"torch", "numba", "llvmlite", "triton"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""


def config(**pool: object) -> ClusterConfig:
    return ClusterConfig(pool=PoolConfig(name="served", shards=1, **pool))


@pytest.mark.parametrize(
    ("pool", "host"),
    [
        ({}, "127.0.0.1"),
        ({"bind": "0.0.0.0"}, "10.0.0.7"),
        ({"bind": "10.1.1.1"}, "10.1.1.1"),
        ({"bind": "0.0.0.0", "advertise": "pool.example.org"}, "pool.example.org"),
        ({"bind": "::1"}, "[::1]"),
    ],
)
def test_advertised_host(pool: dict[str, object], host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPOOL_TOKEN", TOKEN)
    assert advertised_host(config(**pool), "10.0.0.7") == host


def test_a_controllers_process_loads_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CONTROLLER], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
