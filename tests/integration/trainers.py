"""Trainers that are processes of their own, are killed, and are replaced by others that go on where the pool stands.

As a program one trains to a last step, or until its input ends, and prints where it found the pool, and each step that
is acknowledged. A line of its input cuts its connections: ``reset``, or ``cut`` and how many seconds nothing passes.

    MEMPOOL_TOKEN=... python -m tests.integration.trainers ADDRESS --last 1000
"""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TypeVar

import mempool
from mempool.errors import StorageFailed
from tests.integration.pools import RayPool, wait_for
from tests.integration.proxy import Proxies, reached_through
from tests.support.durable_trainer import contents, differences, open_tables, train
from tests.support.memory_lives import NAMES, step_with

T = TypeVar("T")

DEADLINE_S = 180.0
"""Of a trainer's calls: whatever is killed is back by then, on a machine that does much else."""
_POLL_S = 0.1
_ENDS_S = 30.0


class Trainers:
    """One trainer after the other on a pool, which takes steps 1, 2, ... of ``durable_trainer``.

    Args:
        pool: Its tables are made where they are not there.
        last: The step after which a trainer ends by itself; None: it goes on.
        proxied: Its connections can be cut.

    Attributes:
        acknowledged: The newest step that was.
        taken_over: Where each trainer found the pool.
        longest_s: Between two steps of one trainer that were acknowledged.
        waited: How often a disk that took nothing was waited for.
        process: The one that runs.
    """

    def __init__(self, pool: RayPool, *, last: int | None = None, proxied: bool = False) -> None:
        self._pool, self._last, self._proxied = pool, last, proxied
        self.acknowledged = 0
        self.taken_over: list[int] = []
        self.longest_s = 0.0
        self.waited = 0
        self._failures: list[str] = []
        with pool.connect(timeout_s=DEADLINE_S) as client:
            open_tables(client, NAMES)
        self.begin()

    def begin(self) -> None:
        """Another one, which asks the pool where it stands."""
        options = ["--proxied"] if self._proxied else []
        options += [] if self._last is None else ["--last", str(self._last)]
        self.process = self._pool.start(
            "-m", "tests.integration.trainers", self._pool.address, *options, stdin=subprocess.PIPE
        )
        self._listener = threading.Thread(target=self._listen, args=(self.process,))
        self._listener.start()

    def kill(self) -> None:
        """SIGKILL to the one that runs. What it has said is known then."""
        self.check()
        self.close()

    def tell(self, line: str) -> None:
        """What becomes of its connections."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait_for_step(self, step: int) -> None:
        """Until that one was acknowledged."""
        wait_for(f"step {step}", lambda: self.check() or self.acknowledged >= step, within_s=2 * DEADLINE_S)

    def wait_for_steps(self, count: int) -> None:
        """Until so many more were."""
        self.wait_for_step(self.acknowledged + count)

    def end(self) -> None:
        """Wait for the last step; where there is none, for the one that is being taken."""
        if self._last is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
        else:
            self.wait_for_step(self._last)
        self.process.wait(2 * DEADLINE_S)
        self._listener.join(_ENDS_S)
        self.check()
        assert self.process.returncode == 0

    def check(self) -> None:
        """Raises AssertionError where the trainer failed, or something that was acknowledged is lost or doubled."""
        assert self.process.poll() in (None, 0), f"the trainer ended by itself with {self.process.returncode}"
        assert not self._failures, self._failures

    def close(self) -> None:
        """End it, whatever it does. Repeatable."""
        self.process.kill()
        self.process.wait(_ENDS_S)
        self._listener.join(_ENDS_S)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        said_s = float("inf")
        for line in process.stdout:
            what, _, step = line.strip().partition(" ")
            if what == "waits":
                self.waited += 1
                continue
            if what == "stands":
                self._take_over(int(step))
            else:
                if int(step) != self.acknowledged + 1:
                    self._failures.append(f"step {step} came after step {self.acknowledged}")
                self.acknowledged = int(step)
                self.longest_s = max(self.longest_s, time.monotonic() - said_s)
            said_s = time.monotonic()

    def _take_over(self, step: int) -> None:
        """The step that was in flight is applied, or is not; nothing else."""
        if not self.acknowledged <= step <= self.acknowledged + 1:
            self._failures.append(f"step {self.acknowledged} was acknowledged, and the pool stands at {step}")
        self.taken_over.append(step)
        self.acknowledged = step

    def require_undisturbed(self) -> None:
        """The pool is, bit for bit, what the acknowledged steps make of one that nobody disturbs, on one shard of this
        process. Raises AssertionError where it is not, has lost pages, or has applied other steps."""
        with self._pool.connect(timeout_s=DEADLINE_S) as client, mempool.local() as twin:
            twins = open_tables(twin, NAMES)
            contents(twins)
            for step in range(1, self.acknowledged + 1):
                train(twins, step)
            found = differences(contents(open_tables(client, NAMES)), contents(twins))
            assert not found, f"behind step {self.acknowledged} these differ from what nobody disturbed: {found}"
            assert stands(client) == self.acknowledged
            lost = [table for shard in client.status().shards for table in shard.tables if table.lost_pages]
            assert not lost, lost


def stands(pool: mempool.Pool) -> int:
    """Behind which step a pool stands, once what an earlier trainer left is applied or dropped."""
    return step_with(
        wait_for("what another trainer left to end", lambda: _versions(pool), within_s=DEADLINE_S),
    )


def _versions(pool: mempool.Pool) -> dict[str, int] | None:
    """Of every table, by name; None while a shard is away, is behind others, or holds anything of a trainer."""
    found: dict[str, set[int]] = {}
    for shard in pool.status().shards:
        if shard.state != "ready":
            return None
        for table in shard.tables:
            if table.updates_held:
                return None
            if table.pages and table.name in NAMES:
                found.setdefault(table.name, set()).add(table.version)
    if len(found) < len(NAMES) or any(len(versions) > 1 for versions in found.values()):
        return None
    return {name: max(versions) for name, versions in found.items()}


def persist(call: Callable[[], T]) -> T:
    """Make a call, again as long as the disk of a shard takes nothing."""
    ends_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return call()
        except StorageFailed as error:
            if time.monotonic() > ends_s:
                raise
            print(f"waits {error.message}", flush=True)
            time.sleep(_POLL_S)


def _obey(proxies: Proxies, enough: threading.Event) -> None:
    for line in sys.stdin:
        what, _, for_s = line.strip().partition(" ")
        for proxy in list(proxies.values()):
            proxy.reset() if what == "reset" else proxy.cut()
        if what == "cut":
            time.sleep(float(for_s))
            for proxy in list(proxies.values()):
                proxy.heal()
    enough.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--last", type=int, default=sys.maxsize)
    parser.add_argument("--proxied", action="store_true")
    options = parser.parse_args()
    proxies, enough = Proxies(), threading.Event()
    threading.Thread(target=_obey, args=(proxies, enough), daemon=True).start()
    with (
        reached_through(proxies) if options.proxied else nullcontext(),
        mempool.connect(options.address, timeout_s=DEADLINE_S) as pool,
    ):
        tables = persist(lambda: open_tables(pool, NAMES))
        step = persist(lambda: stands(pool))
        persist(lambda: contents(tables))  # as behind every step
        print(f"stands {step}", flush=True)
        while step < options.last and not enough.is_set():
            step += 1
            train(tables, step, persist=persist)
            print(f"done {step}", flush=True)


if __name__ == "__main__":
    main()
