"""The pool as a user holds it: tables by name, scaling, status. Waits for coroutines that run on the process's IO loop.

How the controller and the shards are reached is for whoever makes it: ``connect`` (gRPC) or ``mempool.local``.
"""

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from mempool.client.counts import shard_count
from mempool.client.direct.asking import DialAtOnce
from mempool.client.following import Following
from mempool.client.groups.group import Group, finder, join
from mempool.client.groups.joining import PATIENCE_S, asked
from mempool.client.keeping import Keeping
from mempool.client.opened import OpenTables
from mempool.client.opening.connection import Connection
from mempool.client.opening.creation import CreateProgress, Creation
from mempool.client.reading.snapshots import drop_snapshot, take_snapshot
from mempool.client.reading.versions import checked_name
from mempool.client.routing.fanout import Dial
from mempool.client.routing.router import Router
from mempool.client.routing.whereabouts import Whereabouts
from mempool.client.table import Table
from mempool.config import TableConfig
from mempool.errors import InvalidRequest, NotFound, PoolUnreachable, ShardUnavailable, Unavailable
from mempool.types import (
    PoolApi,
    PoolStatus,
    RescaleProgress,
    TableView,
)
from mempool.types.groups.meeting import Consistency, Reduction
from mempool.types.keys import is_key_table, key_table, key_table_name

T = TypeVar("T")


