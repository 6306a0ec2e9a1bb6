"""Faults that wait for the message on which much depends, and meet it, or who sent it, or who has it.

What befalls at random seldom falls between a freeze and the view that follows. A run has a few of these, drawn by its
seed: the message's kind, what happens then, for how long, and how many of them are let through before.
"""

import contextvars
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from mempool.wire import methods
from mempool.wire.methods import Method
from tests.simulation.loop import ProcessLoop
from tests.simulation.network import Call, Network
from tests.simulation.processes import CONTROLLER, Keeps, Park

Effect = Literal[
    "comes late",
    "comes late, of a sender that dies",
    "comes late, as all trainers die",
    "comes again",
    "comes again with a Commit",
    "is answered late",
    "its sender dies",
    "its sender stands still",
    "its sender reaches nobody",
    "its server stands still",
    "its server hears nobody",
    "they are cut off from each other",
    "its server is killed",
    "its server loses its power",
]
SENT: tuple[Effect, ...] = (
    "comes late",
    "comes late, of a sender that dies",
    "comes late, as all trainers die",
    "comes again",
    "comes again with a Commit",
    "they are cut off from each other",
)
COMES_BACK_S = 0.5
"""So soon somebody else is in the place of a sender whose message comes late."""

_CONTROL = (
    methods.FREEZE,
    methods.FREEZE,
    methods.PULL_PAGES,
    methods.EXPORT_PAGES,
    methods.SET_VIEW,
    methods.SET_VIEW,
    methods.THAW,
    methods.RESCALE,
)
_TABLES = (methods.ATTACH_TABLE, methods.ATTACH_TABLE, methods.DROP_TABLE, methods.SHARD_DROP_TABLE)
_STEPS = (
    methods.UPDATE,
    methods.PREPARE,
    methods.PREPARE,
    methods.COMMIT,
    methods.COMMIT,
    methods.DISCARD,
    methods.RESOLVE,
    methods.WRITE_ROWS,
)
_SAVING = (
    methods.MARK_TABLE,
    methods.MARK_TABLE,
    methods.WRITE_PART,
    methods.WRITE_PART,
    methods.RELEASE_MARK,
    methods.ATTACH_TABLE,
    methods.ATTACH_TABLE,
)
_RESTARTS: tuple[Effect, ...] = ("its server is killed", "its server loses its power")
_BY_CONTROLLER: tuple[Effect, ...] = (
    "comes late",
    "comes late, of a sender that dies",
    "comes again",
    "is answered late",
    "its sender dies",
    "its sender dies",
    "its sender dies",
    "its sender stands still",
    "its sender reaches nobody",
    "its server stands still",
    "its server hears nobody",
    "they are cut off from each other",
)
_BY_OTHERS: tuple[Effect, ...] = (
    "comes late",
    "comes late, of a sender that dies",
    "comes again",
    "is answered late",
    "its sender dies",
    "its sender stands still",
    "its sender stands still",
    "its sender reaches nobody",
    "its server stands still",
    "its server hears nobody",
    "they are cut off from each other",
    "they are cut off from each other",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trap:
    """What happens to a message, or by it.

    Attributes:
        path: Of its method.
        only: Of these only each round's first (the gate's), the others of a round, or what confirms a table.
        effect: What happens: as it is sent, or once it is served.
        for_s: For how long.
        skip: So many messages are let through before.
        times: How many it meets.
    """

    path: str
    effect: Effect
    for_s: float
    skip: int = 0
    times: int = 1
    only: Literal["", "first of its round", "not first of its round", "confirms"] = ""

    @classmethod
    def draw(cls, random: Random, *, rescales: bool, tables: bool) -> "Trap":
        """One of those that may meet anything in a run that moves pages, or makes tables, or neither."""
        groups = [_STEPS] + [_CONTROL] * (2 * rescales) + [_TABLES] * (2 * tables)
        group = random.choice(groups)
        return cls(
            path=random.choice(group).path,
            effect=random.choice(_BY_OTHERS if group is _STEPS else _BY_CONTROLLER),
            for_s=random.choice((0.3, 3.0, 8.0, 14.0, 25.0)) * (0.7 + 0.6 * random.random()),
            skip=random.choice((0, 0, 1, 2, 3, 5, 8)),
            times=random.choice((1, 1, 2, 4)),
        )

    @classmethod
    def draw_of_disks(cls, random: Random, *, restarts: bool, saves: bool) -> "Trap":
        """One for a run in which shards come back with their disks, or checkpoints are taken, or both."""
        group = random.choice([_SAVING] * (4 * saves) + [_STEPS, _CONTROL, _TABLES] * restarts)
        effects = _RESTARTS * (3 * restarts) + _BY_CONTROLLER * (group is _SAVING)
        return cls(
            path=random.choice(group).path,
            effect=random.choice(effects),
            for_s=random.choice((0.3, 3.0, 14.0)) * (0.7 + 0.6 * random.random()),
            skip=random.choice((0, 0, 1, 2, 3, 8, 20)),
            times=random.choice((1, 1, 2, 4)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Traps that go together, and what a run must have for them to meet anything; None: as it is drawn.

    writes: Trainers write rows at every other step.
    """

    traps: tuple[Trap, ...] = ()
    rescales: bool | None = None
    tables: bool | None = None
    goes_back: bool | None = None
    drifts: bool | None = None
    writes: bool = False

    @classmethod
    def draw(cls, random: Random) -> "Scene":
        """One in which something rare is likely."""
        return random.choice(_SCENES)(random)


NO_SCENE = Scene()


def _trap(method: Method[Any, Any], effect: Effect, for_s: float, **more: Any) -> Trap:
    return Trap(path=method.path, effect=effect, for_s=for_s, **more)


def _dies_in_a_round(random: Random) -> Scene:
    """A controller dies in a round, and none comes for longer than the freeze's lease: what was decided stands, and
    what was not is over."""
    trap = random.choice(
        (
            _trap(methods.FREEZE, "its sender dies", 25.0, only="not first of its round", skip=random.randrange(4)),
            _trap(methods.SET_VIEW, "its sender dies", 25.0, only="first of its round", skip=random.randrange(3)),
        )
    )
    return Scene(traps=(trap,), rescales=True, drifts=random.random() < 0.5)


def _late_rounds(random: Random) -> Scene:
    """What a dead controller has sent comes while another one is there, whose rounds may last for long."""
    method = random.choice((methods.FREEZE, methods.FREEZE, methods.SET_VIEW, methods.PULL_PAGES))
    only = random.choice(("", "not first of its round"))
    late = _trap(method, "comes late, of a sender that dies", 1.5 + 5.0 * random.random(), skip=1, times=3, only=only)
    long = _trap(methods.PULL_PAGES, "is answered late", 2.0 + 2.0 * random.random(), times=1000)
    return Scene(traps=(late, long) if random.random() < 0.5 else (late,), rescales=True)


def _untold_view(random: Random) -> Scene:
    """A view is decided, and some shard cannot be told."""
    effect: Effect = random.choice(("they are cut off from each other", "its server stands still"))
    return Scene(traps=(_trap(methods.SET_VIEW, effect, 14.0, only="not first of its round", times=2),), rescales=True)


def _made_half(random: Random) -> Scene:
    """A controller dies while it confirms a table."""
    return Scene(
        traps=(_trap(methods.ATTACH_TABLE, "its sender dies", 3.0 * random.random(), only="confirms", times=4),),
        tables=True,
    )


def _late_tables(random: Random) -> Scene:
    """Copies of what made and dropped tables come later."""
    again = (methods.ATTACH_TABLE, methods.DROP_TABLE, methods.SHARD_DROP_TABLE)
    return Scene(
        traps=tuple(_trap(method, "comes again", 0.5 + 5.0 * random.random(), times=1000) for method in again),
        tables=True,
    )


def _dead_trainer(random: Random) -> Scene:
    """A trainer dies with a step under way, and the next one goes on in its name."""
    method = random.choice((methods.UPDATE, methods.PREPARE, methods.COMMIT))
    effect: Effect = random.choice(("its sender dies", "comes late, of a sender that dies"))
    late = _trap(method, effect, 1.0 + 6.0 * random.random(), skip=random.randrange(20), times=3)
    return Scene(traps=(late,), goes_back=True)


def _silent_trainer(random: Random) -> Scene:
    """A trainer is not heard of for longer than its lease, with a step prepared."""
    effect: Effect = random.choice(("its sender stands still", "its sender reaches nobody"))
    trap = _trap(methods.PREPARE, effect, 14.0, skip=random.randrange(8), times=3)
    return Scene(traps=(trap,), rescales=random.random() < 0.5)


def _late_ends(random: Random) -> Scene:
    """Copies of what ended a Prepare, or was ended, come when its step is decided, and its trainer dies then. The
    freeze that held it off ends undecided, so that they are of the present view."""
    late = _trap(
        random.choice((methods.DISCARD, methods.DISCARD, methods.PREPARE)), "comes again with a Commit", 0.0, times=1000
    )
    return Scene(
        traps=(
            late,
            _trap(methods.FREEZE, "its sender dies", 0.5, only="first of its round", times=20),
            _trap(methods.COMMIT, "its sender dies", 1.0, skip=random.randrange(12), times=3),
        ),
        rescales=True,
    )


def _late_writes(random: Random) -> Scene:
    """Copies of writes come later, when others were done."""
    trap = _trap(methods.WRITE_ROWS, "comes again", 0.2 + 4.0 * random.random(), times=1000)
    return Scene(traps=(trap,), rescales=random.random() < 0.5, writes=True)


_SCENES = (
    _dies_in_a_round,
    _late_ends,
    _late_rounds,
    _untold_view,
    _made_half,
    _late_tables,
    _dead_trainer,
    _silent_trainer,
    _late_writes,
)


class Traps:
    """The traps of one run, until ``end``.

    Args:
        traps: Each counts for itself.
        park: The processes.
        kill_trainer: Kills one, by name.
        trainers: Those that run, by name.
    """

    def __init__(
        self,
        traps: tuple[Trap, ...],
        park: Park,
        *,
        kill_trainer: Callable[[str], None],
        trainers: Mapping[str, object],
    ) -> None:
        self._left = {trap: [trap.skip, trap.times] for trap in traps}
        self._rounds: dict[Trap, set[str]] = {trap: set() for trap in traps}
        self._park = park
        self._kill_trainer = kill_trainer
        self._trainers = trainers
        self._over = False

    def begin(self) -> None:
        if self._left:
            self._park.network.on_sent.append(self._sent)
            self._park.network.on_served.append(self._served)

    def end(self) -> None:
        self._over = True

    def _sent(self, call: Call) -> None:
        self._meet(call, lambda trap: trap.effect in SENT)

    def _served(self, call: Call, _: Any) -> None:
        self._meet(call, lambda trap: trap.effect not in SENT)

    def _meet(self, call: Call, now: Callable[[Trap], bool]) -> None:
        for trap, left in self._left.items():
            if self._over or trap.path != call.method.path or not now(trap) or not left[1]:
                continue
            if trap.only and not self._is_meant(trap, call):
                continue
            if left[0]:
                left[0] -= 1
            else:
                left[1] -= 1
                self._spring(trap, call)

    def _is_meant(self, trap: Trap, call: Call) -> bool:
        if trap.only == "confirms":
            return bool(call.request.mode == "confirm")
        token, known = call.request.token, self._rounds[trap]
        first = bool(token) and token not in known
        known.add(token)
        return first if trap.only == "first of its round" else bool(token) and not first

    def _spring(self, trap: Trap, call: Call) -> None:
        network, world = self._park.network, self._park.scheduler.world
        network.counts[f"trap: {call.method.name} {trap.effect}"] += 1
        if trap.effect.startswith("comes late"):
            network.late[call.number] = trap.for_s
            if trap.effect == "comes late, as all trainers die":
                world.call_soon(self._kill_trainers, context=contextvars.Context())
            elif trap.effect != "comes late":
                world.call_soon(self._kill, call.process, COMES_BACK_S, context=contextvars.Context())
        elif trap.effect == "comes again":
            network.again[call.number] = trap.for_s
        elif trap.effect == "comes again with a Commit":
            network.with_commit.add(call.number)
        elif trap.effect == "is answered late":
            network.answered_late[call.number] = trap.for_s
        else:  # not in the middle of what the process does now, nor under its deadline
            world.call_soon(self._befall, trap, call, network, context=contextvars.Context())

    def _befall(self, trap: Trap, call: Call, network: Network) -> None:
        if self._over:
            return
        if trap.effect == "its sender dies":
            self._kill(call.process, trap.for_s)
        elif trap.effect == "its sender stands still":
            self._stop(call.process, trap.for_s)
        elif trap.effect == "its server stands still":
            self._stop(self._server(call), trap.for_s)
        elif trap.effect in _RESTARTS:
            killed = trap.effect == "its server is killed"
            shard = next((n for n, process in self._park.shards.items() if process.loop.name == call.server), None)
            if shard is not None:
                keeps: Keeps = "what was written" if killed else "what was synced"
                self._park.kill_shard(shard, comes_back_s=trap.for_s, keeps=keeps)
        elif trap.effect == "they are cut off from each other":
            self._cut({(call.client, call.server), (call.server, call.client)}, trap.for_s, network)
        elif trap.effect == "its sender reaches nobody":
            self._cut({(call.client, name) for name in self._names()}, trap.for_s, network)
        elif trap.effect == "its server hears nobody":
            self._cut({(name, call.server) for name in self._names()}, trap.for_s, network)

    def _kill(self, loop: ProcessLoop, for_s: float) -> None:
        if loop.dead:
            return
        if loop.name == CONTROLLER:
            self._park.kill_controller(comes_back_s=for_s)
        elif not loop.name.startswith("shard"):
            self._kill_trainer(loop.name)

    def _kill_trainers(self) -> None:
        for name in sorted(self._trainers):
            self._kill_trainer(name)

    def _stop(self, loop: ProcessLoop | None, for_s: float) -> None:
        if loop is not None and loop is not self._park.scheduler.world:
            loop.stop()
            self._later(for_s, loop.resume)

    def _cut(self, ways: set[tuple[str, str]], for_s: float, network: Network) -> None:
        network.cut |= ways
        self._later(for_s, lambda: network.cut.difference_update(ways))

    def _later(self, after_s: float, do: Callable[[], None]) -> None:
        self._park.scheduler.world.call_later(after_s, do)

    def _server(self, call: Call) -> ProcessLoop | None:
        park = self._park
        if call.server == CONTROLLER:
            return None if park.controller is None else park.controller.loop
        return next((shard.loop for shard in park.shards.values() if shard.loop.name == call.server), None)

    def _names(self) -> list[str]:
        return [CONTROLLER, *sorted({process.loop.name for process in self._park.shards.values()})]
