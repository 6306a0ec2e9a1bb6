"""Reading a table's pages back from a checkpoint, those that a placement gives one shard: bounded batches, checked."""

from collections.abc import Iterator
from dataclasses import replace

from mempool.checkpoint.commit import number_of
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores import open_store
from mempool.checkpoint.stores.places import check_place
from mempool.errors import DataLoss, InvalidRequest
from mempool.shard.bounds import shown
from mempool.shard.pages.capture import page_arrays
from mempool.shard.pages.storage import Storage
from mempool.types import PageBatch, Placement, TableSource

_BATCH_BYTES = 8 * 2**20


def check_source(source: TableSource | None) -> TableSource:
    """Raises InvalidRequest where it names no checkpoint."""
    if source is None:
        raise InvalidRequest("a table that is to be restored names no checkpoint (source). Nothing was changed.")
    check_place(source.url)
    if number_of(source.checkpoint) is None:
        raise InvalidRequest(f"{shown(source.checkpoint)} is no checkpoint's name. Nothing was changed.")
    return source


def read_pages(source: TableSource, storage: Storage, placement: Placement, *, version: int) -> Iterator[PageBatch]:
    """The pages of one shard, batch after batch; reads files, so off the engine's thread.

    Raises:
        NotFound, DataLoss, InvalidRequest: The checkpoint is not there, not whole, or of another table.
    """
    table = Checkpoint(open_store(source.url), source.checkpoint).table(source.table)
    table.check_schema(storage.schema, arrays=page_arrays(storage))
    if table.state.version != version:
        raise DataLoss(
            f"table {source.table!r} of checkpoint {source.checkpoint!r} is at version {table.state.version}, and was "
            f"at {version} a moment ago: it was written over. Restore it again"
        )
    pages = Pages(placement.owners == storage.shard, placement.key_owners == storage.shard)
    for batch in table.batches(pages, batch_bytes=_BATCH_BYTES):
        yield replace(batch, table_id=storage.schema.table_id)
