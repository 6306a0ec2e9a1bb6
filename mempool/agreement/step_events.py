"""What a trainer's step hears, and what it says to do: the events and actions of ``step``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mempool.errors import MempoolError, StepConflict
from mempool.types import CommittedPart, PreparedPart, StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """Who owns a table under one view of it.

    Attributes:
        shards: Those that own anything, ascending; the first is the table's gate.
        holders: Those of them that own rows, and so are sent updates.
        view: Equal where nothing has changed: the placement's epoch and the shards' incarnations.
    """

    table_id: int
    shards: tuple[int, ...]
    holders: frozenset[int]
    view: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One table's part in a message. lr, grad_scale, version: in Commits alone."""

    table_id: int
    step_id: StepId
    sequences: tuple[int, ...]
    lr: float = 0.0
    grad_scale: float = 1.0
    version: int = 0


Parts: TypeAlias = tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Send Prepare to these shards, side by side. wait: answered once the table is not held off any more; attempt:
    which of the step's Prepares it is."""

    to: Mapping[int, Parts]
    want_norm: bool
    decider: Part
    attempt: int
    wait: bool = False
    norm_order: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SendAgain:
    """Send updates again. missing: by table, then shard: sequences."""

    missing: Mapping[int, Mapping[int, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndPrepare:
    """Discard at these shards, side by side; the updates stay. attempt: the newest Prepare that is ended."""

    to: Mapping[int, Parts]
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Send the Commit to the decider. Say ``CommitSent`` before."""

    shard: int
    parts: Parts
    one_phase: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Send the decided Commit to these shards, side by side; one that is away must not hold up the others."""

    to: Mapping[int, Parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Renumber:
    """The step's numbers are over: give it new ones, and say ``Renumbered``. past: So many more are left out, as others
    may be over, too."""

    past: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledge:
    """This table's part was applied, whatever becomes of the others': it is a decided step of its own from now on. Say
    ``Gone``, and ``Placed`` for the others."""

    table_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """It cannot go on."""

    error: MempoolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The goal is reached."""


Action = Prepare | SendAgain | EndPrepare | Commit | Apply | Renumber | Acknowledge | Fail | Reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Somebody begins, or goes on, to carry the step out: rounds are counted from here."""

    want_norm: bool = False
    norm_order: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where the tables' pages are, as is known now."""

    owners: tuple[Owners, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The trainer has decided to commit: (lr, grad_scale) by table. Without effect once a Commit was sent."""

    numbers: Mapping[int, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareAnswered:
    """A shard's answer to a Prepare, a part for each of its parts."""

    shard: int
    parts: Parts
    reply: Sequence[PreparedPart]
    want_norm: bool
    norm_order: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareEnded:
    """A shard has ended its Prepare and kept the updates."""

    shard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SentAgain:
    """All that was missing was sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendRefused:
    """StepConflict, to an update that was sent again: the step was dropped there meanwhile."""

    error: StepConflict


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitSent:
    """From now on the step may be decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAnswered:
    """The decider's answer, a part for each table."""

    shard: int
    reply: Sequence[CommittedPart]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitInvalid:
    """The decider refused the Commit for its numbers: nothing was decided, and all is open again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """StepConflict, to a Prepare or the decider's Commit: nothing is decided, nor ever will be under this number."""

    error: StepConflict


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyAnswered:
    """A shard's answer to a decided Commit."""

    shard: int
    parts: Parts
    reply: Sequence[CommittedPart]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyRefused:
    """StepConflict, to a decided Commit: the shard has forgotten its Prepare."""

    shard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Renumbered:
    """The step goes on under these numbers, by table."""

    step_ids: Mapping[int, StepId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """A table was dropped, is lost, or a step of its own: the step goes on without it. At least one other is left."""

    table_id: int


Event = (
    Begun
    | Placed
    | Decided
    | PrepareAnswered
    | PrepareEnded
    | SentAgain
    | SendRefused
    | CommitSent
    | CommitAnswered
    | CommitInvalid
    | Refused
    | ApplyAnswered
    | ApplyRefused
    | Renumbered
    | Gone
)
