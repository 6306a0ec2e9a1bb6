"""Takes a pin at every owner of tables, keeps it while its reader lives, and releases it. Runs on the IO loop.

A pin is armed at all owners, then settled at the highest version that any of them was at: see ``agreement.readers``. Of
several tables it is one cut: they are looked at again until none has gone on between two looks. A step of several is
prepared at all owners before it is decided, so whoever is asked once it is seen at one of its tables answers with it.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from mempool.client.routing.router import Router
from mempool.errors import InvalidRequest, MempoolError, Overloaded, VersionGone
from mempool.types.running import TRAINER_LEASE_S

LEASE_S = 3 * TRAINER_LEASE_S
"""How long a shard keeps a version for a reader that it does not hear of."""
_RENEWALS = 6
_RELEASE_S = 5.0
_TRIES = 5
"""Pages that move in between end a pin that is being taken."""
MOST_LOOKS = 64
"""Of one try at a cut, within the pool's timeout_s: of tables that are trained all the time one look in a few finds
that none has gone on."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pinned:
    """One cut through tables.

    Attributes:
        pin: The token, the same of all.
        versions: By table id.
    """

    pin: str
    versions: Mapping[int, int]


async def pin_newest(
    router: Router,
    table_ids: Sequence[int],
    *,
    keys_of: Mapping[int, int] = MappingProxyType({}),
    name: str = "",
) -> Pinned:
    """Pin the newest versions, as one cut: every commit that was acknowledged before is in it, and each that comes
    meanwhile is in all of its tables or in none.

    Args:
        keys_of: Tables of keys among these: the table among these whose keys each has.
        name: Of a snapshot, which is kept without a lease; "": for a reader.

    Raises:
        AlreadyExists: There is a snapshot of that name.
        Overloaded: Commits came between any two looks at the tables.
        VersionGone: It went before it was taken everywhere: too little may be kept, or pages move again and again.
    """
    tries = 0
    while True:
        tries += 1
        pin = secrets.token_hex(16)
        try:
            return Pinned(pin, await _pinned(router, table_ids, pin, name, keys_of))
        except BaseException as error:
            await release_all(router, table_ids, pin)
            if tries >= _TRIES or not isinstance(error, VersionGone):
                raise


async def _pinned(
    router: Router, table_ids: Sequence[int], pin: str, name: str, keys_of: Mapping[int, int]
) -> dict[int, int]:
    versions = await _armed(router, table_ids, pin, name=name)
    if len(table_ids) > 1:
        versions = await _standing_still(router, table_ids, versions)

    def settle(table_id: int) -> Awaitable[list[int]]:
        beside = versions[keys_of[table_id]] if table_id in keys_of else None
        return router.call(
            table_id,
            lambda attempt: attempt.pin("settle", pin, version=versions[table_id], lease_s=LEASE_S, beside=beside),
        )

    await _all(map(settle, table_ids))
    if name:  # once all have it: where this process dies before, their leases end
        await _all(
            router.call(table_id, lambda attempt: attempt.pin("renew", pin, name=name, lease_s=LEASE_S))
            for table_id in table_ids
        )
    return versions


async def _armed(router: Router, table_ids: Sequence[int], pin: str, *, name: str = "") -> dict[int, int]:
    """Arm it at all owners of all tables. Answers the highest version of each table."""
    armed = await _all(
        router.call(table_id, lambda attempt: attempt.pin("arm", pin, name=name, lease_s=LEASE_S))
        for table_id in table_ids
    )
    return {table_id: max(versions) for table_id, versions in zip(table_ids, armed, strict=True)}


async def _standing_still(router: Router, table_ids: Sequence[int], versions: dict[int, int]) -> dict[int, int]:
    """The versions at which two looks in a row have found all tables, which are armed."""
    looking: str | None = None
    clock = asyncio.get_running_loop()
    looks, end_s = 0, clock.time() + router.timeout_s
    try:
        while looks < MOST_LOOKS and (not looks or clock.time() < end_s):
            looks += 1
            before, looking = looking, secrets.token_hex(16)
            found, _ = await asyncio.gather(
                _armed(router, table_ids, looking), release_all(router, table_ids, before), return_exceptions=True
            )
            if isinstance(found, BaseException):
                raise found
            if found == versions:
                return found
            versions = found
    finally:
        await release_all(router, table_ids, looking)
    names = ", ".join(repr(router.name_of(table_id)) for table_id in table_ids)
    raise Overloaded(
        f"tables {names} cannot be pinned at one moment: commits came between each of {looks} looks at them, one after "
        "another. Ask again, or for fewer tables (tables=), or take a checkpoint, for which they stand still. "
        "Nothing was changed.",
        retry_after_s=1.0,
    )


