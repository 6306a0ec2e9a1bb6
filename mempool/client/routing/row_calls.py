"""Reading and writing rows of named arrays (values, keys, optimizer state) over all their owners: one try.

Legend: M rows, W columns of one shard's blocks, V value dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mempool.agreement.writes import OpenWrite
from mempool.client.routing.fanout import Fanout
from mempool.client.routing.plan import ShardRoute, TablePlan, pick_columns, place_rows, rows_of
from mempool.types import Envelope, ProductKeySpec, ReadRowsRequest, ShardHost, ShardInfo, WriteRowsRequest

_PER_SLOT = ("keys", "values.uses", "values.last_use")
"""Arrays whose rows lie with block 0 alone, whole. The keys of product keys lie by heads."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Target:
    """One shard of a read or write. route: None for key pages. kept: positions of its ids; None where all."""

    info: ShardInfo
    route: ShardRoute | None
    kept: Tensor | None

    def blocks(self, array: str) -> tuple[int, ...]:
        """The blocks that rows of this array have in its messages."""
        if self.route is None:
            return ()
        return (0,) if array in _PER_SLOT else self.route.blocks


async def read_rows(fanout: Fanout, array: str, ids: Tensor, *, pin: str = "") -> Tensor:
    """Rows [M, ..] of a named array in its dtype; ids: [M] int64, slots, or heads for the keys of product keys."""
    targets = _targets(fanout.plan, array, ids)

    async def ask(target: _Target, host: ShardHost, envelope: Envelope) -> Tensor:
        kept_ids = ids if target.kept is None else ids[target.kept]
        fanout.traffic.add(sent=kept_ids.nbytes)
        reply = await host.read_rows(ReadRowsRequest(envelope=envelope, array=array, ids=kept_ids, pin=pin))
        fanout.traffic.add(received=reply.rows.nbytes)
        fanout.saw(reply.stamp.table_version)
        return reply.rows

    replies = await fanout.each([(target.info, partial(ask, target)) for target in targets])
    if len(targets) == 1 and targets[0].kept is None and targets[0].route is not None and targets[0].route.whole:
        return replies[0]
    if array in _PER_SLOT:
        return _merged_whole(fanout.plan, ids, targets, replies)
    return _merged_rows(fanout.plan, ids, targets, replies)


async def write_rows(
    fanout: Fanout, array: str, ids: Tensor, rows: Tensor, *, write: OpenWrite, fresh: bool = False
) -> None:
    """Overwrite rows [M, ..] of a named array, in the table's order of columns; ``write``: of all tries the same.

    fresh: As of ``WriteRowsRequest``.
    """

    async def tell(target: _Target, host: ShardHost, envelope: Envelope) -> object:
        kept_ids, kept_rows = (ids, rows) if target.kept is None else (ids[target.kept], rows[target.kept])
        if target.route is not None and array not in _PER_SLOT:
            kept_rows = _columns_of(target.route, kept_rows, fanout.plan)
        fanout.traffic.add(sent=kept_ids.nbytes + kept_rows.nbytes)
        request = WriteRowsRequest(
            envelope=envelope,
            array=array,
            ids=kept_ids,
            blocks=target.blocks(array),
            rows=kept_rows,
            write_id=write.id,
            fresh=fresh,
        )
        reply = await host.write_rows(request)
        fanout.saw(reply.stamp.table_version)
        return reply

    targets = _targets(fanout.plan, array, ids)
    await fanout.each([(target.info, partial(tell, target)) for target in targets])


def _targets(plan: TablePlan, array: str, ids: Tensor) -> list[_Target]:
    if array == "keys" and isinstance(plan.schema.keys, ProductKeySpec):
        owners = torch.tensor(plan.view.placement.key_owners, dtype=torch.int32, device="cpu")[ids]
        everyone = [
            _Target(info=info, route=None, kept=torch.nonzero(owners == info.shard).reshape(-1))
            for info, _ in plan.head_owners
        ]
    else:
        everyone = [
            _Target(info=route.info, route=route, kept=rows_of(route, ids, schema=plan.schema))
            for route in plan.routes
            if array not in _PER_SLOT or route.blocks[0] == 0
        ]
    # Of no ids at all everybody is asked: the width of a row is theirs to say.
    return [target for target in everyone if target.kept is None or target.kept.numel() or not ids.numel()]


def _merged_whole(plan: TablePlan, ids: Tensor, targets: Sequence[_Target], replies: Sequence[Tensor]) -> Tensor:
    rows = torch.empty(ids.shape[0], replies[0].shape[1], dtype=replies[0].dtype, device="cpu")
    for target, reply in zip(targets, replies, strict=True):
        at = torch.arange(ids.shape[0], dtype=torch.int64, device="cpu") if target.kept is None else target.kept
        if (
            target.route is not None
        ):  # not of product keys: it may own other blocks of some of these slots, but not block 0
            mine = plan.page_owners[ids[at] >> plan.schema.page_shift, 0] == target.info.shard
            at, reply = at[mine], reply[mine]
        rows[at] = reply
    return rows


def _merged_rows(plan: TablePlan, ids: Tensor, targets: Sequence[_Target], replies: Sequence[Tensor]) -> Tensor:
    schema = plan.schema
    # A shard of narrow blocks alone, as the last one may be, answers as many columns in either layout; together they
    # have every block, and where all of those are one column wide the two layouts are one.
    per_block = any(
        target.route is not None and reply.shape[1] != target.route.width
        for target, reply in zip(targets, replies, strict=True)
    )
    width = schema.num_blocks if per_block else schema.value_dim
    rows = torch.empty(ids.shape[0], width, dtype=replies[0].dtype, device="cpu")
    for target, reply in zip(targets, replies, strict=True):
        assert target.route is not None
        place_rows(plan, rows, ids, route=target.route, kept=target.kept, rows=reply, per_block=per_block)
    return rows


def _columns_of(route: ShardRoute, rows: Tensor, plan: TablePlan) -> Tensor:
    if rows.shape[1] == plan.schema.value_dim:
        return pick_columns(route, rows)
    return rows[:, list(route.blocks)]
