"""Many clients at once, each a process: what they get together, how long each waits, what a flood costs another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from mempool.bench.gate import Check, GateError
from mempool.bench.measuring import Times
from mempool.bench.processes import cpu
from mempool.bench.processes.child import Child
from mempool.bench.run import Say
from mempool.bench.serve.client import OPEN_THREADS, Spell
from mempool.bench.serve.contenders import echoes, pools
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.rayhost.actors import kernel_variables
from mempool.types import StageTime

CLOSED, OPEN = "closed", "open"
ALONE, FLOODED = "alone", "beside a flood"
#: Of the rate that the same clients reach in a closed loop.
OPEN_SHARE = 0.7
_FLOOD_THREADS = 4
#: From an order to the begin of what all do together.
_LEAD_S = 0.05
_ANSWER_TIMEOUT_S = 120.0
_CLIENT = "mempool.bench.serve.client:serve"


@dataclass(frozen=True)
class Load:
    """What so many clients got of one server.

    Attributes:
        target: Who was asked.
        shape: What for.
        clients: How many asked.
        loop: "closed": each asks again as soon as it is answered. "open": at moments that no answer puts off.
        offered_per_s: Arrivals a second of all clients together, in an open loop.
        calls_per_s: Answers a second of all clients together, the median of spells.
        times: Of all calls of all spells.
        unserved: Arrivals that nobody came to.
        server_cpu_ms: CPU of the server's processes for one call.
        stages: Of the shard, a call's share of each: count and mean, milliseconds; nothing where there are none.
    """

    target: str
    shape: Shape
    clients: int
    loop: str
    offered_per_s: float | None
    calls_per_s: float
    times: Times
    unserved: int
    server_cpu_ms: float | None
    stages: dict[str, dict[str, float]]

    def document(self) -> dict[str, Any]:
        """As it stands in the result file."""
        return {
            "target": self.target,
            "shape": self.shape.name,
            "clients": self.clients,
            "loop": self.loop,
            "offered_per_s": self.offered_per_s,
            "calls_per_s": self.calls_per_s,
            "calls": len(self.times.rounds_ms),
            **self.times.figures(),
            "unserved": self.unserved,
            "server_cpu_ms": self.server_cpu_ms,
            "stages": self.stages,
        }


@dataclass(frozen=True)
class _Target:
    address: str
    pids: Sequence[int]


@dataclass(frozen=True)
class Spent:
    """One spell of several clients. What the server spent is told where all its calls are: on ``served`` of them, also
    those that do not count."""

    latencies_ms: list[float]
    calls_per_s: float
    unserved: int
    served: int
    cpu_s: float | None
    stages: dict[str, tuple[int, float]]


class Clients:
    """A shard's process, the two echoes, and clients that are connected to all of them. Made on a stack that ends them.

    Attributes:
        address: Of the shard's pool, whose table is "facts".
        remote: Ways to it, of those that can be had here.

    Args:
        stack: Ends what is started.
        table: What the shard holds.
        shapes: That will be asked for.
        count: Clients.
        seed: Of their pairs.
        threads: Of the shard.
        floors: Whether there are echoes.

    Raises:
        ChildError: A process does not start.
        GateError: A client got a wrong answer: nothing was timed.
    """

    def __init__(
        self,
        stack: ExitStack,
        table: TableSize,
        shapes: Sequence[Shape],
        *,
        count: int,
        seed: int,
        threads: int = 1,
        floors: bool = True,
    ) -> None:
        serving = stack.enter_context(pools.serving(table, threads=threads))
        self._pool, self.address = serving.pool, serving.process.address
        self.remote = [pools.GRPC]
        for way in pools.REMOTE[1:]:
            with pools.client(self.address, way) as pool:
                self.remote += [way] if pools.goes(way, pool, pool.table(serving.table.name)) else []
        self._targets = {name: _Target(self.address, serving.process.pids) for name in self.remote}
        if floors:
            for name, server in ((echoes.GRPC_ECHO, echoes.grpc_server()), (echoes.UNIX_ECHO, echoes.unix_server())):
                echo = stack.enter_context(server)
                self._targets[name] = _Target(echo.address, [echo.pid])
        asked = {
            "targets": {name: target.address for name, target in self._targets.items()},
            "size": asdict(table),
            "shapes": [[shape.bags, shape.pairs] for shape in shapes],
        }
        variables = kernel_variables(1)
        self._children = [
            stack.enter_context(Child(_CLIENT, {**asked, "seed": seed + number}, variables=variables))
            for number in range(count)
        ]
        found = [answer for child in self._children for answer in child.hear()]
        checks = [Check(one["contender"], float(one["error"]), one["tolerance"]) for one in found]
        if not all(check.passed for check in checks):
            raise GateError("load", checks)

    def closed(self, target: str, shape: Shape, clients: int, length_s: float) -> Spent:
        """So many clients ask again as soon as they are answered."""
        return self._spent(target, [Spell(target, _pair(shape), 0.0, length_s) for _ in range(clients)])

    def open(
        self, target: str, shape: Shape, clients: int, length_s: float, rate: float, seed: int, settle_s: float
    ) -> Spent:
        """So many clients ask at moments that come to ``rate`` a second together, which count once they have done so
        for ``settle_s``."""
        asks = Spell(target, _pair(shape), 0.0, settle_s + length_s, OPEN_THREADS, rate / clients, settle_s=settle_s)
        spells = [replace(asks, seed=seed * clients + number) for number in range(clients)]
        return self._spent(target, spells)

    def flooded(self, target: str, small: Shape, large: Shape, length_s: float) -> Spent:
        """One client asks for a little, while another asks for much in several threads; the first one's figures."""
        victim = Spell(target, _pair(small), 0.0, length_s)
        flood = Spell(target, _pair(large), 0.0, length_s, _FLOOD_THREADS)
        return self._spent(target, [victim, flood], counted=1)

    def stages(self) -> dict[str, StageTime]:
        """Of the shard, since it started."""
        (shard,) = self._pool.status().shards
        return {stage.stage: stage for stage in shard.stages}

    def _spent(self, target: str, spells: Sequence[Spell], counted: int | None = None) -> Spent:
        """Spells at the same time, a client each; the first ``counted`` are told."""
        pids, own = self._targets[target].pids, target in self.remote
        stages = self.stages() if own else {}
        before_s = cpu.spent_s(pids)
        begin_s = time.monotonic() + _LEAD_S
        asked = list(zip(self._children, spells, strict=False))
        for child, spell in asked:
            child.say(asdict(replace(spell, begin_s=begin_s)))
        answers = [child.hear(_ANSWER_TIMEOUT_S) for child, _ in asked]
        after_s = cpu.spent_s(pids)
        passed = {
            name: (stage.count - was.count, stage.total_s - was.total_s)
            for name, stage in (self.stages() if own else {}).items()
            for was in [stages.get(name, StageTime(stage=name, count=0, total_s=0.0))]
            if stage.count > was.count
        }
        told = answers[:counted]
        return Spent(
            [latency for answer in told for latency in answer["latencies_ms"]],
            sum(len(answer["latencies_ms"]) / answer["spent_s"] for answer in told),
            sum(answer["unserved"] for answer in told),
            sum(answer["served"] for answer in told),
            None if before_s is None or after_s is None or counted is not None else after_s - before_s,
            passed if counted is None else {},
        )


