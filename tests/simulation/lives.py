"""What trainers and readers do, each as one process from its start to its end."""

import asyncio
from collections.abc import Awaitable
from random import Random
from typing import TYPE_CHECKING, TypeVar

import torch

from mempool.client.reading.pinning import pin_newest, release_all
from mempool.errors import DataLoss, MempoolError, NotFound, VersionGone
from mempool.types import TableView
from mempool.types.bags import Bags
from tests.simulation.oracle import Content
from tests.simulation.pinned import Pinned
from tests.simulation.processes import Trainer
from tests.simulation.tables import NUM_SLOTS, TRAINED, WIDTH, draw_bags, draw_grads, draw_row, may_be_written
from tests.simulation.training import Training
from tests.simulation.writes import Write

if TYPE_CHECKING:
    from tests.simulation.workload import Workload

T = TypeVar("T")


class _Life:
    """One process of a run, from its start to its end."""

    def __init__(self, workload: "Workload", trainer: Trainer, name: str) -> None:
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
        except self.workload.faults as error:
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


class PinnedReaderLife(_Life):
    """Pins versions of some tables at one moment, reads one of them at it for a while, by bags and by rows, and lets it
    go, or dies with it."""

    async def live(self) -> None:
        while not self.workload.ending:
            await self.rest()
            if picked := self.pick():
                await self.read_at(picked)

    async def read_at(self, picked: list[TableView]) -> None:
        """At one moment."""
        view, ids = picked[0], [each.schema.table_id for each in picked]
        table_id, router, history = view.schema.table_id, self.trainer.router, self.workload.history
        if self.random.random() < 0.5:
            router.forget(table_id)  # as one that knows of no version
        asked_s = self.now_s()
        pinned = await self.tried("a pin", self._unless_gone(pin_newest(router, ids)), *picked)
        if not pinned:
            return
        pin, version = pinned.pin, pinned.versions[table_id]
        history.pinned[pin] = Pinned(table_id, version, asked_s)
        if len(picked) > 1:
            history.cuts.append(pinned.versions)
            self.workload.marks["tables that were pinned at one moment"] += 1
        reading = router.at(pin)
        for _ in range(self.random.randint(1, 6)):
            await self.rest()
            if self.random.random() < 0.5:
                drawn, weights, offsets = draw_bags(self.random)
                bags = Bags(ids=drawn, weights=weights, offsets=offsets)
                call: Awaitable[object] = reading.gather(table_id, bags=bags, timeout_s=20.0)
            else:
                rows = torch.tensor(sorted(self.random.sample(range(TRAINED), 9)))
                call = reading.read_rows(table_id, array="values", ids=rows, timeout_s=20.0)
            if await self.tried("a read at a version", self._unless_gone(call), view) is False:
                return
        self.workload.marks["a version that was read to its end"] += 1
        if self.random.random() < 0.8:
            await release_all(router, ids, pin)

    async def _unless_gone(self, call: Awaitable[T]) -> "T | bool":
        """What it answers; False where the version is gone, as it may be at any time."""
        try:
            return await call
        except VersionGone:
            self.workload.marks["a version that was gone"] += 1
            return False


class TrainerLife(_Life):
    """Looks up, pushes gradients, commits or discards; now and then reads and writes rows."""

    def __init__(self, workload: "Workload", trainer: Trainer, name: str) -> None:
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
        await asyncio.sleep(3.0)  # a shard tries its disk again every second
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
                history.check_written(view, ids, rows, asked_s)
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
