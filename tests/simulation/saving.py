"""Who takes checkpoints and restores them in a run, beside all others: in a table's place, and under another name."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace as replaced
from typing import TYPE_CHECKING

import torch

from mempool.checkpoint.commit import names, read_manifest
from mempool.checkpoint.looking import verify
from mempool.errors import AlreadyExists, DataLoss, Internal, MempoolError, NotFound
from mempool.types import RestoreTables, TableSchema, TableSource, TakeCheckpoint
from tests.simulation.oracle import Oracle
from tests.simulation.places import URL, Place
from tests.simulation.processes import Trainer
from tests.simulation.tables import NUM_SLOTS, TRAINED, is_exact, may_be_written
from tests.simulation.writes import check_written

if TYPE_CHECKING:
    from tests.simulation.workload import Workload

COPY = "copy"
"""How tables begin that are restored under another name."""


def _alike(schema: TableSchema, other: TableSchema) -> bool:
    """Whether a table can take the other's place."""
    return schema == replaced(other, name=schema.name, table_id=schema.table_id, layout=schema.layout)


class Saver:
    """One process that takes checkpoints and restores them.

    Args:
        workload: Whose tables.
        place: Where.
    """

    def __init__(self, workload: "Workload", place: Place) -> None:
        self._workload = workload
        self._place = place
        self._client = Trainer(workload.park, "saver")
        self._random = workload.park.scheduler.random("saving")
        self._pause_s = self._random.choice((0.5, 2.0))
        self._copies = 0
        self.doing = ""
        self.life = self._client.loop.create_task(self._live())

    @property
    def restoring(self) -> bool:
        """Whether it restores a table now, or asks what has become of one."""
        return self.doing.startswith("restores")

    async def _live(self) -> None:
        random, workload = self._random, self._workload
        while not workload.ending:
            self.doing = "sleeps"
            await asyncio.sleep(random.expovariate(1 / self._pause_s))
            if workload.ending:
                break
            if random.random() < 0.7 or not self._whole():
                self.doing = "takes a checkpoint"
                await self._take(self._request())
            else:
                await self._restore()

    def _request(self) -> TakeCheckpoint:
        random = self._random
        some = sorted(self._workload.views)
        tables = tuple(random.sample(some, random.randint(1, len(some)))) if some and random.random() < 0.2 else ()
        return TakeCheckpoint(
            url=URL, tables=tables, incremental=random.random() < 0.8, keep=random.choice((0, 0, 1, 2))
        )

    async def _take(self, request: TakeCheckpoint) -> MempoolError | None:
        """Take one; why it failed."""
        workload, saved = self._workload, self._workload.history.saved
        asked_s, name = workload.park.scheduler.now_s, ""
        try:
            async with asyncio.timeout(120.0):
                async for progress in self._client.api.checkpoint(request):
                    if progress.name and not name:
                        name = progress.name
                        saved.note_begun(name, asked_s)
                    if progress.done:
                        saved.note_taken(name)
                        workload.marks["a checkpoint"] += 1
                        return None
        except TimeoutError as error:
            return error if isinstance(error, MempoolError) else MempoolError("not in time")
        except MempoolError as error:
            workload.marks[f"a checkpoint that failed: {type(error).__name__}"] += 1
            if isinstance(error, Internal) or (isinstance(error, DataLoss) and not workload.history.lost):
                workload.history.say(f"a checkpoint failed: {error!r}")
            return error
        return MempoolError("it ended without a word")

    def _whole(self) -> list[str]:
        return sorted(self._workload.history.saved.asked_s)

    async def _restore(self) -> None:
        """One table: mostly of the newest checkpoint, in its own place or beside it."""
        random, workload, saved = self._random, self._workload, self._workload.history.saved
        newest = self._whole()[-1]
        checkpoint = newest if random.random() < 0.8 else random.choice(self._whole())
        table = random.choice(sorted(saved.manifests[checkpoint].tables))
        state = saved.manifests[checkpoint].tables[table]
        alike = [name for name, view in workload.views.items() if _alike(view.schema, state.schema)]
        copies = [name for name in alike if name.startswith(COPY)]
        if table in alike and random.random() < 0.6 and (not workload.changes_tables or table in copies):
            await self._make(checkpoint, table, name=table, replace=True)
        elif copies and (len(workload.views) >= 4 or random.random() < 0.4):
            await self._make(checkpoint, table, name=random.choice(copies), replace=True)
        elif len(workload.views) < 4:
            self._copies += 1
            await self._make(checkpoint, table, name=f"{COPY}-{self._copies}", replace=False)

    async def _make(self, checkpoint: str, table: str, *, name: str, replace: bool) -> None:
        """Restore until it is known to be done, or that it cannot be."""
        workload, history = self._workload, self._workload.history
        layout = self._random.choice(("", "", "columns", "rows", "grid"))
        newest_id = max(history.schemas)
        request = RestoreTables(
            url=URL,
            checkpoint=checkpoint,
            tables=(table,),
            name=name,
            replace=replace,
            layout=layout,
            newest_id=newest_id,
        )
        self.doing = f"restores {table!r} of {checkpoint} as {name!r}"
        history.dropped |= {view.schema.table_id for view in workload.views.values() if view.schema.name == name}
        for _ in range(60):
            try:
                async with asyncio.timeout(60.0):
                    (view,) = await self._client.api.restore(request)
            except AlreadyExists as error:  # an earlier try has made it, or is making it
                if "is another one than" in error.message:  # somebody has made another one in its place
                    await self._settle(name)
                    return
                try:
                    view = await self._client.api.table(name)
                except MempoolError:
                    continue
                if view.schema.table_id <= newest_id:
                    await asyncio.sleep(1.0)
                    continue
            except NotFound as error:
                if checkpoint not in names(self._place.list()):  # others have taken its place
                    await self._settle(name)
                    return
                workload.marks[f"a restore that failed: {type(error).__name__}"] += 1
                await asyncio.sleep(1.0)
                continue
            except (MempoolError, TimeoutError) as error:
                workload.marks[f"a restore that failed: {type(error).__name__}"] += 1
                if isinstance(error, Internal) or (isinstance(error, DataLoss) and not history.lost):
                    history.say(f"a restore failed: {error!r}")
                await asyncio.sleep(1.0)
                continue
            workload.marks["a table that was restored in its place" if replace else "a table restored beside it"] += 1
            self._found(name, view.schema.table_id)
            history.note_view(view)
            workload.views[name] = view
            return
        history.say(f"{self.doing}: was never answered")

    async def _settle(self, name: str) -> None:
        """It is not known which of a name there is: take the one that is there when all is quiet."""
        for _ in range(60):
            try:
                view = await self._client.api.table(name)
            except NotFound:
                self._workload.views.pop(name, None)
                return
            except MempoolError:
                await asyncio.sleep(1.0)
                continue
            self._found(name, view.schema.table_id)
            self._workload.views[name] = view
            return

    def _found(self, name: str, table_id: int) -> None:
        """Of those of a name this is the one that is there."""
        history = self._workload.history
        history.dropped |= {
            other for other, schema in history.schemas.items() if schema.name == name and other != table_id
        }

    # The end

    async def end(self) -> None:
        """Without faults a checkpoint can be taken, and all that count are whole and what was trained."""
        workload = self._workload
        if workload.views and not workload.history.lost:
            problem: MempoolError | None = None
            for _ in range(5):
                self.doing = "takes a last checkpoint"
                if (problem := await self._take(TakeCheckpoint(url=URL))) is None:
                    break
                await asyncio.sleep(10.0)
            else:
                workload.history.say(f"no progress: without faults no checkpoint is taken: {problem!r}")
        self._check_all()

    def _check_all(self) -> None:
        history, there = self._workload.history, names(self._place.list())
        told = self._whole()
        if told and (not there or there[-1] < told[-1]):
            history.say(f"checkpoint {told[-1]} was told to be whole, and {there} are there")
        for name in there:
            damages = list(verify(self._place, name).damages)
            if damages:
                history.say(f"checkpoint {name} is damaged: {damages[0]}")
        for name in there[-2:]:
            self._check_content(name, read_manifest(self._place, name).tables)

    def _check_content(self, name: str, tables: Iterable[str]) -> None:
        """What a checkpoint has of each table is what its steps make, bit for bit."""
        history, manifest = self._workload.history, self._workload.history.saved.manifests[name]
        for table in tables:
            state = manifest.tables[table]
            schema, source = state.schema, TableSource(url=URL, checkpoint=name, table=table)
            try:
                expected = history.oracle_of(schema.table_id, state.version)
            except KeyError as error:
                history.say(
                    f"checkpoint {name} has version {state.version} of table {table!r}, which nobody made: {error}"
                )
                continue
            found = Oracle(schema, source=source, version=state.version)
            trained = torch.arange(TRAINED)
            for array in expected.arrays():
                right, rows = expected.read(array, trained), found.read(array, trained)
                same = torch.equal(right, rows) if is_exact(schema) else torch.allclose(right, rows, 1e-5, 1e-6)
                if not same:
                    history.say(f"checkpoint {name}: {array} of table {table!r} is not version {state.version}")
            if may_be_written(schema):
                ids = torch.arange(TRAINED, NUM_SLOTS)
                began_s, ended_s = history.saved.origin(source).taken_s
                check_written(
                    schema,
                    ids,
                    found.read("values", ids),
                    writes_of=lambda slot, schema=schema, span=(began_s, ended_s): [
                        along
                        for write in history.writes[schema.table_id, slot]
                        if (along := write.taken_along(*span)) is not None
                    ],
                    asked_s=float("inf"),
                    say=lambda text, name=name: history.say(f"checkpoint {name}: {text}"),
                )
            expected.close()
            found.close()
