"""The ``Table``s of one client's pool: one object a table, for as long as the pool has that table."""

import threading
from collections.abc import Iterable
from contextlib import suppress
from weakref import WeakValueDictionary

from mempool.client.opening.connection import Connection
from mempool.client.table import Table
from mempool.client.training.session import Session
from mempool.errors import InvalidRequest, MempoolError
from mempool.types import TableSchema, TableView
from mempool.types.schema_differences import schema_differences


class OpenTables:
    """By id.

    Args:
        group: Whose steps those of this client are.
    """

    def __init__(self, connection: Connection, *, group: str) -> None:
        self._connection = connection
        self._router = connection.router
        self._group = group
        self._lock = threading.Lock()
        self._tables: dict[int, Table] = {}
        self._dropped: WeakValueDictionary[str, Table] = WeakValueDictionary()  # the newest of each name

    def opened(self, view: TableView) -> Table:
        """The table of a view."""
        schema = view.schema
        with self._lock:
            table = self._tables.get(schema.table_id)
            if table is None:
                table = Table(schema, router=self._router, session=self._session(schema), run=self._connection.run)
                self._tables[schema.table_id] = table
            return table

    def taken_over(self, view: TableView, *, strict: bool = False) -> Table:
        """The table, by the newest ``Table`` of its name, if that is of an earlier one.

        strict: Raise InvalidRequest where that is another kind of table; else open this one beside it.
        """
        schema = view.schema
        with self._lock:
            held = [*self._tables.values(), *self._dropped.values()]
            held = [table for table in held if table.name == schema.name]
            table = max(held, key=lambda table: table.schema.table_id, default=None)
            if table is None or table.schema.table_id >= schema.table_id or not _fits(table, schema, strict=strict):
                table = None
            else:
                before = table.link.session
                self._tables.pop(before.table_id, None)
                self._dropped.pop(schema.name, None)
                table.rebind(schema, self._session(schema))
                self._tables[schema.table_id] = table
        if table is None:
            return self.opened(view)
        with suppress(MempoolError):  # they are gone with that table, whatever its shards say to it
            self._connection.run(before.discard())
        self._forget(before.table_id)
        return table

    def dropped(self, name: str) -> None:
        """Tables of that name are gone."""
        with self._lock:
            dropped = [table_id for table_id, table in self._tables.items() if table.name == name]
            for table_id in sorted(dropped):
                self._dropped[name] = self._tables.pop(table_id)
        for table_id in dropped:
            self._forget(table_id)

    def adopted(self, views: Iterable[TableView]) -> list[TableView]:
        """Views as the router has them from now on."""

        async def adopt() -> list[TableView]:
            return [self._router.adopt(view) for view in views]

        return self._connection.run(adopt())

    def _forget(self, table_id: int) -> None:
        async def forget() -> None:
            self._router.forget(table_id)

        self._connection.run(forget())

    def _session(self, schema: TableSchema) -> Session:
        return Session(
            self._router,
            table_id=schema.table_id,
            group=self._group,
            coordinator=self._connection.coordinator,
        )


def _fits(table: Table, schema: TableSchema, *, strict: bool) -> bool:
    """Whether what uses a table can go on with one of this schema."""
    differing = [
        f"{each.path} {each.first} before, {each.second} now"
        for each in schema_differences(table.schema, schema)
        if each.path.partition(".")[0] in ("num_slots", "value_dim", "keys")
    ]
    if differing and strict:
        raise InvalidRequest(
            f"table {table.name!r} is another kind of table now ({'; '.join(differing)}): what uses the one before "
            f"cannot go on with it. Open it with pool.table({table.name!r}), and build layers for it"
        )
    return not differing
