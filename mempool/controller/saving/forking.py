"""Has shards make a table of another one: its owners get ready, then take one moment of that one, at one version.

Its placement stands still meanwhile. Which table, of what name, and who may use it when, is ``changes``'s.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mempool.controller.calls import ShardCalls
from mempool.controller.roster import Roster
from mempool.controller.saving.cut import Owner
from mempool.controller.saving.moment import Moments
from mempool.controller.saving.standing import require_no_key_table
from mempool.errors import AlreadyExists, NotFound
from mempool.types import AttachTable, ForkPoint, ForkTable, Placement, ShardHost, ShardInfo, TableSchema, TableView
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


def fork_of(request: ForkTable, roster: Roster) -> tuple[TableSchema, Fork]:
    """The schema of the new table, and what it is to be as.

    Raises:
        NotFound: There is no such table, or another one has that name by now; or none whose place it is to take.
        AlreadyExists: It is to take the place of a table that is another kind of one.
        InvalidRequest: The new name is none.
        ShardUnavailable: Whether there is one is not known yet.
    """
    for name in (request.table, request.name):
        require_no_key_table(name, "forked")
    base = roster.view(request.table).schema
    if base.table_id != request.table_id:
        raise NotFound(
            f"table {request.table!r} is another one by now: it was dropped, or replaced. Open it anew with "
            f"pool.table({request.table!r}). Nothing was changed"
        )
    schema = replace(base, name=request.name)
    if request.replace:
        schema = roster.view(request.name).schema
        if found := list(schema_differences(schema, base, aside=_MAY_DIFFER)):
            differ = "; ".join(f"{each.path} is {shown(each.first)}, not {shown(each.second)}" for each in found)
            raise AlreadyExists(
                f"table {request.name!r} cannot become what table {request.table!r} is: {differ}. Nothing was changed"
            )
    schema = replace(schema, table_id=0)
    check_schema(schema)
    fork = Fork(table=request.table, table_id=request.table_id, replace=request.replace, newest_id=request.newest_id)
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

    async def fork(self, pairs: Sequence[tuple[TableView, TableView]], infos: Sequence[ShardInfo]) -> None:
        """Have all shards hold each new table as another one is, all of them of one moment.

        Args:
            pairs: A new table, and what it is to be as.

        Raises:
            MempoolError: Some shard could not. What others have of them is pending.
        """

        async def attach(view: TableView, base: TableView, info: ShardInfo) -> None:
            point = ForkPoint(table_id=base.schema.table_id)
            request = AttachTable(view=view, mode="empty", pending=True)
            if info.shard in base.placement.shards:
                request = AttachTable(view=view, mode="fork", pending=True, fork=point)
            await self.calls.call(info, lambda host: host.attach_table(request), timeout_s=_READY_TIMEOUT_S)

        ready = (attach(*pair, info) for pair in pairs for info in infos)
        for result in await asyncio.gather(*ready, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        token = self.new_token()
        new = {base.schema.table_id: view for view, base in pairs}

        async def take(host: ShardHost, owner: Owner, version: int) -> None:
            point = ForkPoint(table_id=owner.table_id, token=token, version=version)
            request = AttachTable(view=new[owner.table_id], mode="forked", pending=True, fork=point)
            await host.attach_table(request)

        await self.moments.take([base for _, base in pairs], token, take)