class Pool(Keeping):
    """A client of one pool. All threads may use it. Close it, or use it with ``with``.

    One that is not closed ends, with a ResourceWarning, when it and its tables are gone.

    Args:
        api: The controller, or what stands for it; closed with the pool.
        dial: Gives the host of a shard, without waiting.
        name: The pool's name, for messages.
        embedded: It runs in this process, for messages.
        doing: What a shard is at just now, for messages; "" if there is nothing to say.
        timeout_s: Deadline of each call but ``create_table`` and ``rescale``, seconds, retries included.
        on_close: Awaited when the pool is closed, after everything else.
        dial_at_once: Gives the way to a shard for threads that wait themselves; None: there is none.
        address: As it was connected to.
    """

    def __init__(
        self,
        api: PoolApi,
        dial: Dial,
        *,
        name: str = "",
        embedded: bool = False,
        doing: Callable[[int], str] | None = None,
        timeout_s: float = 30.0,
        on_close: Callable[[], Awaitable[None]] | None = None,
        dial_at_once: DialAtOnce | None = None,
        address: str = "",
    ) -> None:
        self._where = Whereabouts(name=name, embedded=embedded, doing=doing, address=address)
        self._connection = Connection(
            api, dial, where=self._where, timeout_s=timeout_s, on_close=on_close, dial_at_once=dial_at_once
        )
        self._api = api
        self._following = Following(api, self._connection)
        self._open = OpenTables(self._connection, group=secrets.token_hex(16))
        if not embedded:  # each process has an embedded pool of its own
            self._connection.coordinator.found = finder(self._connection.coordinator, self.router, api)

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            f"{self._where.pool} is a connection and cannot be pickled. {self._where.elsewhere_advice}"
        )

    def __copy__(self) -> Self:
        """Itself, as its tables are: a copy of a model that holds it uses the same pool."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Itself."""
        return self

    def __repr__(self) -> str:
        return f"Pool({self.name!r}{', closed' if self._connection.closed else ''})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        return self._where.name

    @property
    def timeout_s(self) -> float:
        """Deadline of each call but ``create_table`` and ``rescale``, seconds, retries included."""
        return self._connection.timeout_s

    @property
    def router(self) -> Router:
        """The way to the shards, for those who work on the IO loop themselves."""
        return self._connection.router

    def create_table(
        self,
        config: TableConfig,
        *,
        exist_ok: bool = False,
        progress: Callable[[CreateProgress], None] | None = None,
    ) -> Table:
        """Make a table; its values have their initial state when this returns.

        Takes as long as the table is large; timeout_s bounds only how long nothing may move. What takes longer than two
        seconds says so, once, through the logger "mempool".

        Args:
            config: The table.
            exist_ok: Open a table of that name that is there already, if it is what the config says. (Sizes of pages
                and blocks, layout, rounding and init_std are compared where the config names them.)
            progress: Called on this thread with each report, from two seconds on about once a second; an exception of
                it ends the wait, not the making.

        Raises:
            AlreadyExists: There is a table of that name; with exist_ok, and it differs: the message says in what.
            PoolUnreachable: The controller did not answer for timeout_s.
            DeadlineExceeded: The pool did not get on with it for timeout_s; it goes on all the same.
        """
        creation = Creation(config, api=self._api, router=self.router, exist_ok=bool(exist_ok))
        try:
            self._following.follow(creation.reports(), progress)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                f"The pool goes on making table {config.name!r}: create_table(..., exist_ok=True) waits for it again, "
                f"drop_table({config.name!r}) gives it up."
            )
            raise
        return self._open.opened(creation.view)

    def table(self, name: str) -> Table:
        """A table by name; the same object for as long as the pool has that table.

        Raises:
            NotFound: There is no such table.
            PoolUnreachable: Nobody answered within timeout_s.
        """
        if name.endswith(key_table_name("")):
            raise InvalidRequest(f"table {name!r} has the keys of another table; take that one, and its keys")
        return self._open.opened(self._connection.run(self.router.open(name)))

    def tables(self) -> tuple[Table, ...]:
        """All tables, in the order they were made; those of trained keys are their tables' (``Table.keys``)."""
        views = self._connection.run(self._list_tables())
        return tuple(self._open.opened(view) for view in views if not is_key_table(view.schema))

    def reopen(self, name: str) -> Table:
        """The pool's table of that name as it is now, by the ``Table`` that this client had of that name before.

        For a table that another client has replaced (``restore`` does so itself) or made again: layers and optimizers
        that use that ``Table`` go on with the new one. What is pending on the old one is dropped, and backward passes
        of its look-ups are refused.

        Raises:
            InvalidRequest: The table has other slots, values or keys than the ``Table``.
            NotFound: There is no such table.
            PoolUnreachable: Nobody answered within timeout_s.
        """
        view = self._connection.run(self.router.open(name))
        if key_table(view.schema) is not None:
            self._open.taken_over(self._connection.run(self.router.open(key_table_name(name))))
        return self._open.taken_over(view, strict=True)

    def drop_table(self, name: str) -> None:
        """Drop a table, its values and what is pending on it, for every client.

        Raises:
            NotFound: There is no such table.
            PoolUnreachable: The controller did not answer within timeout_s.
        """
        self._connection.run(self._drop_table(name))
        self._open.dropped(name)

    def join(
        self,
        group: str,
        rank: int,
        world_size: int,
        *,
        consistency: Consistency = "sync",
        staleness: int = 0,
        reduction: Reduction = "mean",
        elastic: bool = False,
        step: int | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> Group:
        """Be one of the ranks that train this pool's tables together. Before the first backward pass.

        Under torchrun, and where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, nothing needs to be said: the
        first step joins, sync, with the mean. MEMPOOL_JOIN=0, or ``world_size=1`` here (not elastic), has a process
        train by itself.

        Args:
            group: The job's name: the same for all its ranks, and no other job's on this pool.
            rank: This process's number, from 0.
            world_size: How many there are.
            consistency: "sync": a step is applied once all ranks have committed it, as one of all: they train what one
                process does on the whole batch, if all commit (or ``step``) equally often, the same tables with the
                same lr. "async": each rank's commits as they come. "bounded": the same, but no rank is more than
                ``staleness`` steps ahead of the slowest.
            staleness: Of "bounded".
            reduction: Of "sync": "mean" of the ranks' gradients, as DDP does, or their "sum".
            elastic: The group may go on with another number of ranks, when all have come anew.
            step: At which step this process's model is: it is warned where the group is at another one.
            timeout_s: How long ranks that live are waited for; one that is gone is reported within its lease.

        Raises:
            InvalidRequest: A number makes no sense, something is pending, or another rank says other terms: both are
                named.
            AlreadyExists: Another process is this rank, and lives: both are named.
            PoolUnreachable: Nobody answered within the pool's timeout_s.
        """
        joining = asked(
            group,
            rank,
            world_size,
            consistency=consistency,
            staleness=staleness,
            reduction=reduction,
            elastic=elastic,
            step=step,
            timeout_s=timeout_s,
        )
        return join(joining, self._connection, lambda: {table.name: table.link.version() for table in self.tables()})

    def rescale(self, shards: int, *, progress: Callable[[RescaleProgress], None] | None = None) -> None:
        """Change the number of shards while the pool serves: pages move, training and lookups go on.

        Has no deadline once begun.

        Args:
            shards: How many shards the pool shall have.
            progress: Called on this thread with each report; an exception of it ends the watching, not the rescale.

        Raises:
            InvalidRequest: Another rescale is going on, or shards is below 1.
            PoolUnreachable: The controller does not answer; nothing has begun.
            ShardUnavailable: It was lost on the way: the same call goes on from where it stopped.
        """
        count = shard_count(shards)
        reports, first = self._following.begun_rescale(count)
        self._follow_moves(f"the rescale to {count} shards", reports, progress, first)

    def rebalance(
        self, *, dry_run: bool = False, progress: Callable[[RescaleProgress], None] | None = None
    ) -> RescaleProgress:
        """Even the load of the shards while the pool serves, by how much their pages are read and written lately.

        Pages change places between shards that have much to do and those that have little, as few as bring every shard
        within 5 % of its share, if that can be; each shard has as many afterwards. ``rescale`` does so too. Has no
        deadline once begun.

        Args:
            dry_run: Move nothing; what is returned says what would be moved, and what that makes of the load.
            progress: As of ``rescale``.

        Returns:
            The last report: ``loads`` has each shard's part of the load before and after.

        Raises:
            InvalidRequest: A rescale is going on, or has stopped half way.
            PoolUnreachable: The controller does not answer; nothing has begun.
            ShardUnavailable: It was lost on the way: the same call goes on from where it stopped.
        """
        reports, first = self._following.begun_rebalance(dry_run=dry_run)
        last = self._follow_moves("the evening of load", reports, progress, first)
        assert last is not None, "the last report says that it is done"
        return last

    def _follow_moves(
        self,
        what: str,
        reports: AsyncIterator[RescaleProgress],
        progress: Callable[[RescaleProgress], None] | None,
        first: RescaleProgress | None,
    ) -> RescaleProgress | None:
        """The last report."""
        try:
            return self._following.follow(reports, progress, first)
        except PoolUnreachable as error:
            raise ShardUnavailable(
                f"the pool's controller was lost during {what} ({error.message}). Shards serve on, and where its "
                "process died Ray starts another; the same command, given again, goes on from where this stopped. "
                "mempool status says how far it is"
            ) from error

    def snapshot(self, name: str, *, tables: Iterable[str] | None = None) -> dict[str, int]:
        """Keep tables as they are now, for ``table.at(name)``, until ``drop_snapshot``.

        It is in the memory of the shards, as ``Table.at`` keeps it, and nobody waits for it. It goes where that takes
        more than it may, where pages move, and where a shard is started anew: what must not go is a ``checkpoint``.
        Each table is of one version over all shards, with every commit that was acknowledged before, and the tables are
        of one moment: a step of several that is committed meanwhile is in all of them or in none.

        Args:
            name: At most 64 bytes; not "latest".
            tables: Names; None: all tables.

        Returns:
            The versions, by table.

        Raises:
            AlreadyExists: A table has a snapshot of that name; none was taken.
            NotFound: There is no such table.
            VersionGone: There is too little room for it.
            Overloaded: Others commit to these tables so often that no moment between two commits was found.
            ShardUnavailable: A shard did not answer within timeout_s.
        """
        return self._connection.run(take_snapshot(self.router, checked_name(name), tables, views=self._list_tables))

    def drop_snapshot(self, name: str, *, tables: Iterable[str] | None = None) -> None:
        """Let go what ``snapshot`` has kept; readers of it read on. Repeatable; no error where there is none.

        Raises:
            ShardUnavailable: A shard did not answer within timeout_s: repeat it.
        """
        self._connection.run(drop_snapshot(self.router, checked_name(name), tables, views=self._list_tables))

    def status(self) -> PoolStatus:
        """Shards, tables, and whether pages are moving."""
        return self._connection.run(self._connection.tries.run("status", self._api.status))

    def close(self) -> None:
        """Give back connections; an embedded pool ends with it. Repeatable.

        What is pending is lost. What was committed is told to the shards that have not heard of it yet, for some
        seconds at most; they learn of it by themselves too.
        """
        self._connection.close()

    async def _list_tables(self) -> list[TableView]:
        return [self.router.adopt(view) for view in await self._connection.tries.run("tables", self._api.tables)]

    async def _drop_table(self, name: str) -> None:
        table_id = await self._connection.tries.run(name, lambda: self._id_of(name))
        tries = 0

        async def ask() -> None:
            nonlocal tries
            tries += 1
            try:
                # By its id: a try that is late must not drop a table that somebody made of that name meanwhile.
                await self._api.drop_table(name, table_id=table_id)
            except NotFound:
                if tries == 1:
                    raise

        await self._connection.tries.run(name, ask)

    async def _id_of(self, name: str) -> int:
        """The id of a table, also of one that is being made. Raises NotFound; Unavailable where it is not known."""
        try:
            return (await self._api.table(name)).schema.table_id
        except (NotFound, Unavailable):  # a making that waits to know what there is can be ended, too
            for creation in (await self._api.status()).creating:
                if creation.table == name:
                    return creation.table_id
            raise
