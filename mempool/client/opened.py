"""The ``Table``s of one client's pool: one object a table, for as long as the pool has that table; more where ones of
tables that it has replaced follow it."""

import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from weakref import WeakValueDictionary, ref

from mempool.client.opening.connection import Connection
from mempool.client.opening.forking import Forks
from mempool.client.table import Table
from mempool.client.training.session import Session
from mempool.errors import InvalidRequest, MempoolError
from mempool.types import TableSchema, TableView
from mempool.types.keys import key_table_name
from mempool.types.schema_differences import schema_differences


class OpenTables:
    """By id.

    Args:
        group: Whose steps those of this client are.
        whose: Given to the tables; None: it is made.
    """

    def __init__(self, connection: Connection, *, group: str, whose: "_Whose | None" = None) -> None:
        self._connection = connection
        self._router = connection.router
        self._group = group
        self._whose = _Whose(self) if whose is None else whose
        self._forks = Forks(connection, self._whose)
        self._lock = threading.Lock()
        self._tables: dict[int, list[Table]] = {}  # all those of one id have one session
        self._dropped: WeakValueDictionary[str, Table] = WeakValueDictionary()  # the newest of each name

    def opened(self, view: TableView) -> Table:
        """The table of a view."""
        schema = view.schema
        with self._lock:
            if schema.table_id not in self._tables:
                table = Table(
                    schema,
                    router=self._router,
                    session=self._session(schema),
                    run=self._connection.run,
                    begin=self._connection.begin,
                    open_keys=partial(_keys_of, self._whose),
                )
                table.forks = self._forks
                self._tables[schema.table_id] = [table]
            return self._tables[schema.table_id][0]

    def keys_of(self, name: str) -> Table:
        """The table of a table's keys."""
        return self.opened(self._connection.run(self._router.open(key_table_name(name))))

    def hold(self, table: Table) -> None:
        """Know of a table that was opened by others of the same client."""
        with self._lock:
            self._tables.setdefault(table.schema.table_id, []).append(table)
        if table._keys is not None:
            self.hold(table._keys)

    def taken_over(self, view: TableView, *, strict: bool = False) -> Table:
        """The table, by the newest ``Table`` of an earlier one of its name, if there is any; older ones follow it, too.

        strict: Raise InvalidRequest where that is another kind of table; else open this one beside it.
        """
        schema = view.schema
        with self._lock:
            held = {table_id: tables for table_id, tables in self._tables.items() if tables[0].name == schema.name}
            if (gone := self._dropped.get(schema.name)) is not None:
                held.setdefault(gone.schema.table_id, [gone])
            is_late = max(held, default=0) > schema.table_id
            older = [] if is_late else sorted(table_id for table_id in held if table_id < schema.table_id)
            present = self._tables.get(schema.table_id, [])
            following = [
                table_id
                for table_id in older
                if _fits(held[table_id][0], schema, strict=strict and not present and table_id == older[-1])
            ]
            before = [held[table_id][0].link.session for table_id in following]
            if following:
                session = present[0].link.session if present else self._session(schema)
                tables = [table for table_id in reversed(following) for table in held[table_id]]
                for table_id in following:
                    self._tables.pop(table_id, None)
                if gone in tables:
                    del self._dropped[schema.name]
                counters = (present or tables)[0].counters  # the newest go on
                for table in tables:
                    table.rebind(schema, session)
                session.counters = counters
                self._tables[schema.table_id] = [*tables, *present]
        for session in before:
            with suppress(MempoolError):  # they are gone with that table, whatever its shards say to it
                self._connection.run(session.discard())
            self._forget(session.table_id)
        return self.opened(view)

    def dropped(self, name: str) -> None:
        """Tables of that name are gone, and those of their keys."""
        if not name.endswith(key_table_name("")):
            self.dropped(key_table_name(name))
        with self._lock:
            dropped = [table_id for table_id, tables in self._tables.items() if tables[0].name == name]
            for table_id in sorted(dropped):
                self._dropped[name] = self._tables.pop(table_id)[0]
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
            direct=self._connection.direct,
        )


class _Whose:
    """Finds the tables of a client for one of them, which must not hold them: they hold it, and a pool ends with the
    last who has anything of it. Where whoever opened it has forgotten all others, there is that one alone."""

    def __init__(self, tables: OpenTables) -> None:
        self._tables = ref(tables)
        self._anew = partial(OpenTables, tables._connection, group=tables._group)

    def __call__(self, table: Table) -> OpenTables:
        tables = self._tables()
        if tables is None:
            tables = self._anew(whose=self)
            tables.hold(table)
            self._tables = ref(tables)
        return tables


def _keys_of(whose: _Whose, table: Table) -> Table:
    return whose(table).keys_of(table.name)


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
