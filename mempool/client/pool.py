"""The pool as a user holds it: tables by name, scaling, status. Waits for coroutines that run on the process's IO loop.

How the controller and the shards are reached is for whoever makes it: ``connect`` (gRPC) or ``mempool.local``.
"""

import os
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, TypeVar, overload

from mempool.client.checkpoints import CheckpointHandle, Restoring, asked_checkpoint, asked_restore
from mempool.client.counts import shard_count
from mempool.client.direct.asking import DialAtOnce
from mempool.client.exchange import Export, ExportProgress, asked_import
from mempool.client.following import Following
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
    CheckpointProgress,
    PoolApi,
    PoolStatus,
    RescaleProgress,
    TableView,
)
from mempool.wire.channels import loop

T = TypeVar("T")


class Pool:
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
    ) -> None:
        self._where = Whereabouts(name=name, embedded=embedded, doing=doing)
        self._connection = Connection(
            api, dial, where=self._where, timeout_s=timeout_s, on_close=on_close, dial_at_once=dial_at_once
        )
        self._api = api
        self._following = Following(api, self._connection)
        self._open = OpenTables(self._connection, group=secrets.token_hex(16))

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
        return self._open.opened(self._connection.run(self.router.open(name)))

    def tables(self) -> tuple[Table, ...]:
        """All tables, in the order they were made."""
        return tuple(self._open.opened(view) for view in self._connection.run(self._list_tables()))

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
        return self._open.taken_over(self._connection.run(self.router.open(name)), strict=True)

    def drop_table(self, name: str) -> None:
        """Drop a table, its values and what is pending on it, for every client.

        Raises:
            NotFound: There is no such table.
            PoolUnreachable: The controller did not answer within timeout_s.
        """
        self._connection.run(self._drop_table(name))
        self._open.dropped(name)

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
        try:
            self._following.follow(reports, progress, first)
        except PoolUnreachable as error:
            raise ShardUnavailable(
                f"the pool's controller was lost during the rescale to {count} shards ({error.message}). Shards serve "
                "on, and where its process died Ray starts another; the same command, given again, goes on from where "
                "this stopped. mempool status says how far it is"
            ) from error

    @overload
    def checkpoint(
        self,
        url: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = ...,
        incremental: bool = ...,
        keep: int | None = ...,
        extra: Mapping[str, Any] | None = ...,
        wait: Literal[True] = ...,
        progress: Callable[[CheckpointProgress], None] | None = ...,
    ) -> CheckpointProgress: ...

    @overload
    def checkpoint(
        self,
        url: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = ...,
        incremental: bool = ...,
        keep: int | None = ...,
        extra: Mapping[str, Any] | None = ...,
        wait: Literal[False],
    ) -> CheckpointHandle: ...

    def checkpoint(
        self,
        url: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = None,
        incremental: bool = True,
        keep: int | None = None,
        extra: Mapping[str, Any] | None = None,
        wait: bool = True,
        progress: Callable[[CheckpointProgress], None] | None = None,
    ) -> CheckpointProgress | CheckpointHandle:
        """Write the pool's tables to a place, as they are at one moment, while training and lookups go on.

        All tables are of one step boundary; steps that are acknowledged before this is called are in it. Has no
        deadline once begun. A checkpoint is there whole, or not at all.

        Args:
            url: A folder that all of the pool's processes have under this path, or a URL that fsspec knows
                ("s3://bucket/run-7"). It has checkpoints of one pool.
            tables: Names; None: all tables.
            incremental: Write only pages that changed since the newest checkpoint there, and name those for the rest.
            keep: Remove all but so many of the newest, once this one is whole; None: none.
            extra: Your own, JSON: kept with it.
            wait: False: answer a handle at once, once it has begun.
            progress: Called on this thread with each report, where it is waited for; an exception of it ends the
                watching, not the checkpoint.

        Returns:
            The last report: the checkpoint's name, the tables' versions; or the handle.

        Raises:
            InvalidRequest: The place is wrong, or another pool's; or another checkpoint is being taken.
            NotFound: There is no such table.
            StorageFailed: The place does not take it.
            PoolUnreachable: The controller does not answer; once begun, it may go on by itself: list the place.
        """
        request = asked_checkpoint(url, tables, incremental=incremental, keep=keep, extra=extra)
        if wait:
            return self._following.checkpoint(request, progress)
        reports, first = self._following.begun(request)
        handle = CheckpointHandle(first)
        loop.start(handle.follow(reports))
        return handle

    def restore(
        self,
        url: str | os.PathLike[str],
        *,
        checkpoint: str | None = None,
        tables: Iterable[str] | None = None,
        name: str | None = None,
        replace: bool = False,
        layout: str | None = None,
        progress: Callable[[CreateProgress], None] | None = None,
    ) -> tuple[Table, ...]:
        """Make tables of a checkpoint's, whatever number of shards and layout it was taken with: bit for bit.

        Each is there whole, or not at all; one that it replaces stays until then, and there must be room for both. A
        ``Table`` of this client that is replaced (or was dropped), and what uses it, goes on with the restored one, if
        that has as many slots and columns and the same keys: what was pending is dropped. Other clients are told so
        when they next ask, and go on by ``reopen``.

        Args:
            url: The place, as in ``checkpoint``.
            checkpoint: The name of the checkpoint; None: the newest.
            tables: Names in the checkpoint; None: all.
            name: What the table is to be called, where it is one alone. Random rounding goes by the name.
            replace: Take the place of tables of these names.
            layout: As in ``TableConfig``; None: as it was.
            progress: Called on this thread with each report, about once a second.

        Raises:
            NotFound: There is no such checkpoint, or it has no such table.
            AlreadyExists: There is a table of that name.
            DataLoss: The checkpoint is damaged; the message names file and bytes.
            InvalidRequest: The place is wrong, or the checkpoint is of a newer mempool.
            PoolUnreachable: The controller does not answer; the pool may go on with it: see ``status``.
        """
        request = asked_restore(url, tables, checkpoint=checkpoint, name=name, replace=replace, layout=layout)
        restoring = Restoring(self._api, request)
        self._following.follow(restoring.reports(), progress)
        views = self._open.adopted(restoring.views)
        opened = self._open.taken_over if replace else self._open.opened
        return tuple(opened(view) for view in views)

    def export_table(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        state: bool = False,
        via: str | os.PathLike[str] | None = None,
        progress: Callable[[ExportProgress], None] | None = None,
    ) -> ExportProgress:
        """Write a table as one safetensors file: ``values`` [num_slots, value_dim] in the table's dtype, and its keys.

        All of it is of one version of the table, while training goes on: a checkpoint of the table is taken aside and
        removed again, so there must be room for it, and the pool's processes and this one must see it. Some megabytes
        are in memory at a time. The file is there whole, or not at all.

        Args:
            name: The table's.
            file: A path, or a URL that fsspec knows.
            state: The optimizer's state too, as ``values.<state>``.
            via: Where the checkpoint is taken; None: beside the file.
            progress: Called on this thread with each report.

        Returns:
            The last report, with the table's version.

        Raises:
            NotFound: There is no such table.
            StorageFailed: The file, or what is written aside, is not taken.
            MempoolError: As ``checkpoint``.
        """
        export = Export(name, file, state=bool(state), via=via, progress=progress)
        try:
            self._following.checkpoint(export.request, export.heard)
            return export.write()
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(f"The pool may go on writing to {export.request.url}: remove what is left there.")
            raise
        finally:
            export.clear()

    def import_table(
        self,
        file: str | os.PathLike[str],
        config: TableConfig | None = None,
        *,
        name: str | None = None,
        replace: bool = False,
        values: str | None = None,
        keys: str | None = None,
        progress: Callable[[CreateProgress], None] | None = None,
    ) -> Table:
        """Make a table whose values, and keys where it has any, are a file's; optimizer state and steps begin anew.

        The shards read it themselves, each its own pages, some megabytes at a time. The table is there whole, or not at
        all; one that it replaces stays until then, as in ``restore``.

        Args:
            file: A safetensors file that this process and the pool's see under this path, or a URL that fsspec knows;
                or a file of torch.save, tensors alone. Exported by mempool, or a memory layer's ("[...]values.weight"
                and "[...]keys") or an embedding's ("[...]weight").
            config: The table; None: as the file says, where mempool wrote it.
            name: What it is to be called; None: as the config, or the file, says.
            replace: Take the place of a table of that name.
            values, keys: Names of their tensors; None: as they are found.
            progress: Called on this thread with each report, about once a second.

        Raises:
            NotFound: There is no such file.
            AlreadyExists: There is a table of that name.
            InvalidRequest: The file's tensors are not such a table's; with what was found.
            DataLoss: The file is damaged.
            PoolUnreachable: The controller does not answer; the pool may go on with it: see ``status``.
        """
        request = asked_import(file, config, name=name, replace_table=replace, values=values, keys=keys)
        restoring = Restoring(self._api, request)
        self._following.follow(restoring.reports(), progress)
        (view,) = self._open.adopted(restoring.views)
        return self._open.taken_over(view) if replace else self._open.opened(view)

    def snapshot(self, name: str, *, tables: Iterable[str] | None = None) -> dict[str, int]:
        """Keep tables as they are now, for ``table.at(name)``, until ``drop_snapshot``.

        It is in the memory of the shards, as ``Table.at`` keeps it, and nobody waits for it. It goes where that takes
        more than it may, where pages move, and where a shard is started anew: what must not go is a ``checkpoint``.
        Each table is of one version over all shards, with every commit that was acknowledged before.

        Args:
            name: At most 64 bytes; not "latest".
            tables: Names; None: all tables.

        Returns:
            The versions, by table.

        Raises:
            AlreadyExists: A table has a snapshot of that name; none was taken.
            NotFound: There is no such table.
            VersionGone: There is too little room for it.
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
