"""Messages and round trips of one training step of several tables, counted at the client, and the time it takes.

    python -m tests.agreement.step_messages --tables 3 --shards 4
    python -m tests.agreement.step_messages --other DIR     another checkout too, in turns; runs in both of them

A round trip is a message that waited for another's answer before it was sent; "apply" tells owners what is decided,
which the training loop does not wait for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mempool
from mempool.client import GrpcDialer, Pool
from mempool.controller import Controller
from mempool.embedded.pool import EngineLauncher
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.loop import run

COUNTED = ("gather", "update", "prepare", "commit", "discard")
BOUND_S = 60.0
BAGS, PAIRS, DIM = 64, 8, 64


@dataclass
class Counts:
    """Messages since the last ``clear``.

    Attributes:
        messages: By method; a Commit of what is decided is "apply".
        round_of: By method, the longest chain of messages, one after the other's answer, that ends with one of it.
        before: What happens to a message of a method before it goes out; for tests.
        under_way: Not answered yet.
    """

    messages: Counter[str] = field(default_factory=Counter)
    round_of: dict[str, int] = field(default_factory=dict)
    before: dict[str, Callable[[], Any]] = field(default_factory=dict)
    under_way: int = 0
    _answered: int = 0
    _since: int = 0

    def clear(self) -> None:
        """Count from now on; what is under way is no part of it."""
        self.messages.clear()
        self.round_of.clear()
        self._answered = 0
        self._since += 1

    def sent(self, name: str) -> Callable[[], None]:
        """A message goes out. Answers what is to be called when it is answered."""
        number, since = self._answered + 1, self._since
        self.messages[name] += 1
        self.under_way += 1
        self.round_of[name] = max(number, self.round_of.get(name, 0))

        def answered() -> None:
            self.under_way -= 1
            if since == self._since:
                self._answered = max(self._answered, number)

        return answered

    def dialled(self, dial: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """That dial, counted."""
        return lambda info: _Counted(dial(info), self)

    def settle(self) -> None:
        """Wait until nothing is under way, nor comes for a while."""
        quiet, end_s = 0, time.monotonic() + BOUND_S
        while quiet < 5:
            assert time.monotonic() < end_s, "it never comes to rest"
            time.sleep(0.01)
            quiet = 0 if self.under_way else quiet + 1

    def taken(self) -> dict[str, Any]:
        """As JSON; rounds: those that are waited for."""
        rounds = max((number for name, number in self.round_of.items() if name != "apply"), default=0)
        return {"messages": dict(sorted(self.messages.items())), "rounds": rounds}


class _Counted:
    """A shard whose messages are counted."""

    def __init__(self, host: Any, counts: Counts) -> None:
        self._host = host
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._host, name)
        if name not in COUNTED:
            return method

        async def counted(request: Any) -> Any:
            counts = self._counts
            answered = counts.sent("apply" if getattr(request, "decided", False) else name)
            if name in counts.before:
                await counts.before[name]()
            try:
                return await method(request)
            finally:
                answered()

        return counted


@contextmanager
def counted_pool(shards: int, *, grpc: bool = False) -> Iterator[tuple[Pool, Counts]]:
    """A pool of this process, and what its client sends; grpc: over loopback."""
    counts = Counts()
    if grpc:
        from tests.unit.client.grpc_pool import CONTROLLER_KEY, GrpcPoolHere

        here = GrpcPoolHere(shards=shards)
        dialer = GrpcDialer(GrpcChannels(token=None, controller_key=CONTROLLER_KEY))
        pool = Pool(here._controller, dial=counts.dialled(dialer.dial), name="here", timeout_s=BOUND_S)
        try:
            yield pool, counts
        finally:
            pool.close()
            run(dialer.close(), timeout_s=BOUND_S)
            here.close()
        return
    launcher = EngineLauncher(device="cpu", pool="here")
    controller = Controller("here", launcher=launcher, dial=launcher.dial)
    run(controller.open(shards), timeout_s=BOUND_S)
    dial = counts.dialled(launcher.dial)
    pool = Pool(controller, dial=dial, name="here", embedded=True, timeout_s=BOUND_S)
    try:
        yield pool, counts
    finally:
        pool.close()


class Training:
    """Steps of some tables, each spread over all shards by its columns."""

    def __init__(self, pool: Pool, counts: Counts, *, tables: int) -> None:
        config = {"num_slots": 4096, "value_dim": DIM, "layout": "columns", "block_dim": 16}
        self.tables = [
            pool.create_table(mempool.TableConfig(name=f"table{number}", **config)) for number in range(tables)
        ]
        self.optimizer = mempool.optim.PoolOptimizer(self.tables, lr=0.1)
        self.counts = counts
        self._generator = torch.Generator().manual_seed(1)

    def forward(self, *, weights: bool = False) -> torch.Tensor:
        """A loss over one look-up of each table; weights: whose gradient is wanted."""
        loss = torch.zeros(())
        for table in self.tables:
            ids = torch.randint(table.num_slots, (BAGS, PAIRS), generator=self._generator)
            loss = loss + table.gather(ids, torch.ones(BAGS, PAIRS, requires_grad=weights)).square().mean()
        return loss

    def step(self) -> dict[str, dict[str, Any]]:
        """One step. Answers what each part of it sent, until it returned."""
        found = {}
        self.counts.settle()  # of the step before
        parts: list[tuple[str, Callable[[], Any]]] = [
            ("zero_grad", self.optimizer.zero_grad),
            ("backward", lambda: None),
            ("step", self.optimizer.step),
        ]
        for name, part in parts:
            if name == "backward":
                part = self.forward().backward
            self.counts.clear()
            part()
            self.counts.settle()  # what goes on in the background is counted, too
            found[name] = self.counts.taken()
        return found

    def timed(self, steps: int) -> float:
        """Median milliseconds of zero_grad, backward and step together."""
        taken = []
        for _ in range(steps):
            loss = self.forward()
            began = time.perf_counter()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            taken.append(time.perf_counter() - began)
        return 1000 * statistics.median(taken)


def measure(tables: int, shards: int, steps: int, *, grpc: bool) -> dict[str, Any]:
    """As JSON: what one step sends, and the median of many."""
    torch.set_num_threads(1)
    with counted_pool(shards, grpc=grpc) as (pool, counts):
        training = Training(pool, counts, tables=tables)
        training.timed(3)
        sent = training.step()
        training.timed(steps // 5)
        return {"sent": sent, "step_ms": training.timed(steps)}


def _measured_at(checkout: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, on that checkout's package."""
    command = [sys.executable, str(Path(__file__)), "--child", *(["--grpc"] if options.grpc else [])]
    command += ["--tables", str(options.tables), "--shards", str(options.shards), "--steps", str(options.steps)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, timeout=600)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=3)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--grpc", action="store_true", help="over gRPC on loopback, instead of in memory")
    parser.add_argument("--other", type=Path, help="another checkout, to be measured in turns with this one")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.tables, options.shards, options.steps, grpc=options.grpc)))
        return 0
    checkouts = {"this": Path(__file__).parents[2]} | ({"other": options.other.resolve()} if options.other else {})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(options.turns):
        for name, checkout in checkouts.items():
            found[name].append(_measured_at(checkout, options))
    times = {}
    for name, runs in found.items():
        times[name] = statistics.median(each["step_ms"] for each in runs)
        print(f"{name}: {times[name]:.2f} ms (median of {[round(each['step_ms'], 2) for each in runs]})")
        for part, sent in runs[-1]["sent"].items():
            print(
                f"    {part}: {sum(sent['messages'].values())} messages {sent['messages']}, {sent['rounds']} in a row"
            )
    if len(times) == 2:
        print(f"this / other: {times['this'] / times['other']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
