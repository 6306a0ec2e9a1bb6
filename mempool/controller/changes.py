"""Creating and dropping tables. A creation is a task of the controller: it outlives the call that asked for it.

The life of one: its schema is checked and its name taken; it waits for a rescale to end; it is placed, on a thread;
every shard attaches it as pending and fills its pages, while others change tables too. A fork is attached likewise,
while all else may change, and has its turn once more: for the moment, if pages and shards are what they were. One shard
is told that it is made, which decides it: it is a table of the roster, and the others are told. A repeat of the call
joins in, a drop of its name ends it, a failure leaves nothing behind; what a controller that dies leaves,
``agreement.recovery`` ends.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mempool.controller.calls import ShardCalls
from mempool.controller.roster import Roster
from mempool.controller.saving.alike import differences, require_alike, require_no_key_table
from mempool.controller.saving.forking import Fork, Forking, forked_view
from mempool.controller.saving.making import Making, Origin, attached, creation
from mempool.controller.telling import Telling
from mempool.errors import AlreadyExists, InvalidRequest, MempoolError, NotFound, ShardUnavailable, StalePlacement
from mempool.placement import plan_table
from mempool.types import (
    AttachTable,
    Placement,
    ShardInfo,
    ShardStatus,
    TableCreation,
    TableSchema,
    TableView,
)
from mempool.types.caller import Caller, calling
from mempool.types.keys import key_table, key_table_name
from mempool.types.pool import MAX_PLACED_PAGES, MAX_TABLES, WAITS_FOR_CHANGE, WAITS_FOR_SHARDS
from mempool.types.running import Clock, Runner
from mempool.types.schema_checks import check_schema, shown
from mempool.types.sizes import bytes_by_owner, num_pages

_LOG = logging.getLogger("mempool.controller")
_FILL_TIMEOUT_S = 3600.0
"""Writing the initial values of a large table takes minutes; whoever waits for it has a deadline of their own."""


class TableChanges:
    """Creates and drops the tables of one pool.

    Args:
        roster: The pool's shards and tables.
        calls, telling: Reach the shards.
        forking: Has them make a table of another one.
        changing: Held by whatever changes the pool: a rescale, a settling, and planning here; not while pages are
            filled.
        clock: Seconds.
        runner: Plans tables.
    """

    def __init__(
        self,
        roster: Roster,
        calls: ShardCalls,
        *,
        telling: Telling,
        forking: Forking,
        changing: asyncio.Lock,
        clock: Clock,
        runner: Runner,
    ) -> None:
        self._roster = roster
        self._calls = calls
        self._telling = telling
        self._forking = forking
        self._clock = clock
        self._runner = runner
        self._changing = changing
        self._making: dict[str, Making] = {}

    async def create(self, schema: TableSchema) -> TableView:
        """Make a table, or wait for the one that is being made of the same schema.

        Raises:
            InvalidRequest: The schema is wrong, or the pool has too many tables or pages.
            AlreadyExists: There is a table of that name, or one of another schema is being made.
            NotFound: It was dropped while it was being made.
            ShardUnavailable: Whether there is one of that name is not known yet.
            MempoolError: A shard could not attach it; it is on none then.
        """
        check_schema(schema)
        require_no_key_table(schema.name, "made")
        return await self._create(schema)

    async def restore(self, tables: Sequence[tuple[TableSchema, Origin]]) -> tuple[TableView, ...]:
        """Make tables of a checkpoint's, each at once with that of its keys, if that is among them. Returns all views.
        Raises as ``create`` does."""
        names = {key_table_name(schema.name) for schema, _ in tables}
        of_keys = {schema.name: (schema, origin) for schema, origin in tables if schema.name in names}
        own = [(schema, origin) for schema, origin in tables if schema.name not in names]
        made = await asyncio.gather(
            *(
                self._create(*each, keys=[keys] if (keys := of_keys.get(key_table_name(each[0].name))) else [])
                for each in own
            ),
            return_exceptions=True,
        )
        for view in made:
            if isinstance(view, BaseException):
                raise view
        return tuple(self._roster.view(schema.name) for schema, _ in tables)

    async def _create(
        self,
        schema: TableSchema,
        origin: Origin | Fork | None = None,
        *,
        keys: Sequence[tuple[TableSchema, Origin | Fork]] = (),
    ) -> TableView:
        """keys: That of its keys, of a table that is restored or a fork."""
        schema = replace(schema, table_id=0)
        making = self._making.get(schema.name)
        if making is None:
            asked = [*keys, (schema, origin)]
            for each in asked:
                self._require_new(*each)
            makings = [
                Making(schema=one, origin=of, table_id=self._roster.new_table_id(), began_s=self._clock())
                for one, of in asked
            ]
            making = makings[-1]
            with calling(Caller()):  # neither its deadline nor its name goes along: others may join in
                task = asyncio.create_task(self._make(making, *makings[:-1]))
            for one_making in makings:
                one_making.task, self._making[one_making.schema.name] = task, one_making
            task.add_done_callback(lambda task: self._made(makings, task))
        elif making.schema != schema or making.origin != origin:
            found = differences(making.schema, schema) or ["one of the two is restored, or from elsewhere"]
            raise AlreadyExists(
                f"table {schema.name!r} is being made by another call, and differs: "
                f"{'; '.join(found)}. Ask for the same, take another name, or end it "
                f"with pool.drop_table({schema.name!r})"
            )
        assert making.task is not None
        try:
            return await asyncio.shield(making.task)  # a caller that goes away ends its waiting alone
        except asyncio.CancelledError:
            if making.ended is not None and making.task.done():
                raise making.ended from None
            raise

    async def drop(self, name: str, table_id: int) -> None:
        """Drop a table; one that is being made is not made. As ``Controller.drop_table``."""
        require_no_key_table(name, "dropped")
        await self._drop(name, table_id)
        await self._drop_keys(name)

    async def _drop(self, name: str, table_id: int = 0) -> None:
        making = self._making.get(name)
        if making is not None and table_id in (0, making.table_id, making.first_id):
            await self._end(making, NotFound(f"table {name!r} was dropped while it was being made"))
            if name not in self._roster.names and self._roster.complete:
                return
        async with self._changing:
            known = self._roster.find(name)
            if known is None or table_id not in (0, known.schema.table_id):
                await self._know_all(name)
            view = self._roster.view(name)
            found = view.schema.table_id
            if table_id not in (0, found):
                raise NotFound(
                    f"table {name!r} with the id {table_id} is gone already; the pool has another of that name, with "
                    f"the id {found}, which stays"
                )
            told = await self._decide_drop(view)
            self._roster.forget(found)
            others = [info for info in self._roster.infos if info != told]
            await self._calls.everywhere(others, lambda host: host.drop_table(found), tolerant=True)

    async def _drop_keys(self, name: str) -> None:
        """Drop the table of the keys of a table that is gone. Where that fails it is left over, and is dropped when a
        table of that name is made or restored."""
        keys = key_table_name(name)
        if keys in self._making or self._roster.find(keys) is not None:
            try:
                await self._drop(keys)
            except MempoolError as error:
                _LOG.warning("the keys of table %r, which is dropped, are left over: %s", name, error)

    async def drop_left_over(self, tables: Sequence[tuple[TableSchema, Origin]]) -> None:
        """Drop keys of tables that are gone, in whose place these are to be."""
        for schema, _ in tables:
            if self._roster.complete and schema.name not in self._making and self._roster.find(schema.name) is None:
                await self._drop_keys(schema.name)

    async def _decide_drop(self, view: TableView) -> ShardInfo:
        """Tell one shard that a table is dropped, an owner if one answers: that decides it, for every controller.

        Raises what the last one said where none could be told: the table is there still.
        """
        owners = view.placement.shards
        problem: MempoolError = ShardUnavailable(f"table {view.schema.name!r} was not dropped: the pool has no shards")
        for info in sorted(self._roster.infos, key=lambda info: (info.shard not in owners, info.shard)):
            try:
                await self._calls.call(info, lambda host: host.drop_table(view.schema.table_id))
            except MempoolError as error:
                problem = error
            else:
                return info
        raise problem

    async def idle(self) -> None:
        """Wait until no table is being filled. Call it with ``changing`` held, so that none begins meanwhile."""
        while filling := [making.task for making in self._filling.values() if making.task]:
            await asyncio.wait(filling)

    @property
    def filling(self) -> tuple[str, ...]:
        """Names of the tables that are being filled."""
        return tuple(self._filling)

    @property
    def _filling(self) -> dict[str, Making]:
        """Those whose pages are to stay where they were planned to be. A fork that prepares waits for its turn anew."""
        return {
            name: making for name, making in self._making.items() if making.view is not None and not making.prepares
        }

    async def close(self) -> None:
        """End what is being made."""
        why = ShardUnavailable("the table was not made: its pool's controller is closing")
        await asyncio.gather(*(self._end(making, why) for making in list(self._making.values())))

    def creations(self, statuses: Iterable[ShardStatus]) -> tuple[TableCreation, ...]:
        """The tables that are being made, and how far the shards say that they are."""
        seen = {(table.table_id, status.info.shard): table for status in statuses for table in status.tables}
        change = WAITS_FOR_CHANGE if self._roster.complete else WAITS_FOR_SHARDS
        return tuple(creation(making, seen, self._clock(), change) for making in self._making.values())

    async def _know_all(self, name: str) -> None:
        """Hear of every table that there is, with ``changing`` held. Raises ShardUnavailable where a shard that was not
        heard yet may know of one of that name: another one beside it would take its place."""
        if self._roster.complete:
            return
        problems = await self._telling.settle()
        if not self._roster.complete:
            shard, problem = min(problems.items())
            raise ShardUnavailable(
                f"whether there is a table {shown(name)} is not known yet: shard {shard} has not said so ({problem}). "
                "Nothing was changed; ask again",
                shard=shard,
            )

    def require_new(self, tables: Sequence[tuple[TableSchema, Origin]]) -> None:
        """Raises AlreadyExists where one of these stands in nobody's place, and there is one of its name, or in that of
        a table that is another one."""
        for schema, origin in tables:
            if self._roster.complete:  # else it is seen once all shards were heard
                self._require_none(schema, origin)

    def _require_none(self, schema: TableSchema, origin: Origin | Fork | None) -> None:
        """Raises AlreadyExists where there is a table of that name, in whose place it is not to be."""
        present = self._roster.find(schema.name)
        if present is None:
            return
        if origin is not None and origin.replace:
            if origin.newest_id and present.schema.table_id > origin.newest_id:
                raise AlreadyExists(
                    f"table {schema.name!r} was made or restored after this restore was asked for, perhaps by an "
                    f"earlier try of it: it stays as it is. Take it with pool.table({schema.name!r}), or ask anew"
                )
            if isinstance(origin, Origin):
                require_alike(present.schema, schema, origin.source)
        else:
            found = "; ".join(differences(present.schema, schema))
            remedy = (
                f"take it with pool.table({schema.name!r}), or drop it first with pool.drop_table({schema.name!r})"
                if not isinstance(origin, Origin)
                else "say replace=True (--replace) for the place of that one, or another name (name=, --as)"
            )
            raise AlreadyExists(
                f"table {schema.name!r} exists already ({present.schema.num_slots:,} x {present.schema.value_dim} "
                f"{present.schema.dtype}{'; it differs: ' + found if found else ''}); {remedy}"
            )

    def _require_new(self, schema: TableSchema, origin: Origin | Fork | None) -> None:
        """Raises where a table may not be added to what the pool has and makes."""
        if self._roster.complete:  # a shard that was not heard may have been told to drop that one
            self._require_none(schema, origin)
        schemas = [making.schema for making in self._making.values()]
        schemas += [view.schema for view in self._roster.views]
        if len(schemas) >= MAX_TABLES:
            raise InvalidRequest(
                f"the pool has {len(schemas):,} tables, the most it may have; drop one, or keep several tables' rows "
                "in one table"
            )
        pages = sum(num_pages(other) for other in schemas)
        if pages + num_pages(schema) > MAX_PLACED_PAGES:
            raise InvalidRequest(
                f"table {schema.name!r} has {num_pages(schema):,} pages and the pool's tables {pages:,}; together "
                f"they may have {MAX_PLACED_PAGES:,}. Give it a larger page_slots or block_dim, or drop a table"
            )

    async def fork(self, schemas: Sequence[tuple[TableSchema, Fork]]) -> TableView:
        """Make a table, the last of these, as another one is, and that of its keys as that one's: at one moment. Raises
        as ``create`` does."""
        (schema, fork), *keys = reversed(schemas)
        if self._roster.complete and schema.name not in self._making and self._roster.find(schema.name) is None:
            await self._drop_keys(schema.name)
        return await self._create(schema, fork, keys=keys)

    async def _make(self, making: Making, *keys: Making) -> TableView:
        """The table, and before it that of the keys that it trains; a checkpoint's, or a fork's, come with it."""
        if making.origin is not None:
            return await self._make_all((*keys, making))
        name, own = making.schema.name, key_table(making.schema)
        async with self._changing:
            await self._know_all(name)
            self._require_none(making.schema, None)
        try:
            await self._drop_keys(name)
            if own is not None:
                await self._create(own)
            return await self._make_all((making,))
        except BaseException:
            if self._roster.complete and self._roster.find(name) is None:  # else it may be made all the same
                await self._drop_keys(name)
            raise

    async def _make_all(self, makings: Sequence[Making]) -> TableView:
        """One table; or one that is restored, or a fork, the last, and before it that of its keys. Returns its view."""
        infos: tuple[ShardInfo, ...] = ()
        last = makings[-1]
        try:
            async with self._changing:
                for making in makings:
                    await self._know_all(making.schema.name)
                    if self._roster.overtaken(making.table_id):
                        making.first_id, making.table_id = making.table_id, self._roster.new_table_id()
                    self._require_none(making.schema, making.origin)
                infos, origin = self._roster.infos, last.origin
                if isinstance(origin, Fork):
                    await self._telling.require_settled(())
                    forks = self._plan_forks(makings, infos)
                else:
                    for making in makings:
                        await self._plan(making, infos)
            if isinstance(origin, Fork):
                await self._forking.prepare(forks, infos)
                async with self._changing:
                    await self._take_forks(makings, forks, infos)
            else:
                await asyncio.gather(*(self._fill(making, infos) for making in makings))
            self._require_same(infos, last.schema.name)
            before = [self._roster.find(making.schema.name) for making in makings]
            view = await self._confirm(makings, infos)
            for gone in filter(None, before):  # of two of one name the later one is the pool's, whoever hears of both
                await self._drop_replaced(gone.schema.table_id, infos)
            return view
        except BaseException:
            for making in makings:
                if making.view is not None:
                    await self._unmake(making.view, infos, asked=making.asked)
            raise
        finally:
            self._roster.unfinished.difference_update(making.table_id for making in makings)

    async def _drop_replaced(self, table_id: int, infos: tuple[ShardInfo, ...]) -> None:
        self._roster.dropped.add(table_id)
        await self._calls.everywhere(infos, lambda host: host.drop_table(table_id), tolerant=True)

    async def _plan(self, making: Making, infos: tuple[ShardInfo, ...]) -> None:
        origin = making.origin
        assert not isinstance(origin, Fork), "its pages are where the other table's are"
        schema = replace(making.schema, table_id=making.table_id)
        view, making.bytes_of = await self._runner.run(lambda: first_view(schema, infos, self._roster.controller))
        self._roster.unfinished.add(making.table_id)
        if origin is not None and origin.source.checkpoint:
            view = self._roster.save(view, origin.source, origin.ledger.version)
        making.view = view

    async def _fill(self, making: Making, infos: tuple[ShardInfo, ...]) -> None:
        assert making.view is not None, "it is planned"
        assert not isinstance(making.origin, Fork), "it is filled by its moment"
        request = attached(making.view, making.origin)
        await self._calls.everywhere(infos, lambda host: host.attach_table(request), timeout_s=_FILL_TIMEOUT_S)

    async def _confirm(self, makings: Sequence[Making], infos: tuple[ShardInfo, ...]) -> TableView:
        """All shards have them: one is told that they are made, which decides it for all of them at once, then the
        others. Returns the last one's view."""
        views = [making.view for making in makings if making.view is not None]
        assert len(views) == len(makings), "shards have them"
        made = AttachTable(view=views[-1], mode="confirm", also=tuple(view.schema.table_id for view in views[:-1]))
        for making in makings:
            making.asked = True
        await self._calls.call(infos[0], lambda host: host.attach_table(made))
        views = [self._roster.put(view.schema, view.placement, saved=view.saved) for view in views]
        await self._telling.confirm(replace(made, view=views[-1]), infos[1:])
        return views[-1]

    def _plan_forks(self, makings: Sequence[Making], infos: tuple[ShardInfo, ...]) -> list[tuple[TableView, TableView]]:
        """Views of them and of the tables that they are to be as."""
        forks = []
        for making in makings:
            base = self._base_of(making)
            schema = replace(making.schema, table_id=making.table_id)
            view = forked_view(schema, base, infos, self._roster.controller)
            making.bytes_of = bytes_by_owner(schema, view.placement.owners, view.placement.key_owners)
            forks.append((view, base))
        for making, (view, _) in zip(makings, forks, strict=True):
            making.view, making.prepares = view, True
            self._roster.unfinished.add(making.table_id)
        return forks

    def _base_of(self, making: Making) -> TableView:
        """The view of the table that it is to be as. Raises NotFound where that is not there any more."""
        fork = making.origin
        assert isinstance(fork, Fork), "it is one"
        base = self._roster.view(fork.table)
        if base.schema.table_id != fork.table_id:
            raise NotFound(f"table {fork.table!r} was dropped, or replaced, before it was forked")
        return base

    async def _take_forks(
        self,
        makings: Sequence[Making],
        forks: Sequence[tuple[TableView, TableView]],
        infos: tuple[ShardInfo, ...],
    ) -> None:
        """Shards are ready: the moment, with ``changing`` held, if the pool is as it was when that was planned."""
        for making, (_, planned) in zip(makings, forks, strict=True):
            await self._know_all(making.schema.name)
            self._require_none(making.schema, making.origin)
            base = self._base_of(making)
            if self._roster.infos != infos or not base.placement.same_owners(planned.placement):
                raise ShardUnavailable(
                    f"pages of table {base.schema.name!r} have moved, or shards have come, gone or started anew, while "
                    f"table {making.schema.name!r} was prepared to be a fork of it. Nothing was changed; ask again"
                )
            making.prepares = False
        await self._telling.require_settled(())
        await self._forking.take(forks)

    async def _unmake(self, view: TableView, infos: tuple[ShardInfo, ...], *, asked: bool) -> None:
        """Leave nothing of a table on any shard. Where one was asked to confirm it, that one says whether it is made:
        another controller may have heard so, and clients have used it."""
        table_id = view.schema.table_id
        try:
            if asked:
                await self._calls.call(infos[0], lambda host: host.drop_table(table_id, unmade=True))
        except StalePlacement:
            self._roster.put(view.schema, view.placement, saved=view.saved)
            self._telling.untold()
            return
        except MempoolError as error:
            _LOG.warning("whether table %r is made is not known yet: %s", view.schema.name, error)
            self._roster.doubt()  # shards are asked when they are settled
            self._telling.untold()
            return
        self._roster.forget(table_id)
        await self._calls.everywhere(infos, lambda host: host.drop_table(table_id), tolerant=True)

    def _made(self, makings: Sequence[Making], task: "asyncio.Task[TableView]") -> None:
        """They are made, or are not: whoever asked for them may be gone."""
        for making in makings:
            del self._making[making.schema.name]
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.warning("table %r was not made: %s", makings[-1].schema.name, error)

    def _require_same(self, infos: tuple[ShardInfo, ...], table: str) -> None:
        """Raises ShardUnavailable where a shard was started anew since: what it had filled is gone."""
        for info in infos:
            if self._roster.shards.get(info.shard) != info:
                raise ShardUnavailable(
                    f"shard {info.shard} was started anew while table {table!r} was being made; ask for it again",
                    shard=info.shard,
                )

    async def _end(self, making: Making, why: MempoolError) -> None:
        making.ended = why
        assert making.task is not None
        making.task.cancel()
        await asyncio.wait([making.task])


def first_view(
    schema: TableSchema, infos: tuple[ShardInfo, ...], controller: str = ""
) -> tuple[TableView, dict[int, int]]:
    """The view of a new table, and how many bytes each of its owners has to fill."""
    assignment = plan_table(schema, None, [info.shard for info in infos])
    placement = Placement(table_id=schema.table_id, epoch=1, owners=assignment.owners, key_owners=assignment.key_owners)
    bytes_of = bytes_by_owner(schema, placement.owners, placement.key_owners)
    return TableView(schema=schema, placement=placement, shards=infos, controller=controller), bytes_of
