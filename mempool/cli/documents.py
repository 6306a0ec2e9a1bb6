"""What `--json` prints: plain dictionaries whose keys are part of the public face; new ones may be added."""

from dataclasses import asdict
from typing import Any

from mempool.config import Changes, FieldChange
from mempool.placement import assignment_of, describe, layout_kind
from mempool.types import PoolStatus, RescaleProgress, ShardStatus, TableStatus, TableView


def status(now: PoolStatus, *, address: str) -> dict[str, Any]:
    """The document of `mempool status --json`.

    Keys: ``pool``, ``address``, ``rescaling``, ``wanted_shards`` (null while the controller is away), ``waiting_for``,
    ``unfinished``, ``checkpoint`` (text, empty if there is nothing), ``shards`` (list, by shard id), ``tables`` (list)
    and ``creating`` (list, tables that are being made). Sizes are bytes, times are seconds. Of a shard in state
    "unreachable" only ``shard``, ``address``, ``incarnation``, ``state`` and ``storage_refuses`` mean anything. The
    ``load`` of a shard is its part of what was read and written within a minute or so, 0 to 1; null where nothing was.
    """
    shares = load_shares(now)
    return {
        "pool": now.name,
        "address": address,
        "rescaling": now.rescaling,
        "wanted_shards": now.wanted_shards or None,
        "waiting_for": now.waiting_for,
        "unfinished": now.unfinished,
        "checkpoint": now.checkpoint,
        "shards": [_shard(shard, load=shares.get(shard.info.shard)) for shard in now.shards],
        "tables": [table(view, now) for view in now.tables],
        "creating": [
            {**asdict(creation), "bytes_done": creation.bytes_done, "bytes_total": creation.bytes_total}
            for creation in now.creating
        ],
    }


def table(view: TableView, now: PoolStatus) -> dict[str, Any]:
    """One table over all shards.

    ``version`` and ``updates_applied`` are those of the shard that is furthest; ``pages`` counts all pages there are,
    ``lost_pages`` those that answer DATA_LOSS; ``placement`` is the kind of layout the pages have now; ``saved`` is the
    newest checkpoint of it that the pool knows, or null.
    """
    schema, placement = view.schema, view.placement
    assignment = assignment_of(placement)
    seen = {shard.info.shard: found for shard in now.shards if (found := _seen(shard, schema.table_id)) is not None}
    return {
        "name": schema.name,
        "table_id": schema.table_id,
        "num_slots": schema.num_slots,
        "value_dim": schema.value_dim,
        "dtype": schema.dtype,
        "optimizer": schema.optimizer.algorithm,
        "keys": None if schema.keys is None else type(schema.keys).__name__.removesuffix("KeySpec").lower(),
        "layout": schema.layout,
        "placement": layout_kind(assignment),
        "epoch": placement.epoch,
        "pages": placement.owners.size + placement.key_owners.size,
        "lost_pages": sum(found.lost_pages for found in seen.values()),
        "num_bytes": sum(found.num_bytes for found in seen.values()),
        "shared_bytes": sum(found.shared_bytes for found in seen.values()),
        "version": max((found.version for found in seen.values()), default=0),
        "updates_applied": max((found.updates_applied for found in seen.values()), default=0),
        "updates_held": max((found.updates_held for found in seen.values()), default=0),
        "saved": None if view.saved is None else asdict(view.saved),
        "shards": [
            {
                "shard": line.shard,
                "pages": line.pages + line.key_pages,
                "share": line.share,
                "blocks": line.blocks,
                **_of_shard(seen.get(line.shard)),
            }
            for line in describe(assignment)
        ],
    }


def changes(found: Changes, *, applied: bool) -> dict[str, Any]:
    """The document of `mempool apply --json`. ``applied`` is False with `--dry-run`."""
    return {
        "applied": applied,
        "nothing": found.nothing,
        "unfinished": found.unfinished,
        "shards_before": found.shards_before,
        "shards_after": found.shards_after,
        "create": [table.name for table in found.create],
        "kept": list(found.kept),
        "refused": [_change(change) for change in found.refused],
        "restart": [_change(change) for change in found.restart],
    }


def rebalanced(last: RescaleProgress, *, applied: bool) -> dict[str, Any]:
    """The document of `mempool rebalance --json`. ``applied`` is False with `--dry-run`.

    ``pages`` and ``bytes`` were moved, or would be; ``shards`` has each one's part of the load, 0 to 1, before and
    after: it is empty where too little was read and written lately to tell.
    """
    return {
        "applied": applied,
        "pages": last.pages_total,
        "bytes": last.bytes_total,
        "shards": [asdict(load) for load in last.loads],
    }


def load_shares(now: PoolStatus) -> dict[int, float]:
    """Each shard's part of the pool's load, 0 to 1; none where nothing was read or written lately."""
    loads = {shard.info.shard: sum(table.load for table in shard.tables) for shard in now.shards}
    whole = sum(loads.values())
    return {shard: load / whole for shard, load in loads.items()} if whole else {}


def _shard(shard: ShardStatus, *, load: float | None) -> dict[str, Any]:
    return {
        "shard": shard.info.shard,
        "address": shard.info.address,
        "incarnation": shard.info.incarnation,
        "state": shard.state,
        "device": shard.device,
        "num_bytes": shard.num_bytes,
        "context_bytes": shard.context_bytes,
        "held_bytes": shard.held_bytes,
        "queued_bytes": shard.queued_bytes,
        "queued_calls": shard.queued_calls,
        "kept_bytes": shard.kept_bytes,
        "client_limit_bytes": shard.client_limit_bytes,
        "page_limit_bytes": shard.page_limit_bytes,
        "storage": shard.storage or None,
        "journal_bytes": shard.journal_bytes,
        "storage_refuses": shard.storage_refuses,
        "copied_bytes": shard.copied_bytes,
        "version_bytes": shard.version_bytes,
        "version_limit_bytes": shard.version_limit_bytes,
        "near_clients": shard.near_clients,
        "tcp_line_clients": shard.tcp_line_clients,
        "load": load,
        "uptime_s": shard.uptime_s,
        "stages": [asdict(stage) for stage in shard.stages],
    }


def _seen(shard: ShardStatus, table_id: int) -> TableStatus | None:
    return next((table for table in shard.tables if table.table_id == table_id), None)


def _of_shard(found: TableStatus | None) -> dict[str, Any]:
    """A table as one of its owners sees it; null where that shard says nothing of it."""
    keys = (
        "version",
        "updates_applied",
        "updates_held",
        "lookups",
        "lost_pages",
        "num_bytes",
        "shared_bytes",
        "epoch",
        "frozen",
        "load",
    )
    pins = None if found is None else [asdict(pin) for pin in found.pins]
    return {key: None if found is None else getattr(found, key) for key in keys} | {"pins": pins}


def _change(change: FieldChange) -> dict[str, Any]:
    return {"field": change.field, "before": _plain(change.before), "after": _plain(change.after)}


def _plain(value: object) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
