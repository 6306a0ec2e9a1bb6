"""A Ray of several nodes on this machine, which no `mempool up` started, kept by a process of its own.

Ray forks to start a node, and a process that uses gRPC, as tests do, cannot be forked safely. Run as a program it reads
one JSON command a line and answers each with one; it ends all nodes when its input ends.
"""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

OWN_DISK = "/proc/self/cwd/disk"
"""One path that is another folder on each node that was added with a folder of its own."""
_ANSWER_S = 120


class RayNodes:
    """The session's Ray: its address, and nodes that come and go."""

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.ray_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address: str = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(_ANSWER_S)
        finally:
            self._keeper.kill()
            self._keeper.wait(10)
            self._keeper.stdout.close()

    def add(self, *, ip: str | None = None, folder: Path | None = None, **resources: float) -> int:
        """Add a node with these resources, at an address of this machine; the pid of its raylet, which names it.

        folder: In which its processes run: ``OWN_DISK`` leads each node's there.
        """
        return int(self._ask({"add": resources, "ip": ip, "folder": None if folder is None else str(folder)}))

    def remove(self, raylet: int) -> None:
        """End a node at once, as if its machine had lost power."""
        self._ask({"remove": raylet})

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(json.dumps(command) + "\n")
        self._keeper.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._keeper.stdout is not None
        ready, _, _ = select.select([self._keeper.stdout], [], [], _ANSWER_S)
        line = self._keeper.stdout.readline() if ready else ""
        assert line, "the keeper of Ray's nodes does not answer"
        return json.loads(line)


def _keep() -> None:
    from ray.cluster_utils import Cluster

    settings = {  # notice a dead node within some seconds, not 15
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 8,
    }
    answers, sys.stdout = sys.stdout, sys.stderr  # Ray prints too
    head = {"num_cpus": 2, "include_dashboard": False, "resources": {"head": 100}, "_system_config": settings}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[int, Any] = {}
    here = os.getcwd()
    try:
        print(json.dumps(cluster.address), file=answers, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            if "add" in command:
                at = {} if command["ip"] is None else {"node_ip_address": command["ip"]}
                folder = Path(command["folder"] or here)
                folder.mkdir(exist_ok=True)
                os.chdir(folder)  # of all that this node starts
                node = cluster.add_node(num_cpus=1, resources=command["add"], **at)
                pid = node.all_processes["raylet"][0].process.pid
                nodes[pid] = node
                print(json.dumps(pid), file=answers, flush=True)
            else:
                cluster.remove_node(nodes.pop(command["remove"]), allow_graceful=False)
                print(json.dumps(None), file=answers, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _keep()
