"""A run of `mempool bench serve`: look-ups of one client, of pools of more and more shards, of many clients at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch

from mempool.bench.gate import GateError
from mempool.bench.goals import Standing
from mempool.bench.processes.child import ChildError
from mempool.bench.run import Say, require_options
from mempool.bench.serve import load, lookups, shards
from mempool.bench.serve.callers import KINDS, Apart, Caller
from mempool.bench.serve.contenders import actor, rpc
from mempool.bench.serve.contenders.pools import Layout
from mempool.bench.serve.goals import standings
from mempool.bench.serve.load import Clients, Load
from mempool.bench.serve.lookups import LookUps
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.bench.serve.shards import Scaling
from mempool.types import StageTime

PARTS = ("lookups", "shards", "load")
#: Other libraries' ways, and whether they can be had.
_PEERS: Mapping[str, Callable[[], bool]] = {rpc.RPC: rpc.available, actor.RAY: actor.available}
_LARGE, _SMALL, _SMALLEST = Shape(1024, 128), Shape(64, 32), Shape(8, 32)


@dataclass(frozen=True)
class Workload:
    """Sizes of a run.

    Attributes:
        table: Slots and columns.
        shapes: Look-ups of one client, the large one first, then small ones.
        budget_s: Of the rounds of a shape.
        batch_s: Of the calls over which CPU is counted.
        embedded_shards: Of embedded pools that are compared.
        served_shards: Of pools in processes of their own, likewise.
        clients: Processes that look up at once.
        spells: Of each number of clients.
        spell_s: Of which length.
        settle_s: Of an open loop before that, until it is as it will be.
    """

    table: TableSize = field(default_factory=lambda: TableSize(2**18, 256))
    shapes: tuple[Shape, ...] = (_LARGE, _SMALL, _SMALLEST)
    budget_s: float = 60.0
    batch_s: float = 0.3
    embedded_shards: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    served_shards: tuple[int, ...] = (1, 2, 4)
    clients: tuple[int, ...] = (1, 4, 8)
    spells: int = 3
    spell_s: float = 2.0
    settle_s: float = 0.5

    def quick(self) -> Workload:
        """Less of everything."""
        return replace(
            self,
            shapes=self.shapes[:2],
            budget_s=self.budget_s / 4,
            embedded_shards=self.embedded_shards[:4:3],
            served_shards=self.served_shards[:2],
            clients=self.clients[:: len(self.clients) - 1 or 1],
            spells=1,
        )


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        quick: Fewer sizes, and shorter.
        rounds: Of each shape, in which each contender has a turn of several look-ups; fewer where they take long.
        only: Parts; none for all.
        ray: Whether a Ray actor takes part, where Ray is installed.
        seed: Of the table and the pairs.

    Raises:
        OptionsError: An unknown name, or no round.
    """

    quick: bool = False
    rounds: int = 300
    only: Sequence[str] = ()
    ray: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_options(self.only, PARTS, self.rounds)

    def has(self, part: str) -> bool:
        return not self.only or part in self.only


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        options: What was asked.
        workload: Of which sizes.
        lookups: Shapes of one client.
        shards: Shapes in pools of several sizes.
        load: Many clients.
        flood: One client, alone and beside a flood, by whom it asks.
        stages: Of the shard that bore the load, all of it together.
        failed: What was wrong, and not timed.
        skipped: What was left out, and why.
        standings: The goals.
    """

    options: Options
    workload: Workload
    lookups: list[LookUps] = field(default_factory=list)
    shards: list[Scaling] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    flood: dict[str, dict[str, Load]] = field(default_factory=dict)
    stages: Sequence[StageTime] = ()
    failed: list[GateError] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)


def run(options: Options, *, say: Say, workload: Workload | None = None) -> Outcome:
    """Run the parts one after the other. Everything that is started has ended when this returns, or raises.

    Args:
        options: Which, and how long.
        say: Told of each figure as it comes.
        workload: Sizes, if not the usual ones.

    Raises:
        ChildError: A process of the benchmark does not start, or ends.
    """
    workload = workload or Workload()
    if options.quick:
        workload = workload.quick()
    workload = replace(workload, table=replace(workload.table, seed=options.seed))
    outcome = Outcome(options, workload)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if options.has("lookups"):
            _lookups(outcome, say)
        if options.has("shards"):
            for layout in shards.LAYOUTS:
                _shards(outcome, layout, say)
        if options.has("load"):
            _load(outcome, say)
    finally:
        torch.set_num_threads(threads)
    outcome.standings = standings(outcome.lookups, outcome.shards, outcome.load, outcome.flood)
    return outcome


def _lookups(outcome: Outcome, say: Say) -> None:
    options, workload = outcome.options, outcome.workload
    with ExitStack() as stack:
        callers = _callers(stack, outcome, say)
        for shape in workload.shapes:
            with _gate(outcome, say):
                measured = lookups.measure(
                    shape, workload.table, callers, rounds=options.rounds, budget_s=workload.budget_s,
                    batch_s=workload.batch_s, seed=options.seed,
                )  # fmt: skip
                outcome.lookups.append(measured)
                say(f"{shape.name}: {_medians(measured)}")


def _shards(outcome: Outcome, layout: Layout, say: Say) -> None:
    options, workload = outcome.options, outcome.workload
    with ExitStack() as stack:
        say(f"starting pools, tables by {layout}")
        caller, counts = shards.start(
            stack, workload.table, layout, embedded=workload.embedded_shards, served=workload.served_shards
        )
        for shape in workload.shapes[:2]:
            with _gate(outcome, say):
                measured = shards.measure(
                    layout, counts, shape, workload.table, caller, rounds=options.rounds,
                    budget_s=workload.budget_s, batch_s=workload.batch_s, seed=options.seed,
                )  # fmt: skip
                outcome.shards.append(measured)
                say(f"{layout} {shape.name}: {_medians(measured.measured)}")


def _load(outcome: Outcome, say: Say) -> None:
    workload = outcome.workload
    large, *small = workload.shapes
    spells, length_s = workload.spells, workload.spell_s
    with ExitStack() as stack, _gate(outcome, say):
        say("starting clients")
        count = max(2, *workload.clients)
        clients = Clients(stack, workload.table, workload.shapes, count=count, seed=outcome.options.seed)
        outcome.load = load.measure(
            clients,
            [*small, large],
            workload.clients,
            spells=spells,
            length_s=length_s,
            settle_s=workload.settle_s,
            say=say,
        )
        outcome.stages = tuple(clients.stages().values())
        outcome.flood = load.measure_flood(clients, small[0], large, spells=spells, length_s=length_s)


@contextmanager
def _gate(outcome: Outcome, say: Say) -> Iterator[None]:
    """What is wrong is kept, and the others go on."""
    try:
        yield
    except GateError as error:
        outcome.failed.append(error)
        say(f"WRONG, not timed: {error}")


def _medians(measured: LookUps) -> str:
    return ", ".join(f"{name} {times.median_ms:.2f} ms" for name, times in measured.times.items())


def _callers(stack: ExitStack, outcome: Outcome, say: Say) -> list[Caller]:
    """A process for each way, opened one after the other. What another library or this system lacks is said, not
    raised."""
    say("starting processes")
    made = [stack.enter_context(Apart(kind, outcome.workload.table)) for kind in _kinds(outcome)]
    found: list[Caller] = []
    for caller in made:
        say(f"opening {caller.kind}")
        try:
            caller.open()
        except ChildError as error:
            if caller.kind not in _PEERS:
                raise
            _skip(outcome, say, f"{error}")
            continue
        if not caller.names:
            _skip(outcome, say, f"{caller.kind}: cannot be had here")
        found.append(caller)
    return found


def _kinds(outcome: Outcome) -> list[str]:
    """Of callers, without those of libraries that are not here."""
    wanted = [kind for kind in KINDS if outcome.options.ray or kind != actor.RAY]
    missing = [kind for kind in wanted if kind in _PEERS and not _PEERS[kind]()]
    outcome.skipped += [f"{kind}: not installed" for kind in missing]
    return [kind for kind in wanted if kind not in missing]


def _skip(outcome: Outcome, say: Say, why: str) -> None:
    outcome.skipped.append(why)
    say(why)
