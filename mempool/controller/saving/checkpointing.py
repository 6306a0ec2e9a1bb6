"""Taking a checkpoint of a pool: its moment (``cut``), parts that shards write while training goes on, the manifest.

A task of the controller; whoever asked only watches. It holds the pool's placement still while it lasts. Where it
fails, or its controller dies, older checkpoints are whole, shards forget their marks, what was written counts not.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from mempool.checkpoint.commit import Begun, begin, commit
from mempool.checkpoint.format.ledger_json import ledger_json
from mempool.checkpoint.format.manifest import Manifest, Part, parse_part
from mempool.checkpoint.removal import keep_newest
from mempool.checkpoint.stores import Store, open_store
from mempool.checkpoint.stores.places import check_place
from mempool.controller.calls import ShardCalls
from mempool.controller.changes import TableChanges
from mempool.controller.roster import Roster
from mempool.controller.saving.cut import LEASE_S, Ended, Owner
from mempool.controller.saving.moment import Moments
from mempool.controller.telling import Telling
from mempool.errors import DataLoss, InvalidRequest, MempoolError, ShardUnavailable, StorageFailed
from mempool.types import (
    CheckpointProgress,
    Ledger,
    MarkTable,
    ReleaseMark,
    ShardHost,
    TableSource,
    TableVersion,
    TableView,
    TakeCheckpoint,
    WritePart,
)
from mempool.types.caller import Caller, calling
from mempool.types.keys import key_table
from mempool.types.running import Clock, Runner
from mempool.types.schema_checks import shown

_LOG = logging.getLogger("mempool.controller")

MAX_EXTRA_BYTES = 2**20
_MARK_LEASE_S = 60.0
_WAIT_S = 1.0
_STALLED_S = 120.0
"""A part of which nothing is written for so long ends the checkpoint: rows are copied for it."""
_MOST_REPORTS = 256
"""That wait for who watches: it may be slow, or gone. Later ones say more."""

T = TypeVar("T")
Reports = asyncio.Queue[CheckpointProgress | Exception]


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of one pool, one at a time.

    Args:
        pool: The pool's name.
        roster: Its shards and tables.
        calls, telling: Reach the shards.
        changes: What creates tables, and has to come to rest first.
        changing: Held while one is taken.
        moments: Takes the moment.
        written_by: The program and its version, for the manifest.
        clock: Seconds.
        runner: Reads and writes files.
        new_token: Gives a name that no round of any controller ever had.
    """

    pool: str
    roster: Roster
    calls: ShardCalls
    telling: Telling
    changes: TableChanges
    changing: asyncio.Lock
    moments: Moments
    written_by: str
    clock: Clock
    runner: Runner
    new_token: Callable[[], str]
    _task: "asyncio.Task[None] | None" = None
    _now: CheckpointProgress | None = None

    @property
    def doing(self) -> str:
        """What the one that is being taken is at, for people; "" for none."""
        now = self._now
        if now is None:
            return ""
        written = f" ({now.bytes_done:,} of {now.bytes_total:,} bytes)" if now.bytes_total else ""
        return f"a checkpoint to {now.url}: {now.doing}{written}"

    async def take(self, request: TakeCheckpoint) -> AsyncIterator[CheckpointProgress]:
        """Take one, and watch it. Raises as ``Controller.checkpoint`` does."""
        extra = check_request(request)
        self._views(request.tables)
        if self._task is not None:
            raise InvalidRequest(
                f"{self.doing or 'a checkpoint'} is under way; one is taken at a time. Wait for it, then ask again"
            )
        reports: Reports = asyncio.Queue()
        self._now = CheckpointProgress(
            url=request.url,
            name="",
            bytes_done=0,
            bytes_total=0,
            tables=(),
            held_s=0.0,
            doing="waiting for another change of the pool",
            done=False,
        )
        with calling(Caller()):  # the watcher's deadline is for its watching alone
            self._task = asyncio.create_task(self._run(request, extra, reports))
        while True:
            report = await reports.get()
            if isinstance(report, Exception):
                raise report
            yield report
            if report.done:
                return

    async def close(self) -> None:
        """End the one that is being taken."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, request: TakeCheckpoint, extra: dict[str, Any], reports: Reports) -> None:
        last: CheckpointProgress | Exception = ShardUnavailable("no checkpoint: its pool's controller is closing")
        try:
            self._say(reports)
            async with self.changing:
                await self.changes.idle()
                last = await self._take(request, extra, reports)
        except Exception as error:  # told to whoever watches; a bug is no less an answer than a full disk
            _LOG.warning("no checkpoint of pool %s was taken: %s", self.pool, error)
            last = error
        finally:
            self._task = self._now = None
            reports.put_nowait(last)

    def _say(self, reports: Reports, **changed: Any) -> CheckpointProgress:
        assert self._now is not None
        self._now = replace(self._now, **changed)
        if reports.qsize() >= _MOST_REPORTS:
            reports.get_nowait()
        reports.put_nowait(self._now)
        return self._now

    async def _take(self, request: TakeCheckpoint, extra: dict[str, Any], reports: Reports) -> CheckpointProgress:
        await self.telling.require_settled(())
        views = self._views(request.tables)
        self._say(reports, doing="looking at the place")
        store = await self._elsewhere(lambda: open_store(request.url))
        begun = await self._elsewhere(lambda: begin(store, pool=self.pool, incremental=request.incremental))
        token = self.new_token()
        kept = ""
        try:
            self._say(reports, name=begun.name, doing="waiting for steps that are under way")
            cut = await self._cut(views, begun, token)
            tables = tuple(
                TableVersion(table=view.schema.name, version=cut.versions[view.schema.table_id]) for view in views
            )
            self._say(reports, tables=tables, held_s=cut.held_s, doing="writing pages")
            parts, updates = await self._parts(request, views, begun, token, reports)
            self._say(reports, doing="writing the manifest")
            manifest = await self._elsewhere(lambda: self._commit(store, begun, parts, updates, extra))
            if not request.aside:
                kept = manifest.name
                await self._tell(views, request.url, manifest)
            assert self._now is not None
            done = replace(self._now, bytes_done=self._now.bytes_total, doing="", done=True)
        finally:
            with calling(Caller()):
                await asyncio.shield(self._release(views, token, kept))
        if request.keep:
            await self._remove_old(store, request.keep)
        return done

    def _views(self, names: Sequence[str]) -> list[TableView]:
        if names:
            views = [self.roster.view(name) for name in dict.fromkeys(names)]
            keys = [key_table(view.schema) for view in views]
            views += [self.roster.view(each.name) for each in keys if each is not None]
        else:
            views = list(self.roster.views)
        if not views:
            raise InvalidRequest(f"pool {self.pool!r} has no tables yet: there is nothing to take a checkpoint of")
        return views

    async def _remove_old(self, store: Store, keep: int) -> None:
        """The checkpoint counts, whatever becomes of older ones."""
        try:
            await self._elsewhere(lambda: keep_newest(store, keep))
        except MempoolError as error:
            _LOG.warning("a checkpoint is taken in %s, and older ones could not be removed: %s", store.url, error)

    async def _tell(self, views: Sequence[TableView], url: str, manifest: Manifest) -> None:
        """Let every shard know where its tables are saved: should it lose them, it says so. Those that miss it are told
        when they are settled."""
        for name in (view.schema.name for view in views):
            view = self.roster.find(name)
            if view is not None and name in manifest.tables:
                source = TableSource(url=url, checkpoint=manifest.name, table=name)
                view = self.roster.save(view, source, manifest.tables[name].version)
                view = self.roster.put(view.schema, view.placement, saved=view.saved)
                await self.telling.push(view, self.roster.infos)

    # The moment

    async def _cut(self, views: Sequence[TableView], begun: Begun, token: str) -> Ended:
        since = {view.schema.table_id: _since(view, begun) for view in views}

        async def mark(host: ShardHost, owner: Owner, version: int) -> None:
            table_id = owner.table_id
            await host.mark_table(
                MarkTable(table_id=table_id, token=token, version=version, lease_s=_MARK_LEASE_S, since=since[table_id])
            )

        return await self.moments.take(views, token, mark)

    # The parts

    async def _parts(
        self, request: TakeCheckpoint, views: Sequence[TableView], begun: Begun, token: str, reports: Reports
    ) -> tuple[list[Part], dict[str, int]]:
        """Every owner's part, and the tables' counts of updates."""
        seen: dict[Owner, tuple[int, int]] = {}
        updates: dict[str, int] = {}

        async def part(view: TableView, shard: int) -> Part:
            owner = Owner(view.schema.table_id, shard)
            base = None if begun.base is None else begun.base.tables.get(view.schema.name)
            asked = WritePart(
                table_id=owner.table_id,
                token=token,
                url=request.url,
                checkpoint=begun.name,
                since_version=0 if base is None else base.version,
                wait_s=_WAIT_S,
            )
            moved_s, before = self.clock(), -1
            while True:
                info = self.roster.shards.get(shard)
                if info is None:
                    raise ShardUnavailable(f"shard {shard} is gone", shard=shard)
                found = await self.calls.call(info, lambda host: host.write_part(asked))
                seen[owner] = found.bytes_done, found.bytes_total
                updates[view.schema.name] = found.updates_applied
                self._say(
                    reports,
                    bytes_done=sum(done for done, _ in seen.values()),
                    bytes_total=sum(total for _, total in seen.values()),
                )
                if data := found.part:
                    return await self._elsewhere(partial(_checked, data, view, begun, shard))
                if found.bytes_done != before:
                    moved_s, before = self.clock(), found.bytes_done
                elif self.clock() - moved_s > _STALLED_S:
                    raise StorageFailed(
                        f"shard {shard} has written nothing of table {view.schema.name!r} to {request.url} for "
                        f"{_STALLED_S:g} s, at {found.bytes_done:,} of {found.bytes_total:,} bytes: no checkpoint was "
                        "taken. Is the place slow, or gone? Take it again, or give another one",
                        shard=shard,
                    )

        tasks = [asyncio.create_task(part(view, shard)) for view in views for shard in view.placement.shards]
        try:
            return list(await asyncio.gather(*tasks)), updates
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _commit(
        self, store: Store, begun: Begun, parts: Sequence[Part], updates: Mapping[str, int], extra: dict[str, Any]
    ) -> Manifest:
        ledgers = {}
        for part in parts:
            table = part.table
            ledgers[table.schema.name] = ledger_json(
                Ledger(
                    version=table.version,
                    updates_applied=updates[table.schema.name],
                    step_offset=table.step_count - table.version,
                )
            )
        try:
            return commit(store, begun, parts, ledgers=ledgers, extra=extra, written_by=self.written_by)
        except DataLoss as error:
            raise DataLoss(
                f"{error.message}. Do the pool's nodes share {store.url}? Each shard writes its own files, and the "
                "controller has to see them all"
            ) from None

    async def _release(self, views: Sequence[TableView], token: str, kept: str) -> None:
        async def release(table_id: int, shard: int) -> None:
            info = self.roster.shards.get(shard)
            if info is not None:
                request = ReleaseMark(table_id=table_id, token=token, kept=kept)
                await self.calls.call(info, lambda host: host.release_mark(request), timeout_s=LEASE_S)

        results = await asyncio.gather(
            *(release(view.schema.table_id, shard) for view in views for shard in view.placement.shards),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                _LOG.warning("a mark was not released, and ends by its lease: %s", result)

    async def _elsewhere(self, work: Callable[[], T]) -> T:
        try:
            return await self.runner.run(work, name="mempool-checkpoint")
        except MempoolError:
            raise
        except Exception as error:  # of the user's fsspec package, say
            raise StorageFailed(
                f"the place of the checkpoint cannot be used ({type(error).__name__}: {error}). No checkpoint was taken"
            ) from error


def check_request(request: TakeCheckpoint) -> dict[str, Any]:
    """The user's extra, parsed. Raises InvalidRequest for what cannot be taken; nothing was changed."""
    check_place(request.url)
    if request.keep < 0:
        raise InvalidRequest(f"keep={request.keep}: give how many checkpoints to keep, 1 or more; 0 keeps all")
    return check_extra(request.extra)


def check_extra(text: str) -> dict[str, Any]:
    """A JSON object as text, or "". Raises InvalidRequest."""
    if not text:
        return {}
    if (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_EXTRA_BYTES:
        raise InvalidRequest(f"extra has {size:,} bytes of JSON; a checkpoint keeps at most {MAX_EXTRA_BYTES:,}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"extra={shown(text)} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"extra={shown(text)} is no JSON object; give a dict of what you want to keep")
    return found


def _since(view: TableView, begun: Begun) -> str:
    """The checkpoint of which unchanged pages of this very table may be read; "" for none."""
    base = begun.base
    table = None if base is None else base.tables.get(view.schema.name)
    return "" if base is None or table is None or table.schema != view.schema else base.name


def _checked(data: bytes, view: TableView, begun: Begun, shard: int) -> Part:
    part = parse_part(data, f"the part of shard {shard}")
    if part.table.schema != view.schema or part.checkpoint != begun.name:
        raise InvalidRequest(f"shard {shard} wrote another table or checkpoint than {view.schema.name!r}, {begun.name}")
    return part
