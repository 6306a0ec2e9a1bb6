"""Checkpoints of a pool as its user asks for them: one that is waited for or watched, and tables that are restored."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import replace
from typing import Any

from mempool.checkpoint.stores.places import absolute
from mempool.client.counts import as_count
from mempool.client.opening.creation import CreateProgress
from mempool.errors import DeadlineExceeded, Internal, InvalidRequest, MempoolError
from mempool.types import CheckpointProgress, PoolApi, RestoreTables, TableView, TakeCheckpoint
from mempool.types.caller import Caller, calling
from mempool.types.running import Latch

_POLL_S = 1.0
_STATUS_S = 4.0


class CheckpointHandle:
    """A checkpoint that is being taken. The pool goes on with it, whatever becomes of this."""

    def __init__(self, first: CheckpointProgress) -> None:
        self._progress = first
        self._ended = Latch()
        self._error: MempoolError | None = None

    def __repr__(self) -> str:
        return f"CheckpointHandle({self._progress.url!r}, {self._progress.name!r}{', done' if self.done else ''})"

    @property
    def progress(self) -> CheckpointProgress:
        """Where it stands."""
        return self._progress

    @property
    def done(self) -> bool:
        """Whether it is whole, or has failed: ``wait`` says which."""
        return self._ended.is_set

    def wait(self, timeout_s: float | None = None) -> CheckpointProgress:
        """Wait until it is whole.

        Args:
            timeout_s: For so long; None: for as long as it takes.

        Raises:
            DeadlineExceeded: It is not whole yet. The pool goes on with it.
            MempoolError: As ``Pool.checkpoint``.
        """
        if not self._ended.wait(timeout_s):
            raise DeadlineExceeded(
                f"the checkpoint to {self._progress.url} is not whole after {timeout_s:g} s; it goes on"
            )
        if self._error is not None:
            raise self._error
        return self._progress

    async def follow(self, reports: AsyncIterator[CheckpointProgress]) -> None:
        """Hear the rest of its reports."""
        try:
            async for self._progress in reports:
                pass
            if not self._progress.done:
                self._error = DeadlineExceeded(f"nothing more was heard of the checkpoint to {self._progress.url}")
        except MempoolError as error:
            self._error = error
        except Exception as error:
            self._error = Internal(
                f"the checkpoint to {self._progress.url} failed with {type(error).__name__}: {error}. This is a bug."
            )
        except BaseException:
            self._error = InvalidRequest("the pool was closed on this side; it goes on with the checkpoint")
            raise
        finally:
            self._ended.set()


def asked_checkpoint(
    url: object, tables: Iterable[str] | None, *, incremental: bool, keep: int | None, extra: Mapping[str, Any] | None
) -> TakeCheckpoint:
    """What is sent to the pool. Raises InvalidRequest for what cannot be meant."""
    try:
        text = "" if extra is None else json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"extra={extra!r:.80} cannot be kept: it must be a dict of JSON's own kinds ({error})"
        ) from None
    return TakeCheckpoint(
        url=absolute(url),  # type: ignore[arg-type]  # which refuses what is no path
        tables=_names(tables),
        incremental=bool(incremental),
        keep=0 if keep is None else _kept(keep),
        extra=text,
    )


def asked_restore(
    url: object,
    tables: Iterable[str] | None,
    *,
    checkpoint: str | None,
    name: str | None,
    replace: bool,
    layout: str | None,
) -> RestoreTables:
    """What is sent to the pool. Raises InvalidRequest for what cannot be meant."""
    for what, value in (("checkpoint", checkpoint), ("name", name), ("layout", layout)):
        if value is not None and not (isinstance(value, str) and value):
            raise InvalidRequest(f"{what}={value!r:.80}: give a name, or leave it out")
    return RestoreTables(
        url=absolute(url),  # type: ignore[arg-type]
        checkpoint=checkpoint or "",
        tables=_names(tables),
        name=name or "",
        replace=bool(replace),
        layout=layout or "",
    )


def _kept(keep: object) -> int:
    count = as_count(keep)
    if count is None or not 1 <= count < 2**31:
        raise InvalidRequest(f"keep={keep!r:.80}: give how many of the newest checkpoints to keep, at least 1")
    return count


def _names(tables: Iterable[str] | None) -> tuple[str, ...]:
    if tables is None:
        return ()
    names = (tables,) if isinstance(tables, str) else tuple(tables)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidRequest(f"tables={tables!r:.80}: give names of tables, or leave it out for all of them")
    return names


class Restoring:
    """One call of ``restore``.

    Attributes:
        views: The tables, once ``reports`` has ended.
    """

    def __init__(self, api: PoolApi, request: RestoreTables) -> None:
        self._api = api
        self._request = request
        self.views: tuple[TableView, ...] = ()

    async def reports(self) -> AsyncIterator[CreateProgress]:
        """Restore, and say now and then how far that is."""
        clock = asyncio.get_running_loop()
        began_s = clock.time()
        request = self._request
        if request.replace:  # what is made from now on is nothing that this replaces, however late a copy of it comes
            newest = max((view.schema.table_id for view in await self._api.tables()), default=1)
            request = replace(request, newest_id=newest)
        with calling(Caller()):  # no deadline goes along: the work is as long as the tables are large
            restoring = asyncio.ensure_future(self._api.restore(request))
        try:
            while not (await asyncio.wait({restoring}, timeout=_POLL_S))[0]:
                if (seen := await self._look(clock.time() - began_s)) is not None:
                    yield seen
            self.views = restoring.result()
        finally:
            restoring.cancel()
            await asyncio.gather(restoring, return_exceptions=True)

    async def _look(self, spent_s: float) -> CreateProgress | None:
        try:
            async with asyncio.timeout(_STATUS_S):
                creating = (await self._api.status()).creating
        except (MempoolError, TimeoutError):
            return None
        wanted = (self._request.name,) if self._request.name else self._request.tables
        mine = [each for each in creating if not wanted or each.table in wanted]
        if not mine:
            return None
        return CreateProgress(
            table=", ".join(each.table for each in mine),
            bytes_done=sum(each.bytes_done for each in mine),
            bytes_total=sum(each.bytes_total for each in mine),
            waiting_for=next((each.waiting_for for each in mine if each.waiting_for), ""),
            spent_s=spent_s,
        )
