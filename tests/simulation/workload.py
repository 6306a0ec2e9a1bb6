"""What a run's people do: trainers that train, readers that look, an operator who makes, drops and rescales, and one
who takes checkpoints and restores them.

All of it goes through the client's own code. What was pushed, acknowledged and written is told to the history.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import torch

from mempool.errors import (
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    MempoolError,
    NotFound,
    StorageFailed,
    Unavailable,
)
from mempool.types import TableView
from tests.simulation.history import History
from tests.simulation.lives import PinnedReaderLife, ReaderLife, TrainerLife
from tests.simulation.places import Place
from tests.simulation.processes import Park, Trainer
from tests.simulation.saving import COPY, Saver
from tests.simulation.tables import NUM_SLOTS, TRAINED, draw_schema, may_be_written
from tests.simulation.traps import Scene

T = TypeVar("T")

_AnyLife = TrainerLife | ReaderLife | PinnedReaderLife
FAULTS = (Unavailable, DeadlineExceeded)
"""What a call may end with while links and processes fail."""


class Workload:
    """All people of a run.

    Args:
        park: The processes.
        history: Is told.
        marks: Rare things that were met are counted here.
        scene: What is to be done in any case, whatever the seed draws.
        place: Where checkpoints are taken; None: none are.
        pins: Somebody reads at versions.
        disks_refuse: Disks fail and fill up, and callers are told so.

    Attributes:
        faults: What a call may end with while links, processes and disks fail.
        trainers: Those that are running now, by name.
        views: The tables that trainers know of, by name, as they were made.
    """

    def __init__(
        self,
        park: Park,
        history: History,
        marks: Counter[str],
        *,
        scene: Scene,
        place: Place | None = None,
        disks_refuse: bool = False,
        pins: bool = False,
    ) -> None:
        self.park = park
        self.history = history
        self.marks = marks
        self.trainers: dict[str, Trainer] = {}
        self.views: dict[str, TableView] = {}
        self.ending = False
        self._random = park.scheduler.random("workload")
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._kinds: dict[str, type[_AnyLife]] = {}
        self._pins = pins
        self._operator = Trainer(park, "operator")
        self._made = 0
        self._starts = 0
        self.generations: Counter[str] = Counter()
        self.goes_back = self._random.random() < 0.5
        self.rescales, self.changes_tables = self._random.choice(
            ((False, False), (True, False), (True, False), (False, True), (True, True))
        )
        self.goes_back = _first(scene.goes_back, self.goes_back)
        self.rescales = _first(scene.rescales, self.rescales)
        self.changes_tables = _first(scene.tables, self.changes_tables)
        self.writes = scene.writes
        self._pause_s = self._random.choice((1.0, 3.0))
        self._operating: asyncio.Task[None] | None = None
        self._place = place
        self._saver: Saver | None = None
        self.faults = (*FAULTS, StorageFailed) if disks_refuse else FAULTS

    # Lives

    async def begin(self) -> None:
        """Make tables and start everybody. On the world's loop."""
        await self._on(self._operator, self._make_tables(self._random.choice((1, 1, 2, 3))))
        for number in range(self._random.choice((1, 1, 2, 3))):
            self._start(f"trainer-{number}", TrainerLife)
        if self._random.random() < 0.4:
            self._start("reader", ReaderLife)
        if self._pins:
            self._start("pinned reader", PinnedReaderLife)
        self._operating = self._operator.loop.create_task(self._operate())
        if self._place is not None:
            self._saver = Saver(self, self._place)

    async def end(self) -> None:
        """Let everybody end what they do; then every trainer commits once more, and all that there is is read."""
        self.ending = True
        saving = None if self._saver is None else self._saver.life
        while self._lives or not (self._operating and self._operating.done()) or not (saving is None or saving.done()):
            await asyncio.sleep(0.5)
            for name, life in list(self._lives.items()):
                if life.done():
                    self._lives.pop(name)
                    life.result()
        if self._operating is not None:
            self._operating.result()
        if saving is not None:
            saving.result()
        if self.rescales and not self.history.lost and self.park.controller is not None:
            await self._on(self._operator, self._rescale_at_last())
        await self._on(self._operator, self._read_all())
        if self._saver is not None and self.park.controller is not None:
            await self._on(self._operator, self._saver.end())
        await self._let_leases_end()

    def waiting(self) -> str:
        """Who is still at what, for a run that does not end."""
        lives = {name: getattr(self.trainers.get(name), "doing", "") for name in self._lives}
        saver = "" if self._saver is None else f", the saver: {self._saver.doing}"
        return f"still there: {lives}, the operator: {self._operator_doing}{saver}"

    _operator_doing = ""

    def kill_trainer(self, name: str) -> None:
        """A trainer's process dies; another one comes in its place, which knows nothing of it."""
        trainer, life = self.trainers.pop(name, None), self._lives.pop(name, None)
        if trainer is None or life is None:
            return
        trainer.loop.kill()
        self.park.network.died(trainer.loop)
        kind = self._kinds[name]
        after_s = self._random.choice((0.5, 5.0)) * self._random.random()
        self.park.scheduler.world.call_later(after_s, self._start, name, kind)

    def kill_shard(self, shard: int) -> None:
        """A shard's process dies with its pages."""
        process = self.park.shards.get(shard)
        if process is not None:
            self.history.shard_killed(process.info)
            self.park.kill_shard(shard, comes_back_s=5.0 * self._random.random())

    def _start(self, name: str, kind: "type[_AnyLife]") -> None:
        if self.ending or name in self.trainers:
            return
        self._kinds[name] = kind
        self._starts += 1
        trainer = self.trainers[name] = Trainer(self.park, name)
        life = kind(self, trainer, f"{name}/{self._starts}")
        self._lives[name] = trainer.loop.create_task(life.live())

    async def _on(self, process: Trainer, coroutine: Any) -> Any:
        """Wait, on the world's loop, for what a process does."""
        task = process.loop.create_task(coroutine)
        while not task.done():
            await asyncio.sleep(0.05)
        return task.result()

    # The operator

    async def _make_tables(self, count: int) -> None:
        for _ in range(count):
            self._made += 1
            await self._make(f"table-{self._made}")

    async def _make(self, name: str) -> None:
        schema = draw_schema(self._random, name)

        async def ask() -> TableView:
            try:
                return await self._operator.api.create_table(schema)
            except AlreadyExists:
                # A late repeat of an earlier call may be making another one of that name: then there is none yet.
                return await self._operator.api.table(name)

        view = await self._patiently(ask)
        if view is not None:
            self.history.note_view(view)
            self.views[name] = view

    async def _drop(self, name: str) -> None:
        view = self.views.pop(name)
        self.history.dropped.add(view.schema.table_id)

        async def ask() -> None:
            try:
                await self._operator.api.drop_table(name, table_id=view.schema.table_id)
            except NotFound:
                return

        await self._patiently(ask)

    async def _rescale(self, shards: int) -> None:
        async def ask() -> None:
            async for _ in self._operator.api.rescale(shards):
                pass

        try:
            await ask()
            self.marks["a rescale that ended at its first call"] += 1
        except MempoolError as error:
            self.marks[f"a rescale that failed: {type(error).__name__}"] += 1

    async def _rescale_at_last(self) -> None:
        """No faults any more: whatever dead trainers and controllers have left stands in no rescale's way for long."""
        problem: MempoolError | None = None
        for _ in range(4):
            self._operator_doing = "rescales at last"
            try:
                async for _ in self._operator.api.rescale(self._random.randint(1, 4)):
                    pass
            except MempoolError as error:
                problem = error
                await asyncio.sleep(5.0)
            else:
                return
        self.history.say(f"no progress: without faults no rescale ends: {problem!r}")

    @property
    def rescaling(self) -> bool:
        """Whether the operator waits for a rescale now."""
        return self._operator_doing == "rescales"

    @property
    def restoring(self) -> bool:
        """Whether somebody waits for a table that is restored, which takes a controller to know of."""
        return self._saver is not None and self._saver.restoring

    async def _operate(self) -> None:
        random = self._random
        while not self.ending:
            self._operator_doing = "sleeps"
            await asyncio.sleep(random.expovariate(1 / self._pause_s))
            if self.ending:
                break
            if self.rescales and (not self.changes_tables or random.random() < 0.6):
                self._operator_doing = "rescales"
                await self._rescale(random.randint(1, 4))
            elif self.changes_tables or self.history.lost:
                own = [name for name in sorted(self.views) if not name.startswith(COPY)]
                name = random.choice(own) if own else ""
                if name and (random.random() < 0.5 or self.views[name].schema.table_id in self.history.lost):
                    self._operator_doing = f"drops {name}"
                    await self._drop(name)
                    self.marks["a table that was dropped"] += 1
                    if random.random() < 0.7:
                        self._operator_doing = f"makes {name} again"
                        await self._make(name)
                elif len(self.views) < 4:
                    self._operator_doing = "makes a table"
                    await self._make_tables(1)

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T | None:
        for _ in range(60):
            try:
                async with asyncio.timeout(60.0):
                    return await ask()
            except (*self.faults, TimeoutError, DataLoss, NotFound):
                await asyncio.sleep(self._random.random() * 2.0)
            except MempoolError as error:
                self.history.say(f"the operator: {error!r}")
                return None
        self.history.say("the operator was never answered")
        return None

    # The end

    async def _read_all(self) -> None:
        """Every row of every table, by a client that knows of nothing."""
        for name, view in sorted(self.views.items()):
            table_id = view.schema.table_id
            if table_id in self.history.lost:
                continue
            self._operator_doing = f"reads {name}"
            self._operator.router.adopt(await self._operator.api.table(name))
            before = len(self.history.reads)
            for array in _arrays(view):
                ids = torch.arange(TRAINED)
                await self._operator.router.read_rows(table_id, array=array, ids=ids)
            if may_be_written(view.schema):
                ids = torch.arange(TRAINED, NUM_SLOTS)
                rows = await self._operator.router.read_rows(table_id, array="values", ids=ids)
                self.history.check_written(view, ids, rows, self.park.scheduler.now_s)
            base = self.history.base_of(table_id)
            made = max((version for table, version in self.history.decided if table == table_id), default=base)
            for read in self.history.reads[before:]:
                stamp = read.call.reply.stamp
                if stamp.table_version != made:
                    self.history.say(
                        f"in the end shard {stamp.shard} has table {name!r} at version {stamp.table_version}; "
                        f"{made} were made"
                    )

    async def _let_leases_end(self) -> None:
        """Nobody trains any more: after a lease, and the time in which a shard looks, nothing is held for anybody."""
        self._operator_doing = "lets leases end"
        # The last that comes late, a copy of a Heartbeat or what a dead trainer has sent, begins a lease anew.
        await asyncio.sleep(max(0.0, self.park.network.due_s - self.park.scheduler.now_s))
        await asyncio.sleep(2.0 * self.park.lease_s + 5.0)
        for number, process in sorted(self.park.shards.items()):
            status = await self._on(self._operator, self._operator.dialer.dial(process.info).status())
            for table in status.tables:
                if table.updates_held and table.table_id not in self.history.lost:
                    self.history.say(
                        f"in the end shard {number} holds {table.updates_held} updates of table {table.name!r} for "
                        "nobody"
                    )


def _arrays(view: TableView) -> list[str]:
    """What is kept of each slot: values, optimizers' state, counts of use."""
    algorithm = view.schema.optimizer.algorithm
    state = {
        "sgd": ["values.momentum_buffer"] if view.schema.optimizer.momentum else [],
        "adagrad": ["values.sum"],
        "rowwise_adagrad": ["values.row_sum"],
        "adam": ["values.exp_avg", "values.exp_avg_sq"],
        "adamw": ["values.exp_avg", "values.exp_avg_sq"],
        "rowwise_adam": ["values.exp_avg", "values.row_exp_avg_sq"],
    }[algorithm]
    return ["values", *state, *(["values.uses", "values.last_use"] if view.schema.usage else [])]


def _first(asked: bool | None, drawn: bool) -> bool:
    return drawn if asked is None else asked
