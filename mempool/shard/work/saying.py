"""What a shard says of its tables, for whoever looks at it: on any thread, never waiting."""

from mempool.shard.hosted import HostedTable
from mempool.types import TableStatus


def table_status(table: HostedTable) -> TableStatus:
    """The table at a glance."""
    storage = table.storage
    return TableStatus(
        table_id=table.table_id,
        name=table.view.schema.name,
        epoch=table.epoch,
        version=table.ledger.version,
        pages=table.pages,
        lost_pages=table.lost_pages,
        num_bytes=table.num_bytes,
        updates_held=len(table.updates),
        updates_applied=table.ledger.updates_applied,
        lookups=table.lookups,
        frozen=table.frozen,
        bytes_to_fill=table.bytes_to_fill,
        preparing=table.preparing,
        pending=table.pending,
        round=table.rounds.token or "",
        load=storage.load,
        pins=storage.moments.status(),
        shared_bytes=storage.shared_bytes,
    )
