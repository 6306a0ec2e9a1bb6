"""What a run's people do: trainers that train, readers that look, an operator who makes, drops and rescales.

All of it goes through the client's own code. What was pushed, acknowledged and written is told to the history.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar

import torch

from mempool.errors import (
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    InvalidRequest,
    MempoolError,
    NotFound,
    Unavailable,
)
from mempool.types import TableView
from mempool.types.bags import Bags
from tests.simulation.history import History, Write
from tests.simulation.oracle import Content
from tests.simulation.processes import Park, Trainer
from tests.simulation.tables import (
    NUM_SLOTS,
    TRAINED,
    WIDTH,
    draw_bags,
    draw_grads,
    draw_row,
    draw_schema,
    may_be_written,
)
from tests.simulation.training import Training
from tests.simulation.traps import Scene

T = TypeVar("T")

FAULTS = (Unavailable, DeadlineExceeded)
"""What a call may end with while links and processes fail."""


class Workload:
    """All people of a run.

    Args:
        park: The processes.
        history: Is told.
        marks: Rare things that were met are counted here.
        scene: What is to be done in any case, whatever the seed draws.

    Attributes:
        trainers: Those that are running now, by name.
        views: The tables that trainers know of, by name, as they were made.
    """

    def __init__(self, park: Park, history: History, marks: Counter[str], *, scene: Scene) -> None:
        self.park = park
        self.history = history
        self.marks = marks
        self.trainers: dict[str, Trainer] = {}
        self.views: dict[str, TableView] = {}
        self.ending = False
        self._random = park.scheduler.random("workload")
        self._lives: dict[str, asyncio.Task[None]] = {}
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

    # Lives

    async def begin(self) -> None:
        """Make tables and start everybody. On the world's loop."""
        await self._on(self._operator, self._make_tables(self._random.choice((1, 1, 2, 3))))
        for number in range(self._random.choice((1, 1, 2, 3))):
            self._start(f"trainer-{number}", TrainerLife)
        if self._random.random() < 0.4:
            self._start("reader", ReaderLife)
        self._operating = self._operator.loop.create_task(self._operate())

    async def end(self) -> None:
        """Let everybody end what they do; then every trainer commits once more, and all that there is is read."""
        self.ending = True
        while self._lives or not (self._operating and self._operating.done()):
            await asyncio.sleep(0.5)
            for name, life in list(self._lives.items()):
                if life.done():
                    self._lives.pop(name)
                    life.result()
        if self._operating is not None:
            self._operating.result()
        if self.rescales and not self.history.lost and self.park.controller is not None:
            await self._on(self._operator, self._rescale_at_last())
        await self._on(self._operator, self._read_all())
        await self._let_leases_end()

    def waiting(self) -> str:
        """Who is still at what, for a run that does not end."""
        lives = {name: getattr(self.trainers.get(name), "doing", "") for name in self._lives}
        return f"still there: {lives}, the operator: {self._operator_doing}"

    _operator_doing = ""

    def kill_trainer(self, name: str) -> None:
        """A trainer's process dies; another one comes in its place, which knows nothing of it."""
        trainer, life = self.trainers.pop(name, None), self._lives.pop(name, None)
        if trainer is None or life is None:
            return
        trainer.loop.kill()
        self.park.network.died(trainer.loop)
        kind = ReaderLife if name == "reader" else TrainerLife
        after_s = self._random.choice((0.5, 5.0)) * self._random.random()
        self.park.scheduler.world.call_later(after_s, self._start, name, kind)

    def kill_shard(self, shard: int) -> None:
        """A shard's process dies with its pages."""
        process = self.park.shards.get(shard)
        if process is not None:
            self.history.shard_killed(process.info)
            self.park.kill_shard(shard, comes_back_s=5.0 * self._random.random())

    def _start(self, name: str, kind: "type[TrainerLife] | type[ReaderLife]") -> None:
        if self.ending or name in self.trainers:
            return
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
        except (*FAULTS, DataLoss, InvalidRequest, MempoolError) as error:
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
                name = random.choice(sorted(self.views)) if self.views else ""
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
            except (*FAULTS, TimeoutError, DataLoss, NotFound):
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
                self.check_written(view, ids, rows, self.park.scheduler.now_s)
            made = max((version for table, version in self.history.decided if table == table_id), default=0)
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

    def check_written(self, view: TableView, ids: torch.Tensor, rows: torch.Tensor, asked_s: float) -> None:
        """What a row that was written has in each block is of one write, and of none that was over before one began
        that was done before the reading. Blocks may lie on several shards, which writes that overlap reach in any
        order."""
        schema = view.schema
        for slot, row in zip(ids.tolist(), rows, strict=True):
            writes = self.history.writes[schema.table_id, slot]
            done = [write for write in writes if write.done_s is not None and write.done_s < asked_s]
            if not done:
                continue
            for block in range(schema.num_blocks):
                columns = slice(*schema.block_columns(block))
                found = [write for write in writes if torch.equal(write.row[columns], row[columns])]
                if not found:
                    self.history.say(f"slot {slot} of table {schema.name!r} is what nobody wrote: {row.tolist()}")
                elif all(any(write.is_over_for(later) for later in done) for write in found):
                    self.history.say(
                        f"slot {slot} of table {schema.name!r} is of a write that was over at "
                        f"{found[-1].done_s or found[-1].given_up_s:.3f} s, and a later one was done: {row.tolist()}"
                    )


