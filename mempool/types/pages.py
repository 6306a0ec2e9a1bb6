"""Values of the ``PageHost`` protocol: tables coming and going on a shard, pages moving between shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mempool.types.messages import StepId
from mempool.types.pool import ShardInfo, TableView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecidedStep:
    """A step that was decided, at one table.

    Attributes:
        version: The table version it makes; 0 where the table's gate has not given it yet.
        lr, grad_scale, sequences: As in ``CommitPart``.
    """

    table_id: int
    version: int
    step_id: StepId
    lr: float
    grad_scale: float
    sequences: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """What became of the steps of one (group, rank).

    Attributes:
        generation: The newest that was heard of.
        step: Its highest applied step of that generation; 0 for none.
        version: The table version that step made.
        dropped: Steps up to this one are over: what was not applied of them never will be.
        others: Where that step was of several tables, this one its first: its parts at the others.
        older: What became of the generation before it that applied anything.
    """

    generation: int = 0
    step: int = 0
    version: int = 0
    dropped: int = 0
    others: tuple[DecidedStep, ...] = ()
    older: LedgerEntry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What was applied to a table's pages. It is part of their state and moves with them.

    Attributes:
        version: Table version: commits applied since the table was made.
        updates_applied: Updates applied since the table was made.
        entries: (group, rank) -> what was applied of it.
        step_offset: The optimizer's step count less the version: 0 where it was never set.
    """

    version: int = 0
    updates_applied: int = 0
    entries: Mapping[tuple[str, int], LedgerEntry] = field(default_factory=dict)
    step_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSource:
    """A table in a checkpoint, or in a file.

    Attributes:
        url: The place: an absolute path, or a URL.
        checkpoint: The checkpoint's name there; "": the url is a file with one table's rows.
        table: The table's name in it; of a file, the name of the values, "": as they are found.
        keys: Of a file, the name of the keys; "": those beside the values, where there are any.
    """

    url: str
    checkpoint: str
    table: str
    keys: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkTable:
    """Keep a frozen table's pages as they are at this version, for a checkpoint, whatever is trained from then on.

    A mark is over when it is released, when its lease ends, when another one is made, or when pages move.

    Attributes:
        token: The round that holds the table frozen; it names the mark, too.
        version: At which the table stands still, as its gate has said.
        lease_s: Seconds until it is over by itself, unless ``WritePart`` asks for it.
        since: The checkpoint of which pages that did not change are read; "": all are to be written.
    """

    table_id: int
    token: str
    version: int
    lease_s: float
    since: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePart:
    """Write the marked pages of a shard into a checkpoint, or hear how far that is. A repeat joins in.

    Attributes:
        token: The mark.
        url: The place: an absolute path that is the same on all nodes, or a URL.
        checkpoint: The checkpoint's name.
        since_version: The table's version in the checkpoint that the mark was made with.
        wait_s: Answer after so many seconds, or when it is done.
    """

    table_id: int
    token: str
    url: str
    checkpoint: str
    since_version: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PartProgress:
    """How far the writing of a part is.

    Attributes:
        bytes_done, bytes_total: Of pages.
        updates_applied: As in ``Ledger``, at the mark.
        part: What was written, for whoever commits the checkpoint; empty until all is.
    """

    bytes_done: int
    bytes_total: int
    updates_applied: int = 0
    part: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseMark:
    """A mark is needed no more. No error where there is none.

    kept: The checkpoint that counts now, to which later ones write what changed since; "": none does.
    """

    table_id: int
    token: str
    kept: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageHeat:
    """How much the row pages of a table were read and written by way of one shard lately.

    Attributes:
        heat: [P] float32: pairs of look-ups and updates, about, halved every ten minutes.
        seen: How many pairs that was told by: it is a sample.
    """

    heat: npt.NDArray[np.float32]
    seen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkPoint:
    """The table of which another one is a fork, and when.

    Attributes:
        table_id: The table.
        token: The round that holds it frozen; "": it is not yet.
        version: At which it stands still, as its gate has said.
    """

    table_id: int
    token: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachTable:
    """Make a table known to a shard. Idempotent for the same table_id and epoch.

    Attributes:
        mode: "initialise": give the pages this shard owns in the view their initial values; "empty": it owns none yet
            and will pull them; "lost": it owned pages and has them no more: they answer DataLoss; "confirm": it has
            them, the table was pending and is made: NotFound where it is not here; "restore": read from ``source``;
            "fork": they are to be those of ``fork``, a table that has them here: get ready; "forked": they are those
            from now on, as they are there now: StalePlacement where it is not frozen by that round, at that version.
        ledger: Where the table's history stands; None for a new table.
        pending: The table is being made: it answers no client, and is among no views, until it is confirmed.
        source: Of "restore" alone.
        fork: Of "fork" and "forked"; in a shard's snapshot, the table that it was a fork of when it was made.
        also: Of "confirm" alone: ids of tables that are confirmed with it, all of them or none; at most 8.
    """

    view: TableView
    mode: Literal["initialise", "empty", "lost", "confirm", "restore", "fork", "forked"]
    ledger: Ledger | None = None
    pending: bool = False
    source: TableSource | None = None
    fork: ForkPoint | None = None
    also: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportPages:
    """Read pages whole. row_pages [M] int64: logical row pages, of each the pages of ``blocks``; plus key pages.

    token: The round they are read for; another one is refused.
    """

    table_id: int
    row_pages: npt.NDArray[np.int64]
    blocks: tuple[int, ...]
    key_pages: tuple[int, ...] = ()
    token: str = ""


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

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(rows.nbytes for rows in self.arrays.values())


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
    entries: Mapping[tuple[str, int], LedgerEntry]
    step_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PullPages:
    """Fetch pages from their present owner and stage them; they answer nothing until a view that says so is set.

    One that names no page is sent to a shard that is to be the table's gate: it fetches what the present one decided.

    token: The round; where another one holds the table, or it is over, the pull is refused and nothing is staged.
    """

    table_id: int
    source: ShardInfo
    row_pages: npt.NDArray[np.int64]
    blocks: tuple[int, ...]
    key_pages: tuple[int, ...] = ()
    token: str = ""

    @property
    def of_decisions(self) -> bool:
        """Whether it names no page."""
        return not (len(self.row_pages) or self.key_pages)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What a pull brought."""

    pages: int
    num_bytes: int


StepState = Literal["", "decided", "pending", "dropped"]
"""What is known of a step: it is applied, here or soon; may still be decided; never will be. "": none was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveRequest:
    """A shard in doubt asks what became of steps: a table's gate for its order, a step's decider for its decision.

    Attributes:
        table_id: The table of the order, or the first one of the step.
        after_version: The decisions with higher versions are asked for; None: no order is.
        step_id: The step asked for, as that table counts them; None: no step is.
        give_up: Drop the step for good where it is not decided, unless it is prepared there, not for longer than a
            lease, and its rank's lease has not ended.
        unwanted: Drop it for good where it is not decided: its client has discarded it, or gone on with a later one.
    """

    table_id: int
    after_version: int | None = None
    step_id: StepId | None = None
    give_up: bool = False
    unwanted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveReply:
    """What became of them.

    Attributes:
        version: The table's version at the shard that answers, of what was numbered.
        state: Of the step asked for.
        steps: Its parts, where it is decided; or the order asked for, ascending, as much as is kept: a gap before the
            first was of steps that the asking shard has no part in.
    """

    version: int
    state: StepState = ""
    steps: tuple[DecidedStep, ...] = ()
