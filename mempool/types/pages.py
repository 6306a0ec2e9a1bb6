"""Values of the ``PageHost`` protocol: tables coming and going on a shard, pages moving between shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mempool.types.pool import ShardInfo, TableView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What was applied to a table's pages. It is part of their state and moves with them.

    Attributes:
        version: Table version: commits applied since the table was made.
        updates_applied: Updates applied since the table was made.
        entries: (group, rank) -> its highest applied step.
        step_offset: The optimizer's step count less the version: 0 where it was never set.
    """

    version: int = 0
    updates_applied: int = 0
    entries: Mapping[tuple[str, int], int] = field(default_factory=dict)
    step_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachTable:
    """Make a table known to a shard. Idempotent for the same table_id and epoch.

    Attributes:
        mode: "initialise": give the pages this shard owns in the view their initial values; "empty": it owns none yet
            and will pull them; "lost": it owned pages and has them no more: they answer DataLoss.
        ledger: Where the table's history stands; None for a new table.
    """

    view: TableView
    mode: Literal["initialise", "empty", "lost"]
    ledger: Ledger | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportPages:
    """Read pages whole. row_pages [M] int64: logical row pages, of each the pages of ``blocks``; plus key pages."""

    table_id: int
    row_pages: npt.NDArray[np.int64]
    blocks: tuple[int, ...]
    key_pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageBatch:
    """Pages with everything they hold.

    Attributes:
        arrays: Named arrays of the row pages: per element [M * page_slots, W of blocks] (uint8 codes for one-byte
            values), row-wise state and scales [M * page_slots, len(blocks)], flat "keys" [M * page_slots, key_dim]
            where block 0 is among the blocks; and "head_keys" [len(key_pages), 2, n, key_dim / 2] for key pages.
        version: The table's version at the shard that exported them.
    """

    table_id: int
    row_pages: npt.NDArray[np.int64]
    blocks: tuple[int, ...]
    key_pages: tuple[int, ...]
    arrays: Mapping[str, Tensor]
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLedger:
    """Read entries of a table's ledger from the ``first``-th on (0-based), as many as travel in one message."""

    table_id: int
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerPart:
    """Entries of a ledger, in its order. All parts of one reading have the same version and num_entries.

    Attributes:
        version: As in ``Ledger``.
        updates_applied: As in ``Ledger``.
        num_entries: Of the whole ledger.
        entries: Of this part; none where ``first`` is beyond the last.
        step_offset: As in ``Ledger``.
    """

    version: int
    updates_applied: int
    num_entries: int
    entries: Mapping[tuple[str, int], int]
    step_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PullPages:
    """Fetch pages from their present owner and stage them; they answer nothing until a view that says so is set."""

    table_id: int
    source: ShardInfo
    row_pages: npt.NDArray[np.int64]
    blocks: tuple[int, ...]
    key_pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What a pull brought."""

    pages: int
    num_bytes: int
