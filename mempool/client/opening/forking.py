"""Tables that begin as another one is, as their user asks for them. The pool goes on with it where nobody waits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mempool.client.opening.connection import Connection
from mempool.errors import InvalidRequest, NotFound
from mempool.types import ForkTable, TableView
from mempool.types.caller import Caller, calling
from mempool.types.keys import key_table, key_table_name

if TYPE_CHECKING:
    from mempool.client.opened import OpenTables
    from mempool.client.table import Table


@dataclass(frozen=True, slots=True)
class Forks:
    """Forks of one client's pool.

    Args:
        connection: To it.
        tables: Gives what a table of its was opened with.
    """

    connection: Connection
    tables: "Callable[[Table], OpenTables]"

    def fork(self, table: "Table", name: object) -> "Table":
        """As ``Table.fork``."""
        schema = table.schema
        new = _name(name, of=schema.name)
        request = ForkTable(table=schema.name, table_id=schema.table_id, name=new)
        return self.tables(table).opened(self.connection.run_long(self._ask(request)))

    def reset(self, table: "Table", to: "Table | str") -> None:
        """As ``Table.reset``."""
        schema = table.schema
        name = _name(getattr(to, "name", to), of=schema.name)
        given = None if isinstance(to, str) else to
        if getattr(given, "version", None) is not None:
            raise InvalidRequest(
                f"table {schema.name!r} cannot become what {to!r} is: a version that is read has no optimizer state. "
                "Fork the table while it is there, and reset to the fork. Nothing was changed."
            )
        if given is not None and (given.forks is None or given.forks.tables is not self.tables):
            raise InvalidRequest(
                f"{to!r} was opened by another pool, or another client of it, than table {schema.name!r}: give its "
                "name, where it is of the same pool. Nothing was changed."
            )
        table_id = 0 if given is None else given.schema.table_id
        view = self.connection.run_long(self._reset(schema.name, name, table_id))
        tables = self.tables(table)
        if key_table(view.schema) is not None:
            keys = self.connection.run(self.connection.router.open(key_table_name(schema.name)))
            tables.taken_over(keys, strict=True)
        tables.taken_over(view, strict=True)

    async def _reset(self, name: str, to: str, table_id: int) -> TableView:
        tries, api = self.connection.tries, self.connection.api
        try:
            source_id = table_id or (await tries.run(to, lambda: api.table(to))).schema.table_id
        except NotFound as error:
            raise NotFound(
                f"{error.message}. A table becomes what another table is (table.fork makes one); what pool.snapshot "
                "keeps has no optimizer state. Nothing was changed"
            ) from None
        # What is made from now on is nothing that this replaces, however late a copy of it comes.
        newest = max((view.schema.table_id for view in await tries.run(name, api.tables)), default=1)
        return await self._ask(ForkTable(table=to, table_id=source_id, name=name, replace=True, newest_id=newest))

    async def _ask(self, request: ForkTable) -> TableView:
        with calling(Caller()):  # no deadline goes along: the work is as long as the table is large
            view = await self.connection.api.fork(request)
        return self.connection.router.adopt(view)


def _name(name: object, *, of: str) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{name!r:.80} is no table's name: give a text. Nothing was changed.")
    if name == of:
        raise InvalidRequest(f"table {of!r} is that table itself: give another one's name. Nothing was changed.")
    return name
