"""[CLIENT] One of many: looks up as its parent asks, in a closed loop or at given moments, and tells how long it took.

Commands, a JSON line each: see ``Spell``. Begins are on the monotonic clock, which all processes of a host share.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mempool.bench.processes.child import Parent
from mempool.bench.serve.contenders import Contender, echoes, pools
from mempool.bench.serve.contenders.echoes import Echo
from mempool.bench.serve.shapes import Pairs, Shape, TableSize, drawn_pairs

_CALL_TIMEOUT_S = 120.0
#: Calls of an open loop that one client has under way at most: a later one waits, and its wait counts.
OPEN_THREADS = 4
#: An open loop that cannot keep up ends after so many times its length.
_LATE = 2.0


@dataclass(frozen=True)
class Spell:
    """What a client does for a while.

    Attributes:
        target: Name of the contender that is asked.
        shape: [bags, pairs].
        begin_s: When it begins, on the monotonic clock.
        length_s: How long.
        threads: That look up at the same time.
        rate: Arrivals a second in the mean, as a Poisson process has them; None: each thread calls again at once.
        seed: Of the arrivals.
        calls: So many at most, in a closed loop; None: as many as its length allows.
        settle_s: What begins so soon is not counted: threads open lines of their own then, and meet all at once.
    """

    target: str
    shape: list[int]
    begin_s: float
    length_s: float
    threads: int = 1
    rate: float | None = None
    seed: int = 0
    calls: int | None = None
    settle_s: float = 0.0


def serve(parent: Parent, *, targets: dict[str, str], size: dict[str, int], shapes: list[list[int]], seed: int) -> None:
    """Connect, check an answer of each target and shape, then do what the parent asks.

    Args:
        parent: Who asks.
        targets: Addresses by the contender's name; "" of an embedded pool.
        size: Of the table.
        shapes: That will be asked for.
        seed: Of this client's pairs.
    """
    torch.set_num_threads(1)
    table = TableSize(**size)
    sets = {tuple(shape): drawn_pairs(Shape(*shape), table, seed) for shape in shapes}
    with ExitStack() as stack:
        contenders = {name: _connected(stack, name, address, table) for name, address in targets.items()}
        parent.say(
            [
                {"contender": name, "shape": shape, "error": check.error, "tolerance": check.tolerance}
                for name, contender in contenders.items()
                for shape in shapes
                for check in [contender.check(sets[tuple(shape)][0])]
            ]
        )
        while (asked := parent.hear()) is not None:
            spell = Spell(**asked)
            parent.say(spend(spell, contenders[spell.target].run, sets[tuple(spell.shape)]))


def _connected(stack: ExitStack, name: str, address: str, table: TableSize) -> Contender:
    if name == echoes.GRPC_ECHO:
        return Echo(name, table, stack.enter_context(echoes.grpc_exchange(address)))
    if name == echoes.UNIX_ECHO:
        return Echo(name, table, stack.enter_context(echoes.unix_exchange(address)))
    if name == pools.EMBEDDED:
        return stack.enter_context(pools.embedded(table))
    pool = stack.enter_context(pools.client(address, name))
    return pools.look_up(name, pool.table("facts"), table)


def spend(spell: Spell, run: Callable[[Pairs], object], sets: list[Pairs]) -> dict[str, Any]:
    """Do a spell.

    Returns:
        ``latencies_ms`` of all calls that count and have ended: in an open loop from the moment at which a call was to
        begin, so that a wait behind others counts. ``unserved``: arrivals that came to nothing, as it was too late for
        them. ``served``: all that have ended. ``spent_s``: from when calls count to the end of the last one.
    """
    calls = _Calls(spell, run, sets)
    threads = [threading.Thread(target=calls.work, daemon=True) for _ in range(spell.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if calls.failed is not None:
        raise calls.failed
    spent_s = max(time.monotonic() - spell.begin_s, spell.length_s) - spell.settle_s
    return {"latencies_ms": calls.latencies_ms, "unserved": calls.unserved, "served": calls.served, "spent_s": spent_s}


class _Calls:
    """The calls of a spell, taken one after the other by its threads."""

    def __init__(self, spell: Spell, run: Callable[[Pairs], object], sets: list[Pairs]) -> None:
        self._spell, self._run, self._sets = spell, run, sets
        self._arrivals = None if spell.rate is None else iter(arrivals(spell.rate, spell.length_s, spell.seed))
        self._lock = threading.Lock()
        self._taken = 0
        self.latencies_ms: list[float] = []
        self._settling: list[float] = []
        self.unserved = 0
        self.failed: BaseException | None = None

    @property
    def served(self) -> int:
        """Calls that have ended."""
        return len(self.latencies_ms) + len(self._settling)

    def work(self) -> None:
        """[THREAD] until there is nothing left to do."""
        try:
            _sleep_until(self._spell.begin_s)
            while (call := self._next()) is not None:
                number, due_s = call
                _sleep_until(due_s)
                self._run(self._sets[number % len(self._sets)])
                counts = due_s >= self._spell.begin_s + self._spell.settle_s
                (self.latencies_ms if counts else self._settling).append((time.monotonic() - due_s) * 1e3)
        except BaseException as error:
            self.failed = error

    def _next(self) -> tuple[int, float] | None:
        """Number and due moment of the next call."""
        now_s, spell = time.monotonic(), self._spell
        with self._lock:
            if self._arrivals is None:
                if self._taken and (now_s >= spell.begin_s + spell.length_s or self._taken == spell.calls):
                    return None
                self._taken += 1
                return self._taken, now_s
            if now_s >= spell.begin_s + spell.length_s * (1.0 + _LATE):
                self.unserved += sum(1 for _ in self._arrivals)
                return None
            arrival_s = next(self._arrivals, None)
            if arrival_s is None:
                return None
            self._taken += 1
            return self._taken, spell.begin_s + arrival_s


def arrivals(rate: float, length_s: float, seed: int) -> list[float]:
    """Moments from 0 to ``length_s``, as a Poisson process of so many a second has them; one at least."""
    draw, found, at_s = random.Random(seed), [], 0.0
    while (at_s := at_s + draw.expovariate(rate)) < length_s:
        found.append(at_s)
    return found or [0.0]


def _sleep_until(moment_s: float) -> None:
    left_s = moment_s - time.monotonic()
    if left_s > 0.0:
        time.sleep(left_s)
