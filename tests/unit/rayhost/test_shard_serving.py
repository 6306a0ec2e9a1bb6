"""A shard served without Ray: its device, its port."""

import socket

import pytest
import torch

from mempool.client import GrpcDialer
from mempool.config import ClusterConfig, PoolConfig, ShardConfig
from mempool.errors import ConfigError
from mempool.rayhost.shard_serving import ShardServing, engine_device
from mempool.types import ShardStatus
from mempool.wire.channels.loop import run

TOKEN = "a-token"


def config(**pool: object) -> ClusterConfig:
    return ClusterConfig(pool=PoolConfig(name="served", shards=1, **pool))


def test_engine_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for present in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert engine_device(ShardConfig(device="auto", num_gpus=0)) == "cpu"
        assert engine_device(ShardConfig(device="auto", num_gpus=1)) == ("cuda" if present else "cpu")
        assert engine_device(ShardConfig(device="cpu")) == "cpu"
    with pytest.raises(ConfigError, match="no GPU that torch can use"):
        engine_device(ShardConfig(device="cuda", num_gpus=1))


def test_a_shard_takes_a_port_of_its_range() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        first = first - 1 if first == 65_535 else first

        async def serve() -> tuple[str, ShardStatus]:
            serving = ShardServing(
                config(shard_ports=f"{first}-{first + 1}"), shard=3, incarnation=7, node_ip="10.0.0.7", token=TOKEN
            )
            info = await serving.start()
            dialer = GrpcDialer(token=TOKEN)
            try:
                return info.address, await dialer.dial(info).status()
            finally:
                await dialer.close()
                await serving.stop()

        address, status = run(serve(), timeout_s=30)
    assert address == f"127.0.0.1:{first + 1}"
    assert (status.info.shard, status.info.incarnation, status.info.address) == (3, 7, address)


def test_a_shard_that_does_not_start_gives_its_port_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    no_gpu = ClusterConfig(
        pool=PoolConfig(name="served", shards=1, shard_ports=f"{port}-{port}"),
        shard=ShardConfig(device="cuda", num_gpus=1),
    )

    async def serve() -> None:
        await ShardServing(no_gpu, shard=0, incarnation=1, node_ip="10.0.0.7", token=None).start()

    for _ in range(3):  # the controller tries again: what is wrong must not turn into "no free port"
        with pytest.raises(ConfigError, match="no GPU that torch can use"):
            run(serve(), timeout_s=10)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
