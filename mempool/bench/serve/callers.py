"""Who looks up, turn by turn: contenders of this process, or of a process of its own that stands still in between.

Beside a library whose threads poll without pause, or on caches and an interpreter that others have just used, nobody's
time is his own. So a contender has a client process to itself, which together with the processes that answer it is
stopped (SIGSTOP) outside its own turns, see ``standing``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from mempool.bench.gate import Check
from mempool.bench.measuring import no_collection
from mempool.bench.processes import cpu, standing
from mempool.bench.processes.child import Child, ChildError, Parent
from mempool.bench.serve.contenders import Contender, actor, echoes, here, pools, rpc
from mempool.bench.serve.shapes import Pairs, Shape, TableSize, drawn_pairs
from mempool.rayhost.actors import kernel_variables

#: Sets of pairs: more than a turn has calls, so that no call of a turn finds its rows where another has left them.
NUM_SETS = 8
#: Ways of one process: torch's embedding_bag and the product's kernel, as in the trainer.
HERE = "here"
_SELF = "mempool.bench.serve.callers:serve"
#: To be opened: kernels may have to be compiled first, once per machine.
_OPEN_TIMEOUT_S = 600.0
_ANSWER_TIMEOUT_S = 120.0
#: To end, with its servers: Ray takes its time.
_END_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Cpu:
    """Milliseconds of CPU that one call costs: the caller's process, and those that answer; None where nobody can
    tell."""

    client_ms: float | None
    server_ms: float | None


class Caller(Protocol):
    """Contenders that take turns with those of other callers."""

    @property
    def names(self) -> Sequence[str]:
        """Of the contenders, which no other caller has."""

    def prepare(self, shape: Shape, seed: int) -> list[Check]:
        """Draw the sets of pairs that are then asked for, and check one answer of each contender."""

    def turn(self, name: str, sets: Sequence[int]) -> list[float]:
        """Look up once for each of some sets; milliseconds of each call but the first."""

    def spend(self, name: str, calls: int) -> Cpu:
        """CPU of a call, over so many in a row behind one that is not counted."""


class Within:
    """A caller in this process, which never stands still: what it calls has this process's caches and interpreter."""

    def __init__(self, table: TableSize, contenders: Sequence[Contender]) -> None:
        self._table = table
        self._contenders = {one.name: one for one in contenders}
        self._sets: list[Pairs] = []

    @property
    def names(self) -> Sequence[str]:
        return list(self._contenders)

    def prepare(self, shape: Shape, seed: int) -> list[Check]:
        self._sets = drawn_pairs(shape, self._table, seed, NUM_SETS)
        return [one.check(self._sets[0]) for one in self._contenders.values()]

    def turn(self, name: str, sets: Sequence[int]) -> list[float]:
        run, found = self._contenders[name].run, []
        with no_collection():
            for number in sets:
                begun = time.perf_counter()
                run(self._sets[number])
                found.append((time.perf_counter() - begun) * 1e3)
        return found[1:]

    def spend(self, name: str, calls: int) -> Cpu:
        one = self._contenders[name]
        return cpu_of_calls(lambda number: one.run(self._sets[number]), one.pids, NUM_SETS, calls)


def cpu_of_calls(run: Callable[[int], object], pids: Sequence[int], num_sets: int, calls: int) -> Cpu:
    """CPU of a call of this process, and of those that answer: all that they spend meanwhile.

    Args:
        run: A call on one of the sets of inputs, given by number.
        pids: Of the processes that answer.
        num_sets: Sets of inputs there are.
        calls: How many, behind one that does not count.
    """
    run(0)
    own = (os.getpid(),)
    before = cpu.spent_s(own), cpu.spent_s(pids)
    for number in range(1, calls + 1):
        run(number % num_sets)
    after = cpu.spent_s(own), cpu.spent_s(pids)
    client, server = (
        None if was is None or now is None else (now - was) * 1e3 / calls
        for was, now in zip(before, after, strict=True)
    )
    return Cpu(client, server)


