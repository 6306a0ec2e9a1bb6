"""Has shards make a table of another one: its owners get ready, then take one moment of that one, at one version.

Its placement stands still at that moment. Which table, of what name, and who may use it when, is ``changes``'s.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mempool.controller.calls import ShardCalls
from mempool.controller.roster import Roster
from mempool.controller.saving.cut import Owner
from mempool.controller.saving.moment import Moments
from mempool.errors import AlreadyExists, InvalidRequest, NotFound
from mempool.types import AttachTable, ForkPoint, ForkTable, Placement, ShardHost, ShardInfo, TableSchema, TableView
from mempool.types.keys import key_table, key_table_name
from mempool.types.schema_checks import check_schema, shown
from mempool.types.schema_differences import schema_differences

_READY_TIMEOUT_S = 3600.0
"""Moving a large table's memory to where it can be shared takes a second a GiB."""
_MAY_DIFFER = ("table_id", "name", "layout", "seed", "init_std", "lr")
"""A table may become what one is that differs in these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """The table that a new one is to be as.

    Attributes:
        table, table_id: That one.
        replace, newest_id: As of ``ForkTable``.
    """

    table: str
    table_id: int
    replace: bool = False
    newest_id: int = 0


def forks_of(request: ForkTable, roster: Roster) -> list[tuple[TableSchema, Fork]]:
    """The schema of the new table, the last, and what it is to be as; before it the same of the table of the keys that
    it trains.

    Raises:
        NotFound: There is no such table, or another one has that name by now; or none whose place it is to take.
        AlreadyExists: It is to take the place of a table that is another kind of one.
        InvalidRequest: The new name is none, or one is that of a table of keys.
        ShardUnavailable: Whether there is one is not known yet.
    """
    for name in (request.table, request.name):
        if name.endswith(key_table_name("")):
            raise InvalidRequest(
                f"{shown(name)} is the table of another one's keys, and is forked with it: name that one. Nothing was "
                "changed."
            )
    base = roster.view(request.table).schema
    if base.table_id != request.table_id:
        raise NotFound(
            f"table {request.table!r} is another one by now: it was dropped, or replaced. Open it anew with "
            f"pool.table({request.table!r}). Nothing was changed"
        )
    forks = [_fork_of(request, base, request.name, roster)]
    if key_table(base) is not None:
        keys = roster.view(key_table_name(request.table)).schema
        forks.insert(0, _fork_of(request, keys, key_table_name(request.name), roster))
    return forks


def _fork_of(request: ForkTable, base: TableSchema, name: str, roster: Roster) -> tuple[TableSchema, Fork]:
    schema = replace(base, name=name)
    if request.replace:
        schema = roster.view(name).schema
        if found := list(schema_differences(schema, base, aside=_MAY_DIFFER)):
            differ = "; ".join(f"{each.path} is {shown(each.first)}, not {shown(each.second)}" for each in found)
            raise AlreadyExists(
                f"table {name!r} cannot become what table {base.name!r} is: {differ}. Nothing was changed"
            )
    schema = replace(schema, table_id=0)
    check_schema(schema)
    fork = Fork(table=base.name, table_id=base.table_id, replace=request.replace, newest_id=request.newest_id)
    return schema, fork


def forked_view(schema: TableSchema, base: TableView, infos: tuple[ShardInfo, ...], controller: str) -> TableView:
    """The view of the new table: its pages are where the other one's are."""
    owners, key_owners = base.placement.owners, base.placement.key_owners
    placement = Placement(table_id=schema.table_id, epoch=1, owners=owners, key_owners=key_owners)
    return TableView(schema=schema, placement=placement, shards=infos, controller=controller)


@dataclass(kw_only=True)
class Forking:
    """Forks of one pool's tables.

    Args:
        calls: Reach the shards.
        moments: Takes the moment.
        new_token: Gives a name that no round of any controller ever had.
    """

    calls: ShardCalls
    moments: Moments
    new_token: Callable[[], str]

    async def prepare(self, forks: Sequence[tuple[TableView, TableView]], infos: Sequence[ShardInfo]) -> None:
        """Have all shards get ready to hold new tables as others are: (view of the new one, of the other one). It takes
        long, and stops nobody.

        Raises:
            MempoolError: Some shard could not. What others have of them is pending.
        """

        async def attach(info: ShardInfo, view: TableView, base: TableView) -> None:
            point = ForkPoint(table_id=base.schema.table_id)
            ready = AttachTable(view=view, mode="fork", pending=True, fork=point)
            empty = AttachTable(view=view, mode="empty", pending=True)
            request = ready if info.shard in base.placement.shards else empty
            await self.calls.call(info, lambda host: host.attach_table(request), timeout_s=_READY_TIMEOUT_S)

        results = await asyncio.gather(
            *(attach(info, *each) for each in forks for info in infos), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def take(self, forks: Sequence[tuple[TableView, TableView]]) -> None:
        """Have them hold what those others are, all at one moment, while the others' pages stay where they are.

        Raises:
            MempoolError: Some shard could not. What others have of them is pending.
        """
        by_base = {base.schema.table_id: view for view, base in forks}
        token = self.new_token()

        async def take(host: ShardHost, owner: Owner, version: int) -> None:
            point = ForkPoint(table_id=owner.table_id, token=token, version=version)
            await host.attach_table(AttachTable(view=by_base[owner.table_id], mode="forked", pending=True, fork=point))

        await self.moments.take([base for _, base in forks], token, take)
