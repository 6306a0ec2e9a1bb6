"""The pool as a user holds it: tables by name, scaling, status. Waits for coroutines that run on the process's IO loop.

How the controller and the shards are reached is for whoever makes it: ``connect`` (gRPC) or ``mempool.local``.
"""

import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from mempool.client.routing.fanout import Dial
from mempool.client.routing.router import Router
from mempool.client.table import Table
from mempool.client.training.session import Session
from mempool.config import TableConfig, resolve
from mempool.errors import AlreadyExists, InvalidRequest, NotFound
from mempool.types import PoolApi, PoolStatus, RescaleProgress, TableSchema, TableView
from mempool.wire.channels import loop

T = TypeVar("T")

# Deadlines are kept on the loop; this only ends a wait for a loop that is stuck.
_STUCK_S = 30.0


class Pool:
    """A client of one pool. All threads may use it. Close it, or use it with ``with``.

    Args:
        api: The controller, or what stands for it; closed with the pool.
        dial: Gives the host of a shard, without waiting.
        name: The pool's name, for messages.
        timeout_s: Deadline of each call but ``rescale``, seconds, retries included.
        on_close: Awaited when the pool is closed, after everything else.
    """

    def __init__(
        self,
        api: PoolApi,
        dial: Dial,
        *,
        name: str = "",
        timeout_s: float = 30.0,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        if not timeout_s > 0.0:
            raise InvalidRequest(f"timeout_s = {timeout_s}: must be above 0 seconds.")
        self.name = name
        self.timeout_s = timeout_s
        self.router = Router(api, dial=dial, pool=name, timeout_s=timeout_s)
        self._api = api
        self._on_close = on_close
        self._group = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._tables: dict[int, Table] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"Pool({self.name!r}{', closed' if self._closed else ''})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def create_table(self, config: TableConfig) -> Table:
        """Make a table; its values have their initial state when this returns.

        Raises:
            AlreadyExists: There is a table of that name.
            PoolUnreachable: The controller did not answer within timeout_s.
        """
        return self._opened(self._run(self._create_table(resolve(config))))

    def table(self, name: str) -> Table:
        """A table by name; the same object for as long as the pool has that table.

        Raises:
            NotFound: There is no such table.
            PoolUnreachable: Nobody answered within timeout_s.
        """
        return self._opened(self._run(self.router.open(name)))

    def tables(self) -> tuple[Table, ...]:
        """All tables, in the order they were made."""
        return tuple(self._opened(view) for view in self._run(self._list_tables()))

    def drop_table(self, name: str) -> None:
        """Drop a table, its values and what is pending on it, for every client.

        Raises:
            NotFound: There is no such table.
            PoolUnreachable: The controller did not answer within timeout_s.
        """
        self._run(self._drop_table(name))
        with self._lock:
            dropped = [table_id for table_id, table in self._tables.items() if table.name == name]
            for table_id in dropped:
                del self._tables[table_id]
        for table_id in dropped:
            self._run(self._forget(table_id))

    def rescale(self, shards: int, *, progress: Callable[[RescaleProgress], None] | None = None) -> None:
        """Change the number of shards while the pool serves: pages move, training and lookups go on.

        Has no deadline once begun.

        Args:
            shards: How many shards the pool shall have.
            progress: Called on this thread with each report; an exception of it ends the watching, not the rescale.

        Raises:
            InvalidRequest: Another rescale is going on, or shards is below 1.
            PoolUnreachable: The controller does not answer; once begun, a rescale may go on by itself: see ``status``.
        """
        if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
            raise InvalidRequest(f"shards = {shards!r}: a pool has at least 1 shard.")
        reports, report = self._run(self.router.retried("rescale", lambda: self._begin_rescale(shards)))
        try:
            while report is not None:
                if progress is not None:
                    progress(report)
                report = self._run(_next(reports), timeout_s=None)
        finally:
            self._run(_end(reports))

    def status(self) -> PoolStatus:
        """Shards, tables, and whether pages are moving."""
        return self._run(self.router.retried("status", self._api.status))

    def close(self) -> None:
        """Give back connections; an embedded pool ends with it. What is pending is lost. Repeatable."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        loop.run(self._close(), timeout_s=self.timeout_s + _STUCK_S)

    async def _close(self) -> None:
        self.router.close()
        try:
            await self._api.close()
        finally:
            if self._on_close is not None:
                await self._on_close()

    async def _begin_rescale(self, shards: int) -> tuple[AsyncIterator[RescaleProgress], RescaleProgress | None]:
        """The reports and the first of them. Where it raises Unavailable nothing has begun: it may be tried again."""
        reports = self._api.rescale(shards)
        return reports, await _next(reports)

    async def _create_table(self, schema: TableSchema) -> TableView:
        tries = 0

        async def ask() -> TableView:
            nonlocal tries
            tries += 1
            try:
                view = await self._api.create_table(schema)
            except AlreadyExists:
                # An earlier try that was not heard of may have made it.
                if tries == 1 or not _made_by(schema, view := await self._api.table(schema.name)):
                    raise
            return self.router.adopt(view)

        return await self.router.retried(schema.name, ask)

    async def _list_tables(self) -> list[TableView]:
        return [self.router.adopt(view) for view in await self.router.retried("tables", self._api.tables)]

    async def _forget(self, table_id: int) -> None:
        self.router.forget(table_id)

    async def _drop_table(self, name: str) -> None:
        tries = 0

        async def ask() -> None:
            nonlocal tries
            tries += 1
            try:
                await self._api.drop_table(name)
            except NotFound:
                if tries == 1:
                    raise

        await self.router.retried(name, ask)

    def _opened(self, view: TableView) -> Table:
        schema = view.schema
        with self._lock:
            table = self._tables.get(schema.table_id)
            if table is None:
                session = Session(self.router, table_id=schema.table_id, group=self._group)
                table = Table(schema, router=self.router, session=session, run=self._run)
                self._tables[schema.table_id] = table
            return table

    def _run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float | None = _STUCK_S) -> T:
        if self._closed:
            coroutine.close()
            raise InvalidRequest(f"pool {self.name!r} is closed; connect to it again.")
        return loop.run(coroutine, timeout_s=None if timeout_s is None else timeout_s + self.timeout_s)


async def _next(reports: AsyncIterator[RescaleProgress]) -> RescaleProgress | None:
    return await anext(reports, None)


async def _end(reports: AsyncIterator[RescaleProgress]) -> None:
    close = getattr(reports, "aclose", None)  # an iterator need not have it; a generator must be ended on its loop
    if close is not None:
        await close()


def _made_by(schema: TableSchema, view: TableView) -> bool:
    return replace(schema, table_id=view.schema.table_id) == view.schema
