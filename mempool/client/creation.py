"""Making a table: as long as the pool gets on with it, with its progress, and only if there is none or the same one.

The controller makes it, and goes on where nobody waits any more; asking again joins in.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from mempool.client.routing.retry import GiveUp
from mempool.client.routing.router import Router
from mempool.config import TableConfig, resolve
from mempool.errors import AlreadyExists, DeadlineExceeded, MempoolError
from mempool.types import FlatKeySpec, OptimizerSpec, PoolApi, ProductKeySpec, TableSchema, TableView
from mempool.types.caller import Caller, calling

_LOG = logging.getLogger("mempool")

# What takes longer than this says so.
_QUIET_S = 2.0
_POLL_S = 1.0
# Fields of a schema that follow from the others where the caller says nothing of them.
_DERIVED = ("block_dim", "page_slots", "layout", "rounding", "init_std")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateProgress:
    """How far the making of a table is.

    Attributes:
        table: Its name.
        bytes_done: Bytes of pages that have their initial values.
        bytes_total: Of how many; 0 while the pool has not begun.
        spent_s: Seconds since it was asked for here.
    """

    table: str
    bytes_done: int
    bytes_total: int
    spent_s: float


OnProgress = Callable[[CreateProgress], None]


class Creation:
    """One call of ``create_table``.

    Args:
        config: The table.
        api: The controller.
        router: Takes over the view.
        exist_ok: A table of that name and this schema is as good as a new one.
        on_progress: Called with each report, on the IO loop's thread.
    """

    def __init__(
        self,
        config: TableConfig,
        *,
        api: PoolApi,
        router: Router,
        exist_ok: bool,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._schema = resolve(config)
        self._derived = [name for name in _DERIVED if getattr(config, name, None) is None or _unsaid(config, name)]
        self._api = api
        self._router = router
        self._exist_ok = exist_ok
        self._on_progress = on_progress
        self._began_s = time.monotonic()
        self._moved_s = self._began_s
        self._seen: CreateProgress | None = None

    async def run(self) -> TableView:
        """Make the table, or find it.

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
                    await self._look()
                return making.result()
            finally:
                making.cancel()
                await asyncio.gather(making, return_exceptions=True)

    async def _made(self) -> TableView:
        clock = asyncio.get_running_loop()
        tries, retry = 0, self._router.tries.retry(self._schema.name)
        while True:
            tries += 1
            asked_s = clock.time()
            try:
                return self._router.adopt(await self._api.create_table(self._schema))
            except AlreadyExists as error:
                # An earlier try that was not heard of may have made it.
                return self._router.adopt(await self._found(error, ours=tries > 1))
            except MempoolError as error:
                now_s = clock.time()
                if now_s - asked_s > _QUIET_S:  # it was at work, and is away now: an outage of its own
                    retry = self._router.tries.retry(self._schema.name)
                action = retry.failed(error, now_s=now_s)
                if isinstance(action, GiveUp):
                    raise action.error from (None if action.error is error else error)
                await asyncio.sleep(action.delay_s)

    async def _found(self, error: AlreadyExists, *, ours: bool) -> TableView:
        view = await self._router.tries.run(self._schema.name, lambda: self._api.table(self._schema.name))
        if ours and replace(self._schema, table_id=view.schema.table_id) == view.schema:
            return view
        if not self._exist_ok:
            raise error
        differences = _differences(self._schema, view.schema, aside=("table_id", *self._derived))
        if differences:
            listed = "; ".join(differences)
            raise AlreadyExists(
                f"table {self._schema.name!r} of {self._router.tries.where.pool} exists and is another one: {listed}. "
                f"Ask for what it is, open it with pool.table({self._schema.name!r}), or take another name."
            )
        return view

    async def _look(self) -> None:
        """Asks how far it is, and ends the wait where nothing has moved for the pool's timeout_s."""
        timeout_s = self._router.timeout_s
        try:
            async with asyncio.timeout(min(timeout_s, 2 * _QUIET_S)):
                status = await self._api.status()
        except (MempoolError, TimeoutError):
            status = None
        now_s = time.monotonic()
        if status is not None:
            done, total = _progress(status, self._schema.name)
            seen = CreateProgress(
                table=self._schema.name, bytes_done=done, bytes_total=total, spent_s=now_s - self._began_s
            )
            before = self._seen
            # Where the pool has not begun it is at work on something else, and answers: that is a sign of life.
            if before is None or total == 0 or (before.bytes_done, before.bytes_total) != (done, total):
                self._moved_s = now_s
            self._seen = seen
            self._say(seen, first=before is None)
        if now_s - self._moved_s > timeout_s:
            raise DeadlineExceeded(
                f"table {self._schema.name!r} of {self._router.tries.where.pool}: its making has not moved for "
                f"{timeout_s:.1f} s ({self._at()}). The pool goes on with it: create_table(..., exist_ok=True) waits "
                f"for it again, drop_table({self._schema.name!r}) gives it up."
            )

    def _say(self, seen: CreateProgress, *, first: bool) -> None:
        if first:
            _LOG.warning("making table %r takes a while: %s", self._schema.name, self._at())
        if self._on_progress is not None:
            self._on_progress(seen)

    def _at(self) -> str:
        seen = self._seen
        if seen is None or not seen.bytes_total:
            return "the pool has not begun to fill it"
        return f"{seen.bytes_done / 2**20:,.0f} of {seen.bytes_total / 2**20:,.0f} MiB have their initial values"


def _unsaid(config: TableConfig, name: str) -> bool:
    return name not in config.model_fields_set


def _progress(status: object, table: str) -> tuple[int, int]:
    """(bytes done, bytes in all) of a table that is being made; (0, 0) where the pool says nothing of it."""
    for creation in getattr(status, "creating", ()):
        if creation.table == table:
            return creation.bytes_done, creation.bytes_total
    return 0, 0


def _differences(asked: object, found: object, *, aside: tuple[str, ...] = (), prefix: str = "") -> list[str]:
    """Fields in which two schemas differ, down into optimizer and keys: "optimizer.lr is 0.1, asked for 0.2"."""
    nested = (TableSchema, OptimizerSpec, ProductKeySpec, FlatKeySpec)
    if type(asked) is not type(found) or not isinstance(asked, nested):
        return [] if asked == found else [f"{prefix} is {found!r}, asked for {asked!r}"]
    return [
        difference
        for field in fields(asked)
        if field.name not in aside
        for difference in _differences(
            getattr(asked, field.name), getattr(found, field.name), prefix=f"{prefix}.{field.name}".lstrip(".")
        )
    ]
