"""Filling a table from a checkpoint or a file: the pages that are this shard's, in bounded batches, checked.

Files are read off the engine's thread, a batch while the one before is taken in: that is durable before the next is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from mempool.checkpoint.commit import number_of
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores import open_store
from mempool.checkpoint.stores.places import check_place
from mempool.errors import DataLoss, InvalidRequest, ShardUnavailable
from mempool.shard.bounds import shown
from mempool.shard.durable.changes import Changes
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.capture import page_arrays
from mempool.shard.pages.storage import Storage
from mempool.shard.pulling import Jobs
from mempool.shard.saving.importing import imported_pages
from mempool.shard.work.jobs import JOB_BYTES
from mempool.types import AttachTable, Ledger, PageBatch, Placement, TableSource
from mempool.types.caller import Caller, calling
from mempool.types.running import Runner

_BATCH_BYTES = 8 * 2**20
_BATCHES = 2
"""In memory: one that is taken in, and one that is being read."""


def check_source(source: TableSource | None) -> TableSource:
    """Raises InvalidRequest where it names neither a checkpoint nor a file."""
    if source is None:
        raise InvalidRequest("a table that is to be restored names no checkpoint (source). Nothing was changed.")
    check_place(source.url)
    if source.checkpoint and number_of(source.checkpoint) is None:
        raise InvalidRequest(f"{shown(source.checkpoint)} is no checkpoint's name. Nothing was changed.")
    return source


class Restoring:
    """The tables of a shard that are being filled from checkpoints.

    Args:
        changes: Takes their pages in.
        jobs: Runs a job on the engine's thread, in line with what clients ask.
        settled: Waits until what was taken in is durable.
        runner: Reads files.
    """

    def __init__(
        self,
        changes: Changes,
        *,
        jobs: Jobs,
        settled: Callable[[], Awaitable[None]],
        runner: Runner,
    ) -> None:
        self._changes = changes
        self._jobs = jobs
        self._settled = settled
        self._runner = runner
        self._tasks: dict[HostedTable, asyncio.Task[None]] = {}

    async def restore(self, table: HostedTable, request: AttachTable) -> None:
        """Fill a table; whoever asks again joins in. Where that fails it is dropped: half a table must not answer.

        Raises:
            NotFound, DataLoss, InvalidRequest: The checkpoint is not there, not whole, or of another table; or the
                table was dropped meanwhile.
            StorageFailed: The place, or the shard's own disk, fails.
        """
        if table.restored is None:
            return
        task = self._tasks.get(table)
        if task is None:
            with calling(Caller()):  # it goes on where the call ends, until the table is dropped
                task = self._tasks[table] = asyncio.create_task(self._fill(table, request))
            task.add_done_callback(partial(self._done, table))
        await asyncio.shield(task)

    async def close(self) -> None:
        """End what is being filled. Repeatable."""
        if tasks := list(self._tasks.values()):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _done(self, table: HostedTable, task: "asyncio.Task[None]") -> None:
        del self._tasks[table]
        if not task.cancelled():
            task.exception()  # whoever asked may be gone

    async def _fill(self, table: HostedTable, request: AttachTable) -> None:
        source, ledger = check_source(request.source), request.ledger or Ledger()
        batches = read_pages(source, table.storage, request.view.placement, version=ledger.version)
        reading = self._next(batches)
        try:
            while table.restored is not None:
                batch = await reading
                if batch is not None:
                    reading = self._next(batches)
                cost = JOB_BYTES + (0 if batch is None else batch.num_bytes)
                await self._jobs("fill", partial(self._changes.restore, table), batch, cost=cost)
                await self._settled()
        except BaseException:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            with suppress(ShardUnavailable):
                await asyncio.shield(self._jobs("drop_table", self._changes.give_up, table))
            raise

    def _next(self, batches: Iterator[PageBatch]) -> "asyncio.Future[PageBatch | None]":
        """The next batch, which is being read from now on."""
        return asyncio.ensure_future(self._runner.run(lambda: next(batches, None), name="mempool-restore"))


def read_pages(source: TableSource, storage: Storage, placement: Placement, *, version: int) -> Iterator[PageBatch]:
    """The pages of one shard, batch after batch; reads files, so off the engine's thread. A batch may lie in the memory
    of the one before the last.

    Raises:
        NotFound, DataLoss, InvalidRequest: The checkpoint, or the file, is not there, not whole, or of another table.
    """
    pages = Pages(placement.owners == storage.shard, placement.key_owners == storage.shard)
    if not source.checkpoint:
        yield from imported_pages(source, storage, pages, batch_bytes=_BATCH_BYTES)
        return
    table = Checkpoint(open_store(source.url), source.checkpoint).table(source.table)
    table.check_schema(storage.schema, arrays=page_arrays(storage))
    if table.state.version != version:
        raise DataLoss(
            f"table {source.table!r} of checkpoint {source.checkpoint!r} is at version {table.state.version}, and was "
            f"at {version} a moment ago: it was written over. Restore it again"
        )
    for batch in table.batches(pages, batch_bytes=_BATCH_BYTES, reused=_BATCHES):
        yield replace(batch, table_id=storage.schema.table_id)
