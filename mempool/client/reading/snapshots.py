"""Named versions of a pool's tables, which shards keep without a lease. Runs on the IO loop."""

from collections.abc import Awaitable, Callable, Iterable

from mempool.client.reading.pinning import pin_newest
from mempool.client.routing.router import Router
from mempool.errors import NotFound
from mempool.types import TableView
from mempool.types.keys import key_table_name

Views = Callable[[], Awaitable[list[TableView]]]
"""Asks for all tables of the pool."""


async def take_snapshot(router: Router, name: str, tables: Iterable[str] | None, *, views: Views) -> dict[str, int]:
    """Keep tables, and the keys that they train, at their newest versions, as one cut; all of them, or none. tables:
    names; None: all. Answers the versions by name, those of keys left out.

    Raises:
        NotFound: There is no such table.
        MempoolError: As ``pin_newest``.
    """
    ids = await _ids(tables, views)
    keys_of = {ids[keys]: table_id for each, table_id in ids.items() if (keys := key_table_name(each)) in ids}
    pinned = await pin_newest(router, list(ids.values()), keys_of=keys_of, name=name)
    return {each: pinned.versions[table_id] for each, table_id in ids.items() if table_id not in keys_of}


async def drop_snapshot(router: Router, name: str, tables: Iterable[str] | None, *, views: Views) -> None:
    """Let it go. Raises NotFound where there is no such table, ShardUnavailable where a shard did not hear it."""
    for table_id in (await _ids(tables, views)).values():
        await router.call(table_id, lambda attempt: attempt.pin("release", "", name=name, lease_s=0.0))


async def _ids(tables: Iterable[str] | None, views: Views) -> dict[str, int]:
    """By name."""
    known = {view.schema.name: view.schema.table_id for view in await views()}
    if tables is None:
        return known
    names = [tables] if isinstance(tables, str) else list(tables)
    for name in names:
        if name not in known:
            raise NotFound(f"there is no table {name!r}; the pool has {', '.join(map(repr, known)) or 'none'}")
    keys = map(key_table_name, names)
    return {name: known[name] for name in (*names, *(each for each in keys if each in known))}
