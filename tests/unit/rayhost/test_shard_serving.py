"""What a shard's process makes of its configuration, and how it ends when it cannot go on."""

import subprocess
import sys
from functools import partial

import pytest

from mempool.config import ClusterConfig
from mempool.rayhost.shard_serving import ShardServing, end_process
from mempool.wire.channels.loop import run


def test_the_memory_of_the_file_is_the_engines() -> None:
    config = ClusterConfig.model_validate(
        {"pool": {"name": "p", "shards": 1}, "shard": {"memory": "1GiB", "client_memory": "200MiB"}}
    )

    async def started() -> None:
        serving = ShardServing(config, shard=0, incarnation=1, node_ip="127.0.0.1", token=None)
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
