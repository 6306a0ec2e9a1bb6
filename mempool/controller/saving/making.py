"""Tables that are being made: what is known of each, where its pages come from, and how far it is. Values alone."""

import asyncio
from dataclasses import dataclass, field

from mempool.controller.saving.forking import Fork
from mempool.errors import MempoolError
from mempool.types import (
    AttachTable,
    Ledger,
    ShardFill,
    TableCreation,
    TableSchema,
    TableSource,
    TableStatus,
    TableView,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the pages of a table that is restored come from.

    Attributes:
        source: The checkpoint's table.
        ledger: Where its history stood.
        replace: It takes the place of a table of its name.
        newest_id: Unless that one's id is higher: it was made since this was asked for. 0: whatever its id is.
    """

    source: TableSource
    ledger: Ledger
    replace: bool = False
    newest_id: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Making:
    """A table that is being made.

    Attributes:
        schema: As it was asked for, table_id 0.
        origin: The checkpoint that its pages are read from, or the table that it is a fork of; None: they get initial
            values.
        table_id: The id that it will have.
        first_id: The one that it was begun with, by which a caller may know it: later tables were heard of since.
        task: Makes it.
        view: Where its pages will be, once that is planned; until then it waits for its turn.
        bytes_of: Bytes that each owner has to fill.
        prepares: Shards only get ready to fork it: whoever changes the pool does not wait for that.
        asked: A shard was asked to let it answer: it may be made.
        ended: Why it is to end, where somebody ends it.
    """

    schema: TableSchema
    table_id: int
    origin: "Origin | Fork | None" = None
    first_id: int = 0
    task: "asyncio.Task[TableView] | None" = None
    view: TableView | None = None
    bytes_of: dict[int, int] = field(default_factory=dict)
    prepares: bool = False
    asked: bool = False
    ended: MempoolError | None = None
    began_s: float


def attached(view: TableView, origin: Origin | None) -> AttachTable:
    """What a shard is told of a table whose pages it fills: with their initial values, or from elsewhere."""
    if origin is None:
        return AttachTable(view=view, mode="initialise", pending=True)
    return AttachTable(view=view, mode="restore", pending=True, ledger=origin.ledger, source=origin.source)


def creation(making: Making, seen: dict[tuple[int, int], TableStatus], now: float, change: str) -> TableCreation:
    """How far it is, of what shards say of it; change: what it waits for until it has its turn."""
    table_id = making.table_id
    tables = {shard: seen.get((table_id, shard)) for shard in sorted(making.bytes_of)}
    return TableCreation(
        table=making.schema.name,
        table_id=table_id,
        waiting_for=change if making.view is None else _preparing(tables),
        spent_s=now - making.began_s,
        shards=tuple(
            # A shard that says nothing of it has not begun.
            ShardFill(
                shard=shard,
                bytes_done=0 if table is None else max(0, making.bytes_of[shard] - table.bytes_to_fill),
                bytes_total=making.bytes_of[shard],
            )
            for shard, table in tables.items()
        ),
    )


def _preparing(tables: dict[int, TableStatus | None]) -> str:
    preparing = (f"{table.preparing} on shard {shard}" for shard, table in tables.items() if table and table.preparing)
    return next(preparing, "")
