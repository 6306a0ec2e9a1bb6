"""The processes of a simulated pool: shards, the controller, trainers, and the machine park that starts and kills them.

Each is made as its composition root in ``mempool.rayhost`` makes it, with the links, clock and runner of the simulation
handed in. A process that dies loses all it had, but for what a shard has on its disk, where the pool has storage; a
shard comes back as a new incarnation, as Ray would bring it back.
"""

import asyncio
import contextvars
from asyncio import events
from collections.abc import Callable
from random import Random
from typing import Literal

from mempool.client import GrpcPool
from mempool.client.routing.router import Router
from mempool.client.transport.shard import GrpcDialer
from mempool.controller import Controller
from mempool.errors import DataLoss, MempoolError, StorageFailed
from mempool.server.views import ShardViews
from mempool.shard import Engine
from mempool.shard.durable.store import Store
from mempool.types import ShardHost, ShardInfo, TableView
from tests.simulation.loop import InlineRunner, ProcessLoop, Scheduler
from tests.simulation.network import Network
from tests.support.fakefiles import FakeFiles

POOL = "simulated"
CONTROLLER = "controller"
CONTROLLER_ADDRESS = "controller:7077"
_LOOK_S = 10.0
_RETRY_S = 1.0
_EPOCH_S = 1_700_000_000.0  # when the simulated world begins, on everybody's wall clock


def shard_address(shard: int) -> str:
    return f"shard-{shard}:7070"


Keeps = Literal["nothing", "what was written", "what was synced"]


class Park:
    """All processes of one pool.

    Args:
        scheduler: Runs them.
        network: Links them.
        drift: By how much clocks may be faster or slower than true time, as a part of it.
        lease_s: Of trainers on shards.
        storage: Shards have a disk, which outlives their processes.
        journal_limit: Of their journals.

    Attributes:
        shards: Running shard processes by number, those that stand still too.
        controller: The running controller's process, None while there is none.
        wanted: Numbers of the shards that somebody started and nobody stopped, whether or not they are up.
        meant: How many shards the pool is meant to have, as the controller had it kept.
        killed: Incarnations of shards that were killed with what they had.
        disks: Of shards, by number; none without storage.
        place: The disk on which checkpoints are kept.
        damaged: Disks on which bits were flipped, by shard.
        on_failure: Told of a shard that cannot read what it has kept.
        on_lost: Told of one whose disk is damaged, and which so begins again with nothing.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        *,
        drift: float = 0.0,
        lease_s: float = 10.0,
        storage: bool = False,
        journal_limit: int = 2**17,
    ) -> None:
        self.journal_limit = journal_limit
        self.scheduler = scheduler
        self.network = network
        self.shards: dict[int, ShardProcess] = {}
        self.controller: ControllerProcess | None = None
        self.wanted: set[int] = set()
        self.meant = 0
        self.killed: list[ShardInfo] = []
        self.storage = storage
        self.disks: dict[int, FakeFiles] = {}
        self.place = FakeFiles(scheduler.random("place").getrandbits(32))
        self.damaged: set[int] = set()
        self.on_lost: Callable[[ShardInfo], None] = lambda _: None
        self.on_failure: Callable[[str], None] = lambda _: None
        self.on_shard: list[Callable[[ShardProcess], None]] = []
        self.on_controller: list[Callable[[ControllerProcess], None]] = []
        self.lease_s = lease_s
        self._drift = drift
        self._random = scheduler.random("park")
        self._incarnation = 0
        self._starts = 0

    def process_loop(self, name: str) -> ProcessLoop:
        """The loop of a new process: its clock begins anywhere, and is a little fast or slow."""
        speed = 1.0 + self._drift * (2.0 * self._random.random() - 1.0)
        return self.scheduler.loop(name, begins_s=self._random.random() * 1e5, speed=speed)

    def runner(self, loop: ProcessLoop) -> InlineRunner:
        self._starts += 1
        return InlineRunner(loop, self.scheduler.random(f"runner {self._starts}"))

    def wall_clock(self) -> float:
        return _EPOCH_S + self.scheduler.now_s

    # Shards

    def start_shard(self, shard: int, *, fresh: bool = False) -> ShardInfo:
        """A new process for a shard, with what its disk has; fresh: with nothing."""
        self._incarnation += 1
        if self.storage and (fresh or shard not in self.disks):
            self.disks[shard] = FakeFiles(self.scheduler.random(f"disk {self._incarnation}").getrandbits(32))
        info = ShardInfo(shard=shard, address=shard_address(shard), incarnation=self._incarnation)
        self.wanted.add(shard)
        process = self.shards[shard] = ShardProcess(self, info)
        for observer in self.on_shard:
            observer(process)
        return info

    def kill_shard(self, shard: int, *, comes_back_s: float | None, keeps: Keeps = "nothing") -> None:
        """A shard's process dies, with its pages, or its disk keeps them; another one comes in its place after a while.

        keeps: "what was written" (the process was killed), "what was synced" (the power was cut), of its disk.
        """
        process = self.shards.pop(shard, None)
        if process is None:
            return
        if keeps == "nothing":
            self.killed.append(process.info)
            self.disks.pop(shard, None)
        elif keeps == "what was written":
            self.disks[shard].killed()
        else:
            self.disks[shard].power_cut()
        process.loop.kill()
        self.network.died(process.loop)
        if comes_back_s is not None:
            self.later(comes_back_s, lambda: self._comes_back(shard))

    def restart(self, process: "ShardProcess") -> None:
        """A shard could not begin to serve: it is started again, unless it was already."""
        if self.shards.get(process.info.shard) is process:
            self.kill_shard(process.info.shard, comes_back_s=0.0, keeps="what was written")

    def lose(self, process: "ShardProcess") -> None:
        """A shard's disk is damaged, and it said so: somebody gives it an empty one."""
        if self.shards.get(process.info.shard) is process:
            self.damaged.discard(process.info.shard)
            self.on_lost(process.info)
            self.kill_shard(process.info.shard, comes_back_s=0.0)

    def _comes_back(self, shard: int) -> None:
        if shard in self.wanted and shard not in self.shards:
            self.start_shard(shard)

    def remove_shard(self, info: ShardInfo) -> None:
        """A shard's process is ended for good, by the controller."""
        process = self.shards.get(info.shard)
        self.wanted.discard(info.shard)
        self.disks.pop(info.shard, None)
        if process is not None:
            del self.shards[info.shard]
            process.loop.kill()
            self.network.died(process.loop)

    def store_now(self) -> Store | None:
        """What the shard keeps whose code runs now; None where it is no shard's, or reads what it kept."""
        loop = events._get_running_loop()
        process = next((process for process in self.shards.values() if process.loop is loop), None)
        return process.store if process is not None and process.ready else None

    # The controller

    def start_controller(self, *, shards: int | None = None) -> "ControllerProcess":
        """The pool's first controller, which starts ``shards``; or a later one, which finds them."""
        self.controller = process = ControllerProcess(self, shards)
        for observer in self.on_controller:
            observer(process)
        return process

    def kill_controller(self, *, comes_back_s: float) -> None:
        """Its process dies; Ray starts another one after a while."""
        process, self.controller = self.controller, None
        if process is not None:
            process.loop.kill()
            self.network.died(process.loop)
            self.later(comes_back_s, lambda: self.start_controller() if self.controller is None else None)

    def stand_still(self, loop: ProcessLoop, for_s: float) -> None:
        """A process stops for a while and then goes on, late."""
        loop.stop()
        self.later(for_s, loop.resume)

    def later(self, after_s: float, do: Callable[[], object]) -> None:
        self.scheduler.world.call_later(after_s, do, context=contextvars.Context())


