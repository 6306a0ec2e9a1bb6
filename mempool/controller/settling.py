"""Brings shards to what the roster says, whatever they missed: tables made or dropped, placements, the end of a freeze.

Hears first: a shard may know a newer placement than a controller that was started anew.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from mempool.controller.roster import Roster
from mempool.types import AttachTable, ShardHost, ShardInfo, TableView

T = TypeVar("T")

_HEAR_TIMEOUT_S = 10.0
_ATTACH_TIMEOUT_S = 600.0
"""A shard on a new machine may have to compile kernels first; one that is gone is noticed by its channel."""


class Call(Protocol):
    """One bounded call of one shard."""

    async def __call__(
        self, info: ShardInfo, call: Callable[[ShardHost], Awaitable[T]], *, timeout_s: float = ...
    ) -> T: ...


async def settle(roster: Roster, call: Call) -> dict[int, BaseException]:
    """Settle every shard. Answers, by shard, why it could not be done; empty where all is as it should be.

    Frozen tables are thawed only once every shard was heard and has the newest views: thawing drops staged pages, and a
    shard that is silent, or missed a view, may be one whose former owner has given them away already.
    """
    infos = roster.infos
    heard = await _each(infos, lambda info: call(info, lambda host: host.views(), timeout_s=_HEAR_TIMEOUT_S))
    known = {shard: views for shard, views in heard.items() if not isinstance(views, BaseException)}
    for views in known.values():
        for view in views:
            roster.hear(view)
    roster.complete = roster.complete or len(known) == len(infos)
    answering = [info for info in infos if info.shard in known]
    settled = await _each(answering, lambda info: _settle_one(roster, call, info, known[info.shard]))
    problems = _problems(heard) | _problems(settled)
    if not problems:
        problems = _problems(await _each(infos, lambda info: _thaw_all(roster, call, info)))
    if not problems:
        roster.dropped.clear()
    return problems


async def _settle_one(roster: Roster, call: Call, info: ShardInfo, views: tuple[TableView, ...]) -> None:
    present = {view.schema.table_id: view for view in views}
    for table_id in sorted(roster.dropped.intersection(present)):
        await call(info, _drop(table_id))
    for view in roster.views:
        known = present.get(view.schema.table_id)
        if known is None:
            # One that owns nothing takes the table's history with its first pages.
            mode = "lost" if info.shard in view.placement.shards else "empty"
            await call(info, _attach(AttachTable(view=view, mode=mode)), timeout_s=_ATTACH_TIMEOUT_S)  # type: ignore[arg-type]
        elif known.placement.epoch < view.placement.epoch or known.shards != view.shards:
            await call(info, _set_view(view))


async def _thaw_all(roster: Roster, call: Call, info: ShardInfo) -> None:
    for view in roster.views:
        await call(info, _thaw(view.schema.table_id))


async def _each(
    infos: tuple[ShardInfo, ...] | list[ShardInfo], job: Callable[[ShardInfo], Coroutine[Any, Any, T]]
) -> dict[int, T | BaseException]:
    results = await asyncio.gather(*(job(info) for info in infos), return_exceptions=True)
    return {info.shard: result for info, result in zip(infos, results, strict=True)}


def _problems(results: dict[int, T | BaseException]) -> dict[int, BaseException]:
    return {shard: result for shard, result in results.items() if isinstance(result, BaseException)}


def _attach(request: AttachTable) -> Callable[[ShardHost], Awaitable[None]]:
    return lambda host: host.attach_table(request)


def _drop(table_id: int) -> Callable[[ShardHost], Awaitable[None]]:
    return lambda host: host.drop_table(table_id)


def _set_view(view: TableView) -> Callable[[ShardHost], Awaitable[None]]:
    return lambda host: host.set_view(view)


def _thaw(table_id: int) -> Callable[[ShardHost], Awaitable[None]]:
    return lambda host: host.thaw(table_id)
