"""What goes wrong in a run, drawn by its seed: which kinds at all, when, whom it meets and for how long.

A run has few kinds of faults, another run others: what one kind hides another run shows.
"""

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.simulation.loop import ProcessLoop
from tests.simulation.network import Weather
from tests.simulation.processes import Keeps, Park, Trainer
from tests.simulation.traps import NO_SCENE, Scene, Trap, Traps
from tests.support.fakefiles import FakeFiles

_KEEPS: tuple[Keeps, ...] = ("what was written", "what was synced")

KINDS = (
    "loss",
    "slow",
    "repeat",
    "partitions",
    "pauses",
    "drift",
    "trainers_die",
    "controller_dies",
    "shards_die",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Which kinds of faults a run has; traps, disk_traps: how many, besides those of its scene.

    restarts: Shards with a disk are killed, or their power is cut, and come back with what that has.
    flips: A bit flips in what a shard's disk has, and the shard is started again; what says so is lost.
    disks: Disks fail (EIO) or are full for a while: shards', and the one on which checkpoints are kept.
    """

    loss: bool = False
    slow: bool = False
    repeat: bool = False
    partitions: bool = False
    pauses: bool = False
    drift: bool = False
    trainers_die: bool = False
    controller_dies: bool = False
    shards_die: bool = False
    restarts: bool = False
    disks: bool = False
    flips: bool = False
    traps: int = 0
    disk_traps: int = 0
    scene: Scene = NO_SCENE

    @classmethod
    def draw(cls, random: Random) -> "Faults":
        """Each kind in one run of three or so; shards die, and take their pages with them, in one of six."""
        chance = random.choice((0.0, 0.2, 0.4, 0.6))
        drawn = {name: random.random() < chance for name in KINDS}
        drawn["shards_die"] = random.random() < 1 / 6
        if random.random() < 0.5:
            return cls(**drawn, traps=random.choice((0, 0, 1)), scene=Scene.draw(random))
        return cls(**drawn, traps=random.choice((0, 1, 2, 4, 6)))


class Chaos:
    """Carries faults out, until it is told to stop; then all is well again.

    Args:
        faults: Which kinds.
        park: The processes.
        trainers: The trainers that are running now, by name.
        kill_trainer: Kills one, by name.
        kill_shard: Kills a shard.
        rescales, tables, saves: What there is for traps to meet.
    """

    def __init__(
        self,
        faults: Faults,
        park: Park,
        *,
        trainers: dict[str, Trainer],
        kill_trainer: Callable[[str], None],
        kill_shard: Callable[[int], None],
        rescales: bool,
        tables: bool,
        saves: bool,
    ) -> None:
        self._faults = faults
        self._park = park
        self._trainers = trainers
        self._kill_trainer = kill_trainer
        self._kill_shard = kill_shard
        self._random = random = park.scheduler.random("faults")
        self._mean_s = random.choice((1.0, 3.0, 8.0))
        self._kinds = [
            do
            for wanted, do in (
                (faults.partitions, self._cut),
                (faults.partitions, self._cut),
                (faults.pauses, self._pause),
                (faults.drift, self._drift),
                (faults.trainers_die, self._trainer_dies),
                (faults.controller_dies, self._controller_dies),
                (faults.shards_die, self._shard_dies),
                (faults.restarts, self._shard_restarts),
                (faults.restarts, self._shard_restarts),
                (faults.restarts, self._power_goes),
                (faults.restarts, self._dies_at_an_operation),
                (faults.disks, self._disk_refuses),
                (faults.disks, self._disk_refuses),
                (faults.flips, self._bit_flips),
            )
            if wanted
        ]
        drawn = [Trap.draw(random, rescales=rescales, tables=tables) for _ in range(faults.traps)]
        if faults.restarts or saves:
            disks = park.scheduler.random("traps of disks")
            drawn += [
                Trap.draw_of_disks(disks, restarts=faults.restarts, saves=saves) for _ in range(faults.disk_traps)
            ]
        traps = tuple(dict.fromkeys((*faults.scene.traps, *drawn)))
        self._traps = Traps(traps, park, kill_trainer=kill_trainer, trainers=trainers)
        self._over = False

    def begin(self) -> None:
        """From now on links are what this run has of them."""
        faults, random = self._faults, self._random
        self._traps.begin()
        self._park.network.weather = Weather(
            longest_s=random.choice((0.001, 0.01, 0.1)),
            slow=random.choice((0.01, 0.1)) if faults.slow else 0.0,
            slowest_s=random.choice((0.5, 5.0, 15.0)),
            loss=random.choice((0.002, 0.02, 0.08)) if faults.loss else 0.0,
            repeat=random.choice((0.02, 0.2)) if faults.repeat else 0.0,
        )

    async def go_on(self) -> None:
        """One fault after the other."""
        while not self._over:
            await asyncio.sleep(self._random.expovariate(1.0 / self._mean_s))
            if self._kinds and not self._over:
                self._random.choice(self._kinds)()

    def end(self) -> None:
        """No faults any more: links are whole, who stood still goes on, clocks are as fast as true time."""
        self._over = True
        self._traps.end()
        network = self._park.network
        network.weather = Weather()
        network.cut.clear()
        for disk in (self._park.place, *self._park.disks.values()):
            disk.heal()
        for loop in self._loops():
            loop.resume()
            loop.set_speed(1.0)

    def _loops(self) -> list[ProcessLoop]:
        park = self._park
        loops = [process.loop for _, process in sorted(park.shards.items())]
        if park.controller is not None:
            loops.append(park.controller.loop)
        return loops + [trainer.loop for _, trainer in sorted(self._trainers.items())]

    def _later(self, after_s: float, do: Callable[[], None]) -> None:
        self._park.scheduler.world.call_later(after_s, lambda: None if self._over else do())

    def _while_s(self) -> float:
        """Often shorter than a lease, now and then longer."""
        return self._random.choice((0.5, 3.0, 8.0, 25.0)) * self._random.random()

    def _cut(self) -> None:
        random, cut = self._random, self._park.network.cut
        names = sorted({loop.name for loop in self._loops()})
        if len(names) < 2:
            return
        if random.random() < 0.4:  # one against all others
            one = random.choice(names)
            ways = [(one, other) for other in names if other != one]
        else:
            ways = [tuple(random.sample(names, 2))]  # type: ignore[list-item]
        how = random.random()
        chosen = set()
        for source, dest in ways:
            if how < 0.75:
                chosen.add((source, dest))
            if how > 0.25:
                chosen.add((dest, source))
        cut |= chosen
        self._later(self._while_s(), lambda: cut.difference_update(chosen))

    def _pause(self) -> None:
        loop = self._random.choice(self._loops())
        loop.stop()
        self._later(self._while_s(), loop.resume)

    def _drift(self) -> None:
        self._random.choice(self._loops()).set_speed(self._random.choice((0.7, 0.9, 1.1, 1.5)))

    def _trainer_dies(self) -> None:
        if self._trainers:
            self._kill_trainer(self._random.choice(sorted(self._trainers)))

    def _controller_dies(self) -> None:
        self._park.kill_controller(comes_back_s=self._random.choice((1.0, 5.0, 25.0)) * self._random.random())

    def _shard_restarts(self) -> None:
        if self._park.shards:
            keeps = self._random.choice(_KEEPS)
            shard = self._random.choice(sorted(self._park.shards))
            self._park.kill_shard(shard, comes_back_s=5.0 * self._random.random(), keeps=keeps)

    def _power_goes(self) -> None:
        """Of all that there is, but for trainers, which are elsewhere; mostly of the controller, too."""
        if self._random.random() < 0.7:
            self._controller_dies()
        self._park.place.power_cut()
        for shard in sorted(self._park.shards):
            self._park.kill_shard(shard, comes_back_s=5.0 * self._random.random(), keeps="what was synced")

    def _dies_at_an_operation(self) -> None:
        """A shard ends in the middle of an operation on its disk, with the power of all, with its own, or without."""
        random, park = self._random, self._park
        if not park.disks:
            return
        shard, number = random.choice(sorted(park.disks)), random.randint(1, random.choice((3, 15, 60)))
        disk, alone, keeps = park.disks[shard], random.random() < 0.6, random.choice(_KEEPS)

        def cut() -> None:
            process = park.shards.get(shard)
            if process is not None:
                process.loop.kill()  # nothing of it runs any more, what is left of this operation neither
            call_soon(lambda: self._after_cut(shard, disk, keeps, alone=alone), context=contextvars.Context())

        call_soon = park.scheduler.world.call_soon
        disk.on_cut = cut
        disk.cut_power_at(number)

    def _after_cut(self, shard: int, disk: FakeFiles, keeps: Keeps, *, alone: bool) -> None:
        self._park.network.counts["died in an operation"] += 1
        disk.heal()
        self._park.kill_shard(shard, comes_back_s=5.0 * self._random.random(), keeps=keeps)
        if keeps == "what was synced" and not alone:
            self._power_goes()

    def _bit_flips(self) -> None:
        """In a pack, or a segment of the journal that has a later one: what was synced last may be taken for torn."""
        random, park = self._random, self._park
        if not park.disks:
            return
        shard = random.choice(sorted(park.disks))
        disk = park.disks[shard]
        segments = [path for path in disk.paths() if path.endswith(".segment")]
        found = segments[:-1] + [path for path in disk.paths() if path.endswith(".pack")]
        path = random.choice(found) if found else ""
        if path and (size := len(disk.content(path))):
            for _ in range(random.choice((1, 3, 30))):
                disk.flip(path, random.randrange(8 * size))
            park.damaged.add(shard)
            park.network.counts["bits flipped"] += 1
            park.kill_shard(shard, comes_back_s=random.random(), keeps="what was written")

    def _disk_refuses(self) -> None:
        """One disk, now and then or at every operation, or there is no room."""
        random, park = self._random, self._park
        disk = random.choice([park.place, *(disk for _, disk in sorted(park.disks.items()))])
        if random.random() < 0.5:
            disk.fill(random.choice((0, 100, 2000)))
        else:
            disk.failing = random.choice((0.05, 0.3, 1.0))
        park.network.counts["disk refuses"] += 1
        self._later(self._while_s(), disk.heal)

    def _shard_dies(self) -> None:
        if self._park.shards:
            self._kill_shard(self._random.choice(sorted(self._park.shards)))
