"""Messages and round trips of one training step of several tables, counted at the client, and the time it takes.

    python -m tests.agreement.step_messages --tables 3 --shards 4
    python -m tests.agreement.step_messages --other DIR     another checkout too, in turns of some steps each

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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

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
def counted_pool(shards: int, *, over: str = "memory") -> Iterator[tuple[Pool, Counts]]:
    """A pool, and what its client sends; over: "memory" or "grpc", shards of this process, or "ray", of their own."""
    counts = Counts()
    with _POOLS[over](shards, counts) as pool:
        yield pool, counts


@contextmanager
def _in_memory(shards: int, counts: Counts) -> Iterator[Pool]:
    launcher = EngineLauncher(device="cpu", pool="here")
    controller = Controller("here", launcher=launcher, dial=launcher.dial)
    run(controller.open(shards), timeout_s=BOUND_S)
    dial, doing = counts.dialled(launcher.dial), launcher.doing
    pool = Pool(controller, dial=dial, name="here", embedded=True, doing=doing, timeout_s=BOUND_S)
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def _over_grpc(shards: int, counts: Counts) -> Iterator[Pool]:
    from tests.unit.client.grpc_pool import CONTROLLER_KEY, GrpcPoolHere

    here = GrpcPoolHere(shards=shards)
    dialer = GrpcDialer(GrpcChannels(token=None, controller_key=CONTROLLER_KEY))
    pool = Pool(here._controller, dial=counts.dialled(dialer.dial), name="here", timeout_s=BOUND_S)
    try:
        yield pool
    finally:
        pool.close()
        run(dialer.close(), timeout_s=BOUND_S)
        here.close()


@contextmanager
def _on_ray(shards: int, counts: Counts) -> Iterator[Pool]:
    from tests.integration.pools import RayPool
    from tests.integration.ray_nodes import RayNodes

    with TemporaryDirectory() as folder, RayNodes() as nodes:
        here = RayPool(Path(folder), name="steps", shards=shards, ray_at=nodes.address)
        here.up()
        dial = GrpcDialer.dial
        with mock.patch.object(GrpcDialer, "dial", lambda self, info: counts.dialled(partial(dial, self))(info)):
            pool = here.connect(timeout_s=BOUND_S)
        try:
            yield pool
        finally:
            pool.close()
            here.down()


_POOLS = {"memory": _in_memory, "grpc": _over_grpc, "ray": _on_ray}


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


def serve(tables: int, shards: int, *, over: str) -> None:
    """Says what one step sends, as JSON; then, for each line read, the median milliseconds of so many steps."""
    torch.set_num_threads(1)
    with counted_pool(shards, over=over) as (pool, counts):
        training = Training(pool, counts, tables=tables)
        training.timed(3)
        print(json.dumps(training.step()), flush=True)
        for line in sys.stdin:
            print(training.timed(int(line)), flush=True)


class _Checkout:
    """A process on a checkout's package."""

    def __init__(self, checkout: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, str(Path(__file__)), "--child", "--over", options.over]
        command += ["--tables", str(options.tables), "--shards", str(options.shards)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, env=environment, cwd=checkout, stdin=pipe, stdout=pipe, text=True)
        self.sent: dict[str, dict[str, Any]] = json.loads(self._read())
        self.step_ms: list[float] = []
        self.timed(20)
        self.step_ms.clear()

    def _read(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"the measured process has ended with {self._child.wait(BOUND_S)}")
        return line

    def timed(self, steps: int) -> float:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{steps}\n")
        self._child.stdin.flush()
        self.step_ms.append(float(self._read()))
        return self.step_ms[-1]

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(BOUND_S)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=3)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--over", choices=_POOLS, default="memory", help="how shards are reached; ray: processes")
    parser.add_argument("--other", type=Path, help="another checkout, to be measured in turns with this one")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options.tables, options.shards, over=options.over)
        return 0
    checkouts = {"this": Path(__file__).parents[2]} | ({"other": options.other.resolve()} if options.other else {})
    found = {name: _Checkout(checkout, options) for name, checkout in checkouts.items()}
    for turn in range(options.turns):
        for each in list(found.values())[:: 1 if turn % 2 else -1]:
            each.timed(options.steps)
    for name, each in found.items():
        each.close()
        print(f"{name}: {statistics.median(each.step_ms):.2f} ms a step (median of {options.turns} turns)")
        for part, sent in each.sent.items():
            print(
                f"    {part}: {sum(sent['messages'].values())} messages {sent['messages']}, {sent['rounds']} in a row"
            )
    if "other" in found:
        ratios = [mine / theirs for mine, theirs in zip(found["this"].step_ms, found["other"].step_ms, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"this / other: {middle:.3f} (median of the turns' ratios; quartiles {low:.3f} and {high:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