def _arrays(view: TableView) -> list[str]:
    """What optimizers keep of each slot."""
    algorithm = view.schema.optimizer.algorithm
    state = {
        "sgd": ["values.momentum_buffer"] if view.schema.optimizer.momentum else [],
        "adagrad": ["values.sum"],
        "rowwise_adagrad": ["values.row_sum"],
        "adam": ["values.exp_avg", "values.exp_avg_sq"],
        "adamw": ["values.exp_avg", "values.exp_avg_sq"],
        "rowwise_adam": ["values.exp_avg", "values.row_exp_avg_sq"],
    }[algorithm]
    return ["values", *state]


def _first(asked: bool | None, drawn: bool) -> bool:
    return drawn if asked is None else asked


class _Life:
    """One process of a run, from its start to its end."""

    def __init__(self, workload: Workload, trainer: Trainer, name: str) -> None:
        self.workload = workload
        self.trainer = trainer
        self.name = name
        self.random: Random = trainer.random
        self.doing = ""
        self.last = False  # no faults any more: what is tried now has to come to a good end

    async def live(self) -> None:
        raise NotImplementedError

    async def rest(self) -> None:
        """Mostly short, now and then long: so a run has busy moments and is not busy all the time."""
        await asyncio.sleep(self.random.expovariate(1 / (3.0 if self.random.random() < 0.2 else 0.1)))

    def now_s(self) -> float:
        return self.workload.park.scheduler.now_s

    def pick(self) -> list[TableView]:
        """Some tables, in any order."""
        views = [view for _, view in sorted(self.workload.views.items())]
        views = [view for view in views if view.schema.table_id not in self.workload.history.lost]
        for view in views:
            self.trainer.know(view)
        return self.random.sample(views, self.random.randint(1, len(views))) if views else []

    async def tried(self, what: str, call: Awaitable[T], *tables: TableView) -> T | None:
        """The result, or None where the call failed as it may."""
        self.doing = self.trainer.doing = f"{what} since {self.now_s():.1f} s"
        history = self.workload.history
        ids = {view.schema.table_id for view in tables}
        try:
            return await call
        except FAULTS as error:
            self.workload.marks[f"{what} that failed"] += 1
            unheard = self.workload.park.controller is None and history.names_lost(error)
            if self.last and not unheard and not ids & (history.dropped | history.lost):
                history.say(f"no progress: {self.name}: without faults {what} ends with {error!r}")
        except NotFound as error:
            if not ids & (history.dropped | history.lost):
                history.say(f"{self.name}: {what}: {error!r}")
        except DataLoss as error:
            if not ids & history.lost:
                history.say(f"{self.name}: {what}: {error!r}")
        except MempoolError as error:
            history.say(f"{self.name}: {what}: {error!r}")
        return None


class ReaderLife(_Life):
    """Looks up rows as somebody who has just come: each lookup by a client that knows of no version."""

    async def live(self) -> None:
        while not self.workload.ending:
            await self.rest()
            for view in self.pick():
                if self.random.random() < 0.5:
                    self.trainer.router.forget(view.schema.table_id)
                    self.workload.history.known.pop((self.trainer.loop, view.schema.table_id), None)
                ids, weights, offsets = draw_bags(self.random)
                bags = Bags(ids=ids, weights=weights, offsets=offsets)
                gather = self.trainer.router.gather(view.schema.table_id, bags=bags, timeout_s=20.0)
                await self.tried("a lookup", gather, view)