def measure(
    clients: Clients,
    shapes: Sequence[Shape],
    counts: Sequence[int],
    *,
    spells: int,
    length_s: float,
    settle_s: float,
    say: Say,
) -> list[Load]:
    """Closed loops of all servers and numbers of clients in turn, so many times; then open loops, at a share of it."""
    targets = (*clients.remote, echoes.GRPC_ECHO, echoes.UNIX_ECHO)
    found: list[Load] = []
    for shape in shapes:
        closed: dict[tuple[str, int], list[Spent]] = {}
        for _ in range(spells):
            for count in counts:
                for target in targets:
                    spent = clients.closed(target, shape, count, length_s)
                    closed.setdefault((target, count), []).append(spent)
        loads = [_load(target, shape, count, CLOSED, None, spent) for (target, count), spent in closed.items()]
        rates = {(load.target, load.clients): OPEN_SHARE * load.calls_per_s for load in loads}
        opened: dict[tuple[str, int], list[Spent]] = {}
        for number in range(spells):
            for (target, count), rate in rates.items():
                if target != echoes.UNIX_ECHO:  # a connection bears one call at a time
                    spent = clients.open(target, shape, count, length_s, rate, number, settle_s)
                    opened.setdefault((target, count), []).append(spent)
        loads += [
            _load(target, shape, count, OPEN, rates[target, count], some) for (target, count), some in opened.items()
        ]
        for load in loads:
            say(
                f"{shape.name}, {load.clients} clients, {load.loop} loop, {load.target}:"
                f" {load.calls_per_s:.1f} calls/s, median {load.times.median_ms:.2f} ms"
            )
        found += loads
    return found


def measure_flood(
    clients: Clients, small: Shape, large: Shape, *, spells: int, length_s: float
) -> dict[str, dict[str, Load]]:
    """A client that asks for a little, alone and beside one that floods, in turn; both over gRPC, both through shared
    memory."""
    found: dict[str, dict[str, list[Spent]]] = {target: {ALONE: [], FLOODED: []} for target in clients.remote}
    for _ in range(spells):
        for target, spent in found.items():
            spent[ALONE].append(clients.closed(target, small, 1, length_s))
            spent[FLOODED].append(clients.flooded(target, small, large, length_s))
    return {
        target: {name: _load(target, small, 1, CLOSED, None, some) for name, some in spent.items()}
        for target, spent in found.items()
    }


def _load(target: str, shape: Shape, clients: int, loop: str, offered: float | None, spent: Sequence[Spent]) -> Load:
    latencies = tuple(latency for one in spent for latency in one.latencies_ms)
    cpu_s = [one.cpu_s for one in spent if one.cpu_s is not None]
    served = sum(one.served for one in spent)
    counts: dict[str, int] = {}
    totals_s: dict[str, float] = {}
    for one in spent:
        for name, (count, total_s) in one.stages.items():
            counts[name] = counts.get(name, 0) + count
            totals_s[name] = totals_s.get(name, 0.0) + total_s
    return Load(
        target=target,
        shape=shape,
        clients=clients,
        loop=loop,
        offered_per_s=offered,
        calls_per_s=statistics.median(one.calls_per_s for one in spent),
        times=Times(latencies),
        unserved=sum(one.unserved for one in spent),
        server_cpu_ms=sum(cpu_s) * 1e3 / served if cpu_s and served else None,
        stages={name: {"count": count, "mean_ms": totals_s[name] * 1e3 / count} for name, count in counts.items()},
    )


def _pair(shape: Shape) -> list[int]:
    return [shape.bags, shape.pairs]
