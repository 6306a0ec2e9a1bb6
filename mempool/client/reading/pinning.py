"""Takes a pin at every owner of a table, keeps it while its reader lives, and releases it. Runs on the IO loop.

A pin is armed at all owners, then settled at the highest version that any of them was at: see ``agreement.readers``.
"""

import asyncio
import secrets
from contextlib import suppress

from mempool.client.routing.router import Router
from mempool.errors import InvalidRequest, MempoolError, VersionGone
from mempool.types.running import TRAINER_LEASE_S

LEASE_S = 3 * TRAINER_LEASE_S
"""How long a shard keeps a version for a reader that it does not hear of."""
_RENEWALS = 6
_RELEASE_S = 5.0
_TRIES = 5
"""Pages that move in between end a pin that is being taken."""


async def pin_newest(router: Router, table_id: int, *, name: str = "") -> tuple[str, int]:
    """Pin the newest version; every commit that was acknowledged before is in it.

    Args:
        name: Of a snapshot, which is kept without a lease; "": for a reader.

    Returns:
        The pin and its version.

    Raises:
        AlreadyExists: There is a snapshot of that name.
        VersionGone: It went before it was taken everywhere: too little may be kept, or pages move again and again.
    """
    tries = 0
    while True:
        tries += 1
        pin = secrets.token_hex(16)
        try:
            return pin, await _pinned(router, table_id, pin, name)
        except BaseException as error:
            await release(router, table_id, pin)
            if tries >= _TRIES or not isinstance(error, VersionGone):
                raise


async def _pinned(router: Router, table_id: int, pin: str, name: str) -> int:
    armed = await router.call(table_id, lambda attempt: attempt.pin("arm", pin, name=name, lease_s=LEASE_S))
    version = max(armed)
    await router.call(table_id, lambda attempt: attempt.pin("settle", pin, version=version, lease_s=LEASE_S))
    if name:  # once all have it: where this process dies before, their leases end
        await router.call(table_id, lambda attempt: attempt.pin("renew", pin, name=name, lease_s=LEASE_S))
    return version


async def pin_kept(router: Router, table_id: int, *, version: int = 0, name: str = "") -> tuple[str, int]:
    """Pin a version that is kept already: a snapshot's, or one that some reader has pinned.

    Raises:
        VersionGone: It is not kept.
    """
    pin = secrets.token_hex(16)
    try:
        versions = await router.call(
            table_id,
            lambda attempt: attempt.pin("attach", pin, version=version, name=name, lease_s=LEASE_S),
        )
        if len(set(versions)) > 1:
            raise VersionGone(
                f"snapshot {name!r} of table {router.name_of(table_id)!r} is not whole: drop it, and take it again"
            )
        return pin, versions[0]
    except BaseException:
        await release(router, table_id, pin)
        raise


async def pin_version(router: Router, table_id: int, version: int) -> tuple[str, int]:
    """Pin this very version: the newest one, or one that is kept.

    Raises:
        VersionGone: It is over, and not kept.
        InvalidRequest: It is still to come.
    """
    try:
        return await pin_kept(router, table_id, version=version)
    except VersionGone:
        pin, newest = await pin_newest(router, table_id)
        if newest == version:
            return pin, newest
        await release(router, table_id, pin)
        if newest < version:
            raise InvalidRequest(
                f"version {version} of table {router.name_of(table_id)!r} is still to come: it is at {newest}"
            ) from None
        raise


async def release(router: Router, table_id: int, pin: str) -> None:
    """Its reader is done. A shard that does not hear it lets the pin go by its lease."""
    with suppress(MempoolError):
        await router.call(table_id, lambda attempt: attempt.pin("release", pin, lease_s=0.0), timeout_s=_RELEASE_S)


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
