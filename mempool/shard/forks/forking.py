"""A table becomes what another one is: at a moment at which that stands still, and when that is done again by replay.

All runs on the engine's thread.
"""

from dataclasses import replace

from mempool.errors import InvalidRequest, StalePlacement
from mempool.shard.bounds import check_number, check_token
from mempool.shard.hosted import HostedTable
from mempool.shard.tenancy import Tenancy
from mempool.types import AttachTable, ForkPoint, Ledger


def take_fork(tenancy: Tenancy, request: AttachTable) -> HostedTable | None:
    """Take the moment at which a table is forked. Returns the new one; None: it was taken before.

    Raises:
        InvalidRequest: The request does not name the table of which it is to be a fork, or there is not so much memory.
        NotFound: That one, or the new one, is not here.
        StalePlacement: That one is not frozen by the round that is named, at that version, or its pages have moved.
        DataLoss: Pages of that one are lost.
    """
    point = checked_point(request)
    table = tenancy.table(request.view.schema.table_id)
    if table.fork_of != point.table_id or not point.token:
        raise InvalidRequest(
            f"table {table.view.schema.name!r} was not attached as a fork of table {point.table_id}, or the request "
            "names no round that holds that one frozen. Nothing was changed."
        )
    if table.forked is None:
        return None
    base = tenancy.table(point.table_id)
    base.check_ready()
    base.check_whole()
    base.let_go()
    base.rounds.require(point.token)
    version = base.ledger.version
    if version != point.version or base.order.any_waiting or not base.view.placement.same_owners(table.view.placement):
        raise StalePlacement(
            f"table {base.view.schema.name!r} is at version {version} on shard {base.info.shard}, and is to be forked "
            f"at {point.version}: its owners differ, or its pages have moved. Nothing was changed",
            shard=base.info.shard,
            address=base.info.address,
        )
    become(table, base)
    return table


def become(table: HostedTable, base: HostedTable) -> None:
    """The new table is as that one is now; of its steps nobody asks for that one's."""
    forked, ledger = table.forked, base.ledger
    assert forked is not None, "it was attached to be forked"
    forked.take()
    table.ledger.begin_as(
        Ledger(
            version=ledger.version,
            updates_applied=ledger.updates_applied,
            step_offset=ledger.step - ledger.version,
        )
    )
    table.order.moved_to(ledger.version)
    table.fill()


def base_of(tenancy: Tenancy, request: AttachTable) -> HostedTable | None:
    """The table of which one that is to be attached is a fork; None where it is none.

    Raises:
        InvalidRequest: It names none, or one of other pages.
        NotFound: That one is not here.
    """
    if request.mode != "fork":
        return None
    base = tenancy.table(checked_point(request).table_id)
    base.check_ready()
    base.check_whole()
    ours, theirs = request.view.schema, base.view.schema
    geometry = [(one.num_slots, one.value_dim, one.dtype, one.block_dim, one.page_slots) for one in (ours, theirs)]
    state = replace(ours.optimizer, lr=theirs.optimizer.lr) == theirs.optimizer and ours.usage == theirs.usage
    if geometry[0] != geometry[1] or ours.keys != theirs.keys or ours.master != theirs.master or not state:
        raise InvalidRequest(
            f"table {ours.name!r} has other pages than table {theirs.name!r}, of which it is to be a fork: slots, "
            "columns, dtype, keys, optimizer, usage, block_dim and page_slots must be the same. Nothing was changed."
        )
    return base


def checked_point(request: AttachTable) -> ForkPoint:
    """Raises InvalidRequest where a table that is to be a fork names none."""
    point = request.fork
    if point is None:
        raise InvalidRequest("a table that is to be a fork does not say of which (fork). Nothing was changed.")
    check_token(point.token)
    check_number("version", point.version)
    return point