async def pin_kept(
    router: Router,
    table_ids: Sequence[int],
    *,
    version: int = 0,
    name: str = "",
) -> Pinned:
    """Pin a version that is kept already: a snapshot's, or one that some reader has pinned.

    Args:
        table_ids: The table, and where its keys are read, too, theirs: as they were pinned with it.
        version: The table's, where there is no name.

    Raises:
        VersionGone: It is not kept.
    """
    pin, others = secrets.token_hex(16), table_ids[1:]

    def attach(each: int) -> Awaitable[list[int]]:
        beside = version if each in others and not name else None
        return router.call(
            each,
            lambda attempt: attempt.pin("attach", pin, version=version, name=name, lease_s=LEASE_S, beside=beside),
        )

    try:
        attached = await _all(map(attach, table_ids))
        for each, versions in zip(table_ids, attached, strict=True):
            if len(set(versions)) > 1:
                what = f"snapshot {name!r}" if name else f"what is pinned with version {version}"
                raise VersionGone(f"{what} of table {router.name_of(each)!r} is not whole: drop it, and take it again")
        return Pinned(pin, {each: versions[0] for each, versions in zip(table_ids, attached, strict=True)})
    except BaseException:
        await release_all(router, table_ids, pin)
        raise


async def pin_version(router: Router, table_ids: Sequence[int], version: int) -> Pinned:
    """Pin this very version: the newest one, or one that is kept.

    Args:
        table_ids: The table, and where its keys are read, too, theirs. Where nobody has pinned those with that version,
            there is the table alone.

    Raises:
        VersionGone: It is over, and not kept.
        InvalidRequest: It is still to come.
    """
    table_id, *keys = table_ids
    try:
        return await pin_kept(router, table_ids, version=version)
    except VersionGone:
        pinned = await pin_newest(router, table_ids, keys_of=dict.fromkeys(keys, table_id))
        newest = pinned.versions[table_id]
        if newest == version:
            return pinned
        await release_all(router, table_ids, pinned.pin)
        if newest < version:
            raise InvalidRequest(
                f"version {version} of table {router.name_of(table_id)!r} is still to come: it is at {newest}"
            ) from None
        if not keys:
            raise
    return await pin_kept(router, [table_id], version=version)


async def release(router: Router, table_id: int, pin: str) -> None:
    """Its reader is done. A shard that does not hear it lets the pin go by its lease."""
    with suppress(MempoolError):
        await router.call(table_id, lambda attempt: attempt.pin("release", pin, lease_s=0.0), timeout_s=_RELEASE_S)


async def release_all(router: Router, table_ids: Iterable[int], pin: str | None) -> None:
    """Of all these tables. pin: None: there is none."""
    if pin is not None:
        await asyncio.gather(*(release(router, table_id, pin) for table_id in table_ids))


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """All that they answer; raises what the first of those that failed said, once none is under way."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    answers = []
    for each in found:
        if isinstance(each, BaseException):
            raise each
        answers.append(each)
    return answers


async def keep(router: Router, table_id: int, pin: str, over: asyncio.Event) -> None:
    """Say that the reader lives, until it is over, and release it then; or until the pin is gone: reads say so."""
    while not router.tries.closed:
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), LEASE_S / _RENEWALS)
            await release(router, table_id, pin)
            return
        try:
            await router.call(
                table_id, lambda attempt: attempt.pin("renew", pin, lease_s=LEASE_S), timeout_s=LEASE_S / _RENEWALS
            )
        except VersionGone:
            return
        except MempoolError:
            continue  # a shard that is away: it is heard of again, or its lease ends
