"""The process that is attacked: a controller and shards behind real gRPC; and what such a process takes.

Run as a child (``Target``); it prints a line of JSON with its addresses and lives until its standard input ends.
"""

import argparse
import asyncio
import gc
import json
import os
import secrets
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

from mempool.config import ClusterConfig
from mempool.controller import Controller
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.ray_process import free_port
from mempool.rayhost.serving import ControllerServing
from mempool.rayhost.shard_serving import ShardServing
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def descriptors(pid: int) -> int:
    """Open descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    """Threads of a process."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


class Target:
    """A served pool in a process of its own.

    Args:
        shards: How many.
        token: What calls must carry; None: nothing.
        options: More of the command line below.
        log: Where its standard error goes; None: to ours.
    """

    def __init__(
        self, *, shards: int = 2, token: str | None = None, options: tuple[str, ...] = (), log: Path | None = None
    ) -> None:
        self.token = token
        command = [sys.executable, "-m", "tests.hostile.target", "--shards", str(shards), "--port", str(free_port())]
        command += options
        if token is not None:
            command += ["--token", token]
        with nullcontext() if log is None else log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | ({} if token is None else {"MEMPOOL_TOKEN": token}),
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the target did not start"
        self._said: dict[str, Any] = json.loads(line)
        self.address: str = self._said["address"]
        self.shards: list[str] = self._said["shards"]
        self.controller_key: str | None = self._said["controller_key"]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> int:
        """End it; its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(10)
        finally:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Launcher:
    """Starts shards in this process, with what a shard's own process would start."""

    def __init__(self, config: ClusterConfig, keys: PoolKeys) -> None:
        self._config = config
        self._keys = keys
        self._serving: dict[int, ShardServing] = {}
        self.infos: dict[int, ShardInfo] = {}

    async def require_room(self, shards: int) -> None:
        """There is room."""

    async def keep_wanted(self, shards: int) -> None:
        """Nobody will ask."""

    async def starting(self) -> str:
        return ""

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:  # noqa: ARG002
        serving = ShardServing(
            self._config, shard=shard, incarnation=time.time_ns() // 1_000_000, node_ip="127.0.0.1", keys=self._keys
        )
        self.infos[shard] = await serving.start()
        self._serving[shard] = serving
        return self.infos[shard]

    async def stop(self, info: ShardInfo) -> None:
        await self._serving.pop(info.shard).stop()


async def _serve(arguments: argparse.Namespace) -> None:
    shard = {"memory": arguments.memory, "num_cpus": 0, "threads": 1, "device": "cpu"}
    pool = {"name": "target", "shards": arguments.shards, "port": arguments.port, "bind": arguments.bind}
    config = ClusterConfig.model_validate({"pool": pool, "shard": shard, "tables": []})
    keys = PoolKeys(token=arguments.token, controller_key=secrets.token_hex(32))
    launcher = _Launcher(config, keys)
    serving = ControllerServing(config, node_ip="127.0.0.1", keys=keys)
    controller = Controller("target", launcher=launcher, dial=serving.dial, trainer_lease_s=config.shard.trainer_lease)
    await controller.open(arguments.shards)
    address = await serving.start(controller)
    said = {
        "address": address,
        "shards": [launcher.infos[shard].address for shard in sorted(launcher.infos)],
        "controller_key": keys.controller_key,
    }
    print(json.dumps(said), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await serving.stop()
    await controller.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--token")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--memory", default="1GiB", help="shard.memory")
    parser.add_argument("--no-collector", action="store_true", help="run without Python's cyclic collector")
    arguments = parser.parse_args()
    if arguments.no_collector:
        gc.disable()
    run(_serve(arguments), timeout_s=None)


if __name__ == "__main__":
    main()
