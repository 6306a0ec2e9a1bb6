"""A shard served without Ray: its device, its port, its memory, and how it ends when it cannot go on."""

import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from mempool.client import GrpcDialer
from mempool.config import ClusterConfig, PoolConfig, ShardConfig
from mempool.errors import ConfigError
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.shard_serving import ShardServing, end_process, engine_device
from mempool.types import HeartbeatRequest, ShardStatus, TableStatus
from mempool.wire.channels.loop import run

KEYS = PoolKeys(token="a-token", controller_key="a-key")


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
                config(shard_ports=f"{first}-{first + 1}"), shard=3, incarnation=7, node_ip="10.0.0.7", keys=KEYS
            )
            info = await serving.start()
            dialer = GrpcDialer(KEYS.channels())
            try:
                return info.address, await dialer.dial(info).status()
            finally:
                await dialer.close()
                await serving.stop()

        address, status = run(serve(), timeout_s=30)
    assert address == f"127.0.0.1:{first + 1}"
    assert (status.info.shard, status.info.incarnation, status.info.address) == (3, 7, address)


def test_a_shards_threads_do_not_wait_long_for_each_other() -> None:
    async def serve() -> None:
        serving = ShardServing(config(), shard=0, incarnation=7, node_ip="127.0.0.1", keys=KEYS)
        await serving.start()
        await serving.stop()

    before_s = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        run(serve(), timeout_s=30)
        assert sys.getswitchinterval() <= 0.001
    finally:
        sys.setswitchinterval(before_s)


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
        await ShardServing(no_gpu, shard=0, incarnation=1, node_ip="10.0.0.7", keys=KEYS).start()

    for _ in range(3):  # the controller tries again: what is wrong must not turn into "no free port"
        with pytest.raises(ConfigError, match="no GPU that torch can use"):
            run(serve(), timeout_s=10)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_the_memory_of_the_file_is_the_engines() -> None:
    config = ClusterConfig.model_validate(
        {"pool": {"name": "p", "shards": 1}, "shard": {"memory": "1GiB", "client_memory": "200MiB"}}
    )

    async def started() -> None:
        serving = ShardServing(config, shard=0, incarnation=1, node_ip="127.0.0.1", keys=KEYS)
        await serving.start()
        try:
            engine = serving._engine
            assert engine is not None
            status = await engine.status()
            assert status.client_limit_bytes == 200 * 2**20
            assert status.page_limit_bytes == 2**30 - 200 * 2**20 - 128 * 2**20
            assert engine._budget.commit_bytes == 128 * 2**20
            on_fatal = engine._thread._on_fatal
            assert isinstance(on_fatal, partial)
            assert on_fatal.args == (end_process,)
        finally:
            await serving.stop()

    run(started(), timeout_s=60)


@pytest.mark.parametrize("end", ["a thread", "the main thread"])
def test_a_process_that_cannot_go_on_ends_at_once(end: str) -> None:
    """Whatever other threads do, and without giving anybody an answer."""
    script = (
        "import threading, time\n"
        "from mempool.rayhost.shard_serving import end_process\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "end = lambda: end_process(RuntimeError('CUDA error: an illegal memory access was encountered'))\n"
        + ("threading.Thread(target=end).start()\ntime.sleep(60)\n" if end == "a thread" else "end()\n")
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 70
    assert "cannot go on and ends its process: RuntimeError: CUDA error" in done.stderr


def test_a_shard_keeps_what_trainers_hold_for_the_lease_of_its_config() -> None:
    async def serve() -> float:
        lease = ClusterConfig(pool=PoolConfig(name="served", shards=1), shard=ShardConfig(trainer_lease=2.5))
        serving = ShardServing(lease, shard=0, incarnation=7, node_ip="127.0.0.1", keys=KEYS)
        info = await serving.start()
        dialer = GrpcDialer(KEYS.channels())
        try:
            reply = await dialer.dial(info).heartbeat(HeartbeatRequest(incarnation=7, group="g", rank=0))
            return reply.lease_s
        finally:
            await dialer.close()
            await serving.stop()

    assert run(serve(), timeout_s=30) == 2.5


def test_a_shard_that_a_round_holds_may_own_what_has_come() -> None:
    """The gate may have decided the round, and the pages be gone where they came from."""
    status = TableStatus(
        table_id=1,
        name="facts",
        epoch=1,
        version=0,
        pages=0,
        lost_pages=0,
        num_bytes=0,
        updates_held=0,
        updates_applied=0,
        lookups=0,
        frozen=True,
    )
    assert not status.is_needed
    assert replace(status, round="token").is_needed
    assert replace(status, lost_pages=1).is_needed
