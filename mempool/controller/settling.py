"""Brings shards to what the roster says, whatever they missed: tables made or dropped, placements, the end of a freeze.

Hears first: a shard may know a newer placement than a controller that was started anew. What follows from it is
``agreement.recovery``'s to say.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Protocol, TypeVar

from mempool.agreement import recovery
from mempool.agreement.recovery import Attach, Confirm, Drop, Heard, Thaws
from mempool.controller.roster import Roster
from mempool.errors import ShardUnavailable
from mempool.types import AttachTable, ShardHost, ShardInfo

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
    infos, doubts, told = roster.infos, roster.doubts, frozenset(roster.dropped)
    heard = await _each(infos, lambda info: _hear(call, info))
    known = {shard: found for shard, found in heard.items() if not isinstance(found, BaseException)}
    for found in known.values():
        roster.hear_ids(found.table_ids)
    roster.unheard = tuple(sorted(heard.keys() - known.keys()))
    everyone = len(known) == len(infos) and roster.doubts == doubts  # a making may end in doubt meanwhile
    late = roster.dropped - told  # meanwhile: shards may have spoken before they took such a table in
    learned = recovery.learn_all(roster.knowledge, known.values(), everyone=everyone)
    roster.learn(learned)
    kept = await _drop_unmade(roster, call, learned.unmade)
    for found in known.values():
        roster.hear_of(info for view in found.views for info in view.shards)
    answering = [info for info in infos if info.shard in known]
    knowledge = roster.knowledge
    settled = await _each(
        answering, lambda info: _settle_one(call, info, recovery.owed(knowledge, info, known[info.shard]))
    )
    problems = _problems(heard) | _problems(settled) | kept
    if not problems:
        problems = await _thaw(call, {info.shard: info for info in infos}, recovery.thaws(knowledge, known))
    if not problems:
        roster.dropped -= knowledge.dropped - late
    return problems


async def _drop_unmade(roster: Roster, call: Call, table_ids: Iterable[int]) -> dict[int, BaseException]:
    """Drop tables that were confirmed nowhere. Answers, by shard, why the first one keeps some: it was told meanwhile
    that they are made, say."""
    problems: dict[int, BaseException] = {}
    for table_id in sorted(table_ids):
        first = roster.infos[0]
        try:
            await call(first, partial(_dropped_unmade, table_id))
        except Exception as error:
            problems[first.shard] = error
            roster.doubt()  # it may be the pool's: shards are heard again
        else:
            roster.forget(table_id)
    return problems


def _dropped_unmade(table_id: int, host: ShardHost) -> Awaitable[None]:
    return host.drop_table(table_id, unmade=True)


async def _hear(call: Call, info: ShardInfo) -> Heard:
    views = await call(info, lambda host: host.views(), timeout_s=_HEAR_TIMEOUT_S)
    status = await call(info, lambda host: host.status(), timeout_s=_HEAR_TIMEOUT_S)
    newest = {view.schema.name: view.schema.table_id for view in views}
    return Heard(
        views=views,
        pending=frozenset(table.table_id for table in status.tables if table.pending),
        frozen={table.table_id: table.round for table in status.tables if table.frozen},
        dropped=frozenset(status.dropped),
        # A server's views have the latest table of each name.
        hidden=frozenset(
            table.table_id
            for table in status.tables
            if not table.pending and table.table_id < newest.get(table.name, 0)
        ),
    )


async def _settle_one(call: Call, info: ShardInfo, actions: Iterable[recovery.Action]) -> None:
    for action in actions:
        if isinstance(action, Attach):
            request = AttachTable(view=action.view, mode=action.mode)
            await call(info, _attach(request), timeout_s=_ATTACH_TIMEOUT_S)
        else:
            await call(info, _told(action))


async def _thaw(call: Call, infos: dict[int, ShardInfo], tables: Iterable[Thaws]) -> dict[int, BaseException]:
    """End what froze tables. Answers, by shard, why that could not be done."""
    problems: dict[int, BaseException] = {}
    for table in tables:
        gate = infos[table.gate]
        try:
            await _thaw_one(call, gate, table)
            views = await call(gate, lambda host: host.views(), timeout_s=_HEAR_TIMEOUT_S)
        except Exception as error:
            problems[gate.shard] = error
            continue
        if not any((view.schema.table_id, view.placement.epoch) == (table.table_id, table.epoch) for view in views):
            problems[gate.shard] = ShardUnavailable(
                f"shard {gate.shard} took another view of table {table.table_id} as it was thawed; it is asked again",
                shard=gate.shard,
            )
            continue
        others = tuple(infos[shard] for shard in table.others)
        problems |= _problems(await _each(others, partial(_thaw_one, call, table=table)))
    return problems


async def _each(
    infos: tuple[ShardInfo, ...] | list[ShardInfo], job: Callable[[ShardInfo], Coroutine[Any, Any, T]]
) -> dict[int, T | BaseException]:
    results = await asyncio.gather(*(job(info) for info in infos), return_exceptions=True)
    return {info.shard: result for info, result in zip(infos, results, strict=True)}


def _problems(results: dict[int, T | BaseException]) -> dict[int, BaseException]:
    return {shard: result for shard, result in results.items() if isinstance(result, BaseException)}


def _told(action: Drop | Confirm | recovery.Push) -> Callable[[ShardHost], Awaitable[None]]:
    if isinstance(action, Drop):
        return lambda host: host.drop_table(action.table_id)
    if isinstance(action, Confirm):
        return _attach(AttachTable(view=action.view, mode="confirm"))
    return lambda host: host.set_view(action.view)


def _attach(request: AttachTable) -> Callable[[ShardHost], Awaitable[None]]:
    return lambda host: host.attach_table(request)


async def _thaw_one(call: Call, info: ShardInfo, table: Thaws) -> None:
    for token in table.tokens:
        await call(info, partial(_thawed, table.table_id, token))


def _thawed(table_id: int, token: str, host: ShardHost) -> Awaitable[None]:
    return host.thaw(table_id, token=token)
