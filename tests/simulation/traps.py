"""Faults that wait for the message on which much depends, and meet it, or who sent it, or who has it.

What befalls at random seldom falls between a freeze and the view that follows. A run has a few of these, drawn by its
seed: the message's kind, what happens then, for how long, and how many of them are let through before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from mempool.wire import methods
from tests.simulation.loop import ProcessLoop
from tests.simulation.network import Call, Network
from tests.simulation.processes import CONTROLLER, Park

Effect = Literal[
    "comes late",
    "comes again",
    "is answered late",
    "its sender dies",
    "its sender stands still",
    "its sender reaches nobody",
    "its server stands still",
    "its server hears nobody",
    "they are cut off from each other",
]
SENT: tuple[Effect, ...] = ("comes late", "comes again", "they are cut off from each other")

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
_BY_CONTROLLER: tuple[Effect, ...] = (
    "comes late",
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


class Traps:
    """The traps of one run, until ``end``.

    Args:
        traps: Each counts for itself.
        park: The processes.
        kill_trainer: Kills one, by name.
    """

    def __init__(self, traps: tuple[Trap, ...], park: Park, *, kill_trainer: Callable[[str], None]) -> None:
        self._left = {trap: [trap.skip, trap.times] for trap in traps}
        self._park = park
        self._kill_trainer = kill_trainer
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
            if left[0]:
                left[0] -= 1
            else:
                left[1] -= 1
                self._spring(trap, call)

    def _spring(self, trap: Trap, call: Call) -> None:
        network, world = self._park.network, self._park.scheduler.world
        network.counts[f"trap: {call.method.name} {trap.effect}"] += 1
        if trap.effect == "comes late":
            network.late[call.number] = trap.for_s
        elif trap.effect == "comes again":
            network.again[call.number] = trap.for_s
        elif trap.effect == "is answered late":
            network.answered_late[call.number] = trap.for_s
        else:  # not in the middle of what the process does now
            world.call_soon(self._befall, trap, call, network)

    def _befall(self, trap: Trap, call: Call, network: Network) -> None:
        if self._over:
            return
        if trap.effect == "its sender dies":
            self._kill(call.process, trap.for_s)
        elif trap.effect == "its sender stands still":
            self._stop(call.process, trap.for_s)
        elif trap.effect == "its server stands still":
            self._stop(self._server(call), trap.for_s)
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
