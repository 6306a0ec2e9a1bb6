"""Records of a shard's journal, as values.

A record is a change of what the shard has, not a request: replaying it asks no clock and no other shard. What a record
does is ``replay``'s, its bytes are ``encoding``'s: a shard that keeps nothing needs neither.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import Tensor

from mempool.shard.steps.held import HeldUpdate
from mempool.types import (
    AttachTable,
    DecidedStep,
    Ledger,
    PageBatch,
    PrepareRequest,
    StepCountRequest,
    StepId,
    TableView,
    WriteRowsRequest,
)


@dataclass(frozen=True, slots=True)
class Begun:
    """A life of the shard begins."""

    incarnation: int


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """A table was attached, or confirmed."""

    request: AttachTable


@dataclass(frozen=True, slots=True)
class Dropped:
    """A table was dropped for good."""

    table_id: int


@dataclass(frozen=True, slots=True, eq=False)
class Viewed:
    """A view was adopted."""

    view: TableView


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """An update is held."""

    table_id: int
    step_id: StepId
    sequence: int
    update: HeldUpdate


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step is prepared: what its Prepare said."""

    request: PrepareRequest


@dataclass(frozen=True, slots=True)
class Decided:
    """A step got its versions: its parts, the first of them of the table that decided it."""

    steps: tuple[DecidedStep, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """A step was applied, with these sequences; others: its parts at other tables, of which this table is the first."""

    step: DecidedStep
    others: tuple[DecidedStep, ...] = ()


@dataclass(frozen=True, slots=True)
class Over:
    """A step that was not applied never will be."""

    table_id: int
    step_id: StepId


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """Rows were written."""

    request: WriteRowsRequest


@dataclass(frozen=True, slots=True)
class Counted:
    """The step count was set."""

    request: StepCountRequest


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """Pages of a move's round have come."""

    token: str
    batch: PageBatch


@dataclass(frozen=True, slots=True, eq=False)
class StagedLedger:
    """The ledger of such pages; decisions: of a gate, where this shard is to be that instead."""

    table_id: int
    token: str
    ledger: Ledger
    decisions: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """In a snapshot: the newest steps of a table that are applied."""

    steps: tuple[DecidedStep, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """In a snapshot: what slots without a gradient do in the steps of a dense optimizer, as ``DenseSchedule`` has it.

    steps: [3, T] float32; log_decays: [T + 1] float64.
    """

    table_id: int
    first_step: int
    steps: Tensor
    log_decays: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CaughtUp:
    """Slots [M] were brought up to a dense optimizer's last step for a reader, which commits do themselves."""

    table_id: int
    slots: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """Pages of a checkpoint have come, for a table that was attached to be filled from it; None: all have."""

    table_id: int
    batch: PageBatch | None


@dataclass(frozen=True, slots=True)
class Stopped:
    """Slots that a dense optimizer has left behind stop at that step on their way to later ones: a checkpoint has them
    as they are there."""

    table_id: int
    step: int


@dataclass(frozen=True, slots=True)
class Unstaged:
    """What was staged for a round of a move was dropped: the round is over, undecided."""

    table_id: int


@dataclass(frozen=True, slots=True)
class Gone:
    """In a snapshot: a step that was decided as a dropped table's own, and its parts at other tables."""

    table_id: int
    step_id: StepId
    others: tuple[DecidedStep, ...]


@dataclass(frozen=True, slots=True)
class Forked:
    """A table that was attached to be a fork of another one became what that was."""

    table_id: int
    base_id: int


RecordOf: TypeAlias = (
    Begun
    | Attached
    | Dropped
    | Viewed
    | Held
    | Prepared
    | Decided
    | Applied
    | Over
    | Written
    | Counted
    | Staged
    | StagedLedger
    | Kept
    | Schedule
    | CaughtUp
    | Restored
    | Stopped
    | Unstaged
    | Gone
    | Forked
)

KINDS: Final[tuple[type[RecordOf], ...]] = (
    Begun,
    Attached,
    Dropped,
    Viewed,
    Held,
    Prepared,
    Decided,
    Applied,
    Over,
    Written,
    Counted,
    Staged,
    StagedLedger,
    Kept,
    Schedule,
    CaughtUp,
    Restored,
    Stopped,
    Unstaged,
    Gone,
    Forked,
)
"""A record's number is its place, from 1: it never changes."""