class ShardProcess:
    """One start of a shard, as ``rayhost.shard_serving`` makes it.

    Attributes:
        store: What it keeps; None without storage.
        ready: It serves, and has read what it kept.
    """

    def __init__(self, park: Park, info: ShardInfo) -> None:
        self.info = info
        self.loop = loop = park.process_loop(f"shard-{info.shard}")
        self.ready = not park.storage
        self.store: Store | None = None
        self._park = park
        self._dialer = GrpcDialer(park.network.channels(loop), clock=loop.time)
        if park.storage:
            self._life = loop.create_task(self._read_and_serve(park.disks[info.shard]))
        else:
            self._serve(self._made(None))

    def _made(self, store: Store | None) -> Engine:
        return Engine(
            self.info,
            device="cpu",
            peers=self._dialer.dial,
            pool=POOL,
            held_lease_s=self._park.lease_s,
            clock=self.loop.time,
            runner=self._park.runner(self.loop),
            store=store,
        )

    async def _read_and_serve(self, disk: FakeFiles) -> None:
        try:
            self.store = Store(
                "disk",
                pool=POOL,
                pool_id="simulated",
                shard=self.info.shard,
                files=disk,
                runner=self._park.runner(self.loop),
                journal_limit=self._park.journal_limit,
            )
            engine = self._made(self.store)
            await engine.recover()
        except StorageFailed:  # its process ends, and is started again
            self._park.later(1.0, lambda: self._park.restart(self))
            return
        except MempoolError as error:
            if isinstance(error, DataLoss) and self.info.shard in self._park.damaged:
                self._park.later(1.0, lambda: self._park.lose(self))
                return
            self._park.on_failure(f"shard {self.info.shard} cannot go on with its disk: {error!r}")
            return
        self.ready = True
        self._serve(engine)

    def _serve(self, engine: Engine) -> None:
        def dial(peer: ShardInfo) -> ShardHost:
            return engine if peer.shard == self.info.shard else self._dialer.dial(peer)

        views = ShardViews(POOL, shard=engine, dial=dial, controller="the controller")
        self._park.network.listen(self.info.address, self.loop, shard=engine, pool=views)


