"""Making a table: as long as the pool gets on with it, with its progress, and only if there is none or the same one.

The controller makes it, and goes on where nobody waits any more; asking again joins in.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from mempool.client.routing.retry import GiveUp
from mempool.client.routing.router import Router
from mempool.config import TableConfig, resolve, unsaid
from mempool.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, MempoolError, NotFound
from mempool.types import PoolApi, PoolStatus, TableView
from mempool.types.caller import Caller, calling
from mempool.types.pool import WAITS_FOR_SHARDS
from mempool.types.schema_differences import schema_differences

_LOG = logging.getLogger("mempool")

# What takes longer than this says so.
_QUIET_S = 2.0
_POLL_S = 1.0
_SMALL_BYTES = 4 * 2**20  # of a table whose progress whole mebibytes would hide


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateProgress:
    """How far the making of a table is.

    Attributes:
        table: Its name.
        bytes_done: Bytes of pages that have their initial values.
        bytes_total: Of how many; 0 while the pool has not begun.
        waiting_for: What has to end before it begins, in words; "" where nothing has.
        spent_s: Seconds since it was asked for here.
    """

    table: str
    bytes_done: int
    bytes_total: int
    waiting_for: str
    spent_s: float

    def __str__(self) -> str:
        if self.waiting_for:
            return f"it waits for {self.waiting_for}"
        if self.bytes_total and not self.bytes_done:
            return "its CPU kernels are made ready, and its first values"
        if self.bytes_total:
            unit, size = ("MiB", 2**20) if self.bytes_total >= _SMALL_BYTES else ("KiB", 2**10)
            done, total = self.bytes_done // size, -(-self.bytes_total // size)
            return f"{done:,} of {total:,} {unit} have their initial values"
        return "the pool has not begun to fill it"


class Creation:
    """One call of ``create_table``.

    Args:
        config: The table.
        api: The controller.
        router: Takes over the view.
        exist_ok: A table of that name and this schema is as good as a new one.

    Attributes:
        view: The table, once ``reports`` has ended.
    """

    view: TableView

    def __init__(self, config: TableConfig, *, api: PoolApi, router: Router, exist_ok: bool) -> None:
        if not isinstance(config, TableConfig):
            raise InvalidRequest(
                f"create_table was given {type(config).__name__} {config!r}; it takes a mempool.TableConfig(name=...,"
                " num_slots=..., value_dim=...), and pool.table(name) opens a table that is there"
            )
        self._schema = resolve(config)
        self._aside = ("table_id", *unsaid(config))
        self._api = api
        self._router = router
        self._exist_ok = exist_ok
        self._began_s = time.monotonic()
        self._moved_s = self._began_s
        self._moves = 0
        self._seen: CreateProgress | None = None

    async def reports(self) -> AsyncIterator[CreateProgress]:
        """Make the table, or find it; says now and then how far it is.

        Raises:
            AlreadyExists: There is another table of that name; the message says in what it differs.
            PoolUnreachable: The controller did not answer for the pool's timeout_s.
            DeadlineExceeded: The pool did not get on with it for the pool's timeout_s. It goes on all the same.
        """
        with calling(Caller()):  # no deadline goes along: the work is as long as the table is large
            making = asyncio.ensure_future(self._made())
        try:
            wait_s = _QUIET_S
            while not (await asyncio.wait({making}, timeout=wait_s))[0]:
                wait_s = _POLL_S
                if (seen := await self._look()) is not None:
                    yield seen
            self.view = making.result()
        finally:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)

    async def _made(self) -> TableView:
        clock = asyncio.get_running_loop()
        tries, retry = 0, self._router.tries.retry(self._schema.name)
        while True:
            tries += 1
            moves = self._moves
            try:
                return self._router.adopt(await self._api.create_table(self._schema))
            except AlreadyExists as error:
                # An earlier try that was not heard of may have made it.
                return self._router.adopt(await self._found(error, ours=tries > 1))
            except MempoolError as error:
                now_s = clock.time()
                if self._moves > moves:  # it was at work, and is away now: an outage of its own
                    retry = self._router.tries.retry(self._schema.name)
                action = retry.failed(error, now_s=now_s)
                if isinstance(action, GiveUp):
                    raise action.error from (None if action.error is error else error)
                await asyncio.sleep(action.delay_s)

    async def _found(self, error: AlreadyExists, *, ours: bool) -> TableView:
        name = self._schema.name
        try:
            view = await self._router.tries.run(name, lambda: self._api.table(name))
        except NotFound:  # another one is being made just now
            raise error from None
        if ours and replace(self._schema, table_id=view.schema.table_id) == view.schema:
            return view
        if not self._exist_ok:
            raise error
        differences = [
            f"{found.path} is {found.second!r}, asked for {found.first!r}"
            for found in schema_differences(self._schema, view.schema, aside=self._aside)
        ]
        if differences:
            raise AlreadyExists(
                f"table {name!r} of {self._router.tries.where.pool} exists and is another one: "
                f"{'; '.join(differences)}. Ask for what it is, open it with pool.table({name!r}), or take another "
                "name."
            )
        return view

    async def _look(self) -> CreateProgress | None:
        """Asks how far it is, and ends the wait where nothing has moved for the pool's timeout_s."""
        name, timeout_s = self._schema.name, self._router.timeout_s
        try:
            async with asyncio.timeout(min(timeout_s, 2 * _QUIET_S)):
                seen = _progress(await self._api.status(), name, spent_s=time.monotonic() - self._began_s)
        except (MempoolError, TimeoutError):
            seen = None
        now_s, before = time.monotonic(), self._seen
        if seen is not None:
            # Where the pool has not begun it is at work on something else, and answers: that is a sign of life. That
            # a shard has yet to answer the pool is none.
            begun = seen.bytes_total > 0 and not seen.waiting_for
            waits = seen.waiting_for not in ("", WAITS_FOR_SHARDS)
            if waits or (begun and (before is None or seen.bytes_done != before.bytes_done)):
                self._moved_s = now_s
                self._moves += 1
            if before is None:
                _LOG.warning("making table %r takes a while: %s", name, seen)
            self._seen = seen
        if now_s - self._moved_s > timeout_s:
            raise DeadlineExceeded(
                f"table {name!r} of {self._router.tries.where.pool}: its making has not moved for {timeout_s:.1f} s "
                f"({self._seen or 'its controller does not answer'}). The pool goes on with it: create_table(..., "
                f"exist_ok=True) waits for it again, drop_table({name!r}) gives it up."
            )
        return seen


def _progress(status: PoolStatus, table: str, *, spent_s: float) -> CreateProgress:
    for creation in status.creating:
        if creation.table == table:
            return CreateProgress(
                table=table,
                bytes_done=creation.bytes_done,
                bytes_total=creation.bytes_total,
                waiting_for=creation.waiting_for,
                spent_s=spent_s,
            )
    return CreateProgress(table=table, bytes_done=0, bytes_total=0, waiting_for="", spent_s=spent_s)