class Apart:
    """A caller in a process of its own, which stands still with its servers but while it is asked. Use it with
    ``with``: it goes on, and ends, whatever has happened.

    Args:
        kind: Of KINDS.
        table: What its contenders hold.
    """

    def __init__(self, kind: str, table: TableSize) -> None:
        self.kind = kind
        arguments = {"kind": kind, "size": asdict(table)}
        self._child = Child(_SELF, arguments, name=kind, variables=kernel_variables(1), end_timeout_s=_END_TIMEOUT_S)
        self._names: list[str] = []
        self._servers: list[int] = []

    def open(self) -> None:
        """Have it start its servers, and connect. Nothing else is asked before.

        Raises:
            ChildError: Something does not start.
        """
        found = self._asked("open", timeout_s=_OPEN_TIMEOUT_S)
        if "failed" in found:
            raise ChildError(f"{self.kind} does not start: {found['failed']}")
        self._names, self._servers = found["names"], found["held"]
        standing.hold(self._servers)

    @property
    def names(self) -> Sequence[str]:
        return self._names

    def prepare(self, shape: Shape, seed: int) -> list[Check]:
        return [Check(**check) for check in self._asked("prepare", asdict(shape), seed)]

    def turn(self, name: str, sets: Sequence[int]) -> list[float]:
        times_ms: list[float] = self._asked("turn", name, list(sets))
        return times_ms

    def spend(self, name: str, calls: int) -> Cpu:
        return Cpu(**self._asked("spend", name, calls))

    def _asked(self, what: str, *given: object, timeout_s: float = _ANSWER_TIMEOUT_S) -> Any:
        """A turn of its processes: before and behind it they stand still."""
        self._go_on()
        try:
            self._child.say([what, *given])
            return self._child.hear(timeout_s)
        finally:
            standing.hold([self._child.pid, *self._servers])

    def _go_on(self) -> None:
        standing.go_on([*self._servers, self._child.pid])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._go_on()
        self._child.close()


def serve(parent: Parent, *, kind: str, size: dict[str, int]) -> None:
    """[CLIENT] an ``Apart``'s process: starts its servers when it is told to, then does what the parent asks."""
    torch.set_num_threads(1)
    table = TableSize(**size)
    if parent.hear() is None:
        return
    with ExitStack() as stack:
        try:
            contenders = stack.enter_context(KINDS[kind](table))
        except Exception as error:  # whatever ails another library: the parent says so, and measures the others
            parent.say({"failed": f"{type(error).__name__}: {error}"})
            return
        # Ray's processes may stay as they were when their driver is killed: who stands still would stay for ever.
        held = [] if kind == actor.RAY else sorted({pid for one in contenders for pid in one.pids})
        stack.callback(standing.go_on, held)  # the parent was killed while they stood still: they are asked to end next
        caller = Within(table, contenders)
        answers: dict[str, Callable[..., Any]] = {
            "prepare": lambda shape, seed: [asdict(check) for check in caller.prepare(Shape(**shape), seed)],
            "turn": caller.turn,
            "spend": lambda name, calls: asdict(caller.spend(name, calls)),
        }
        parent.say({"names": caller.names, "held": held})
        while (asked := parent.hear()) is not None:
            what, *given = asked
            parent.say(answers[what](*given))


@contextmanager
def _one(made: AbstractContextManager[Contender]) -> Iterator[list[Contender]]:
    with made as contender:
        yield [contender]


@contextmanager
def _here(table: TableSize) -> Iterator[Sequence[Contender]]:
    yield here.here(table)


#: Ways to look up, each of which has a process of its own, and its servers.
KINDS: Mapping[str, Callable[[TableSize], AbstractContextManager[Sequence[Contender]]]] = {
    HERE: _here,
    pools.EMBEDDED: lambda table: _one(pools.embedded(table)),
    **{way: partial(pools.served, ways=(way,)) for way in pools.REMOTE},
    rpc.RPC: rpc.rpc,
    actor.RAY: actor.ray_actor,
    echoes.GRPC_ECHO: lambda table: _one(echoes.grpc_echo(table)),
    echoes.UNIX_ECHO: lambda table: _one(echoes.unix_echo(table)),
}