class TrainerLife(_Life):
    """Looks up, pushes gradients, commits or discards; now and then reads and writes rows."""

    def __init__(self, workload: Workload, trainer: Trainer, name: str) -> None:
        super().__init__(workload, trainer, name)
        # In half of the runs one that comes in a dead one's place goes on in its name, as from a checkpoint.
        self.group = trainer.name if workload.goes_back else name
        self.training = self._next_generation()
        if self.training.generation:
            workload.marks["a trainer that another one of a higher generation took the place of"] += 1

    def _next_generation(self) -> Training:
        generations = self.workload.generations
        generation = generations[self.group]
        generations[self.group] += 1
        return Training(self.trainer, group=self.group, history=self.workload.history, generation=generation)

    async def live(self) -> None:
        while not self.workload.ending:
            await self.rest()
            if self.workload.goes_back and self.random.random() < 0.03:
                await self.go_back()
            await self.step()
        self.training.timeout_s = 100.0
        self.last = True
        await self.step(last=True)
        await self.training.close()

    async def go_back(self) -> None:
        """Begin again, as after a loss that is no number: what was pending is nobody's any more."""
        await self.tried("an end before going back", self.training.close())
        self.training = self._next_generation()
        self.workload.marks["a trainer that went back to an earlier step"] += 1

    async def step(self, *, last: bool = False) -> None:
        """One step of some tables."""
        random, tables = self.random, self.pick()
        for view in tables:
            for _ in range(1 if last else random.choice((0, 1, 1, 2))):
                await self.push(view)
            if not last and random.random() < (0.9 if self.workload.writes else 0.1):
                await self.read_or_write(view)
        if not last and random.random() < 0.05:
            await self.tried("a discard", self.training.discard(tables), *tables)
            return
        if not last and random.random() < 0.2:
            await self.tried("a prepare", self.training.prepare(tables, want_norm=random.random() < 0.5), *tables)
            if random.random() < 0.3:
                return  # what is prepared is merged with what comes
        lr, grad_scale = 0.1 * random.random(), random.choice((1.0, 0.5))
        await self.commit(tables, lr, grad_scale)

    async def commit(self, tables: list[TableView], lr: float, grad_scale: float) -> None:
        """Commit all that is pending on these tables."""
        done = await self.tried("a commit", self.training.commit(tables, lr=lr, grad_scale=grad_scale), *tables)
        if done is not None:
            self.workload.marks[f"a commit of {min(3, len(tables))} tables"] += 1

    async def push(self, view: TableView) -> None:
        """One lookup and its gradient."""
        ids, weights, offsets = draw_bags(self.random)
        bags = Bags(ids=ids, weights=weights, offsets=offsets)
        remember = self.random.random() < 0.7
        found = await self.tried("a lookup", self.training.gather(view, bags, remember=remember), view)
        if found is None:
            return
        content = Content(ids, weights, offsets, draw_grads(self.random, len(offsets) - 1))
        hold = self.random.random() < 0.9
        want = self.random.random() < 0.5
        await self.tried("an update", self.training.push(view, found, content, hold=hold, want=want), view)

    async def read_or_write(self, view: TableView) -> None:
        """Rows as they are, in one slot that nobody trains."""
        if not may_be_written(view.schema):
            return
        history, table_id, asked_s = self.workload.history, view.schema.table_id, self.now_s()
        slot = self.random.randrange(TRAINED, NUM_SLOTS) // 4 * 4  # few, in two pages: writes follow each other
        ids = torch.tensor([slot])
        if self.random.random() < 0.5:
            read = self.trainer.router.read_rows(table_id, array="values", ids=ids, timeout_s=20.0)
            rows = await self.tried("reading rows", read, view)
            if rows is not None:
                self.workload.check_written(view, ids, rows, asked_s)
            return
        row = draw_row(self.random, len(history.writes[table_id, slot])).reshape(1, WIDTH)
        write = Write(row[0].clone(), self.name, asked_s)
        history.writes[table_id, slot].append(write)
        done = self.trainer.router.write_rows(table_id, array="values", ids=ids, rows=row, timeout_s=20.0)
        if await self.tried("writing rows", _said(done), view):
            write.done_s = self.now_s()
        else:
            write.given_up_s = self.now_s()


async def _said(done: Awaitable[None]) -> bool:
    await done
    return True