class SimulatedLauncher:
    """Starts shards of the park, for one start of the controller; a ``Launcher``."""

    def __init__(self, park: Park, random: Random) -> None:
        self._park = park
        self._random = random

    async def require_room(self, shards: int) -> None:
        """There is always room."""

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:
        await asyncio.sleep(self._random.random() * 2.0)
        if shard not in self._park.shards:
            self._park.start_shard(shard, fresh=fresh)
        while not (process := self._park.shards.get(shard)) or not process.ready:
            await asyncio.sleep(0.1)
        return process.info

    async def starting(self) -> str:
        return ""

    async def keep_wanted(self, shards: int) -> None:
        await asyncio.sleep(self._random.random() * 0.1)
        self._park.meant = shards

    async def stop(self, info: ShardInfo) -> None:
        await asyncio.sleep(self._random.random() * 0.1)
        self._park.remove_shard(info)

    async def find(self) -> list[ShardInfo]:
        """The shards that there are, for a controller that was started anew; one that is not up has no address."""
        await asyncio.sleep(self._random.random() * 0.5)
        up = self._park.shards
        return [
            up[shard].info if shard in up else ShardInfo(shard=shard, address="", incarnation=0)
            for shard in sorted(self._park.wanted)
        ]


class ControllerProcess:
    """One start of the controller, as ``rayhost.controller_actor`` makes it."""

    def __init__(self, park: Park, shards: int | None) -> None:
        self._park = park
        self._starts = park.scheduler.number()
        self.loop = loop = park.process_loop(CONTROLLER)
        random = park.scheduler.random(f"controller {self._starts}")
        self._launcher = SimulatedLauncher(park, random)
        dialer = GrpcDialer(park.network.channels(loop), clock=loop.time)
        self.controller: Controller | None = None
        self.ready = False

        async def live() -> None:
            self.controller = controller = Controller(
                POOL,
                launcher=self._launcher,
                dial=dialer.dial,
                round_bytes=1024,
                trainer_lease_s=park.lease_s,
                clock=loop.time,
                wall_clock=park.wall_clock,
                runner=park.runner(loop),
                new_token=lambda: f"{random.getrandbits(64):x}",
            )
            if shards is not None:
                await controller.open(shards)
            else:
                await self._resume(controller)
            park.network.listen(CONTROLLER_ADDRESS, loop, shard=None, pool=controller)
            self.ready = True
            await self._watch(controller)

        self.life = loop.create_task(live())

    async def _resume(self, controller: Controller) -> None:
        while True:
            try:
                await controller.adopt(await self._launcher.find(), wanted=self._park.meant)
                return
            except (MempoolError, TimeoutError):
                await asyncio.sleep(_RETRY_S)

    async def _watch(self, controller: Controller) -> None:
        """Admit shards that came back; now and then bring all up to date."""
        random = self._park.scheduler.random(f"watch {self._starts}")
        while True:
            await asyncio.sleep(_LOOK_S * random.random())
            try:
                known = {info.shard: info for info in controller.shards}
                for shard, process in sorted(self._park.shards.items()):
                    if shard in known and known[shard].incarnation < process.info.incarnation:
                        await controller.shard_restarted(process.info)
                await controller.reconcile()
            except (MempoolError, TimeoutError):
                await asyncio.sleep(_RETRY_S * random.random())


class Trainer:
    """One start of a trainer's process: its router, and whatever the workload does on its loop."""

    def __init__(self, park: Park, name: str, *, router: type[Router] = Router) -> None:
        self.name = name
        self.loop = loop = park.process_loop(name)
        self.random = random = park.scheduler.random(f"{name} {park.scheduler.number()}")
        channels = park.network.channels(loop)
        self.dialer = GrpcDialer(channels, clock=loop.time)
        self.api = GrpcPool([CONTROLLER_ADDRESS], channels, clock=loop.time)
        self.router = router(
            self.api,
            dial=self.dialer.dial,
            pool=POOL,
            timeout_s=30.0,
            jitter=random.random,
            clock=loop.time,
            first_lookup_id=random.getrandbits(40),
        )

    def know(self, view: TableView) -> None:
        """Have opened a table by its name, as clients do, and have nothing of it but that."""
        table_id = view.schema.table_id
        if self.router.name_of(table_id) != view.schema.name:
            self.router.adopt(view)
            self.router.forget(table_id)
