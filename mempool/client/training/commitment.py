"""What is asked and answered of steps: commits of a table's pending updates, and what a prepared step looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mempool.errors import InvalidRequest
from mempool.types import StepId

if TYPE_CHECKING:
    from mempool.client.training.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a prepared step looks like, on one table.

    Attributes:
        updates: How many updates it has.
        squared_norm: Squared norm of the table's reduced gradient; 0.0 if it was not asked for.
        finite: No inf or NaN in the reduced gradient; True if it was not asked for.
        norm: Of the order that was asked for besides; 0.0 if none was.
    """

    updates: int
    squared_norm: float
    finite: bool
    norm: float = 0.0


def together(prepared: Sequence[Prepared | None], *, norm_order: float) -> Prepared | None:
    """Several tables' prepared steps as one; None where nothing is pending on any. norm_order: Of ``norm``, 0: none."""
    parts = [each for each in prepared if each is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    norms = [each.norm for each in parts]
    norm = max(norms)
    if 0.0 < norm < math.inf and math.isfinite(norm_order):
        norm *= sum((each / norm) ** norm_order for each in norms) ** (1.0 / norm_order)
    return Prepared(
        updates=sum(each.updates for each in parts),
        squared_norm=sum(each.squared_norm for each in parts),
        finite=all(each.finite for each in parts),
        norm=norm,
    )


@dataclass(frozen=True, slots=True)
class Commitment:
    """What one table's pending updates are committed with."""

    session: Session
    lr: float
    grad_scale: float = 1.0

    def check(self) -> None:
        """Raises InvalidRequest where lr or grad_scale is no number to step by."""
        if not (math.isfinite(self.lr) and self.lr >= 0.0):
            raise InvalidRequest(f"lr = {self.lr}: a learning rate must be finite and not negative.")
        if not math.isfinite(self.grad_scale):
            raise InvalidRequest(
                f"grad_scale = {self.grad_scale}: must be finite; discard a step whose gradients overflowed."
            )


class Others(Protocol):
    """The other ranks of a sync group, as its leader commits for them."""

    def sequences(self, table_id: int) -> tuple[int, ...]:
        """Their updates on a table, ascending."""

    def own(self, sequence: int) -> bool:
        """Whether an update is one of the leader's own."""

    async def send_again(self, missing: Mapping[int, tuple[StepId, tuple[int, ...]]]) -> None:
        """Have them send these updates, by table, under that step, and wait until they have."""


class Stepping(Protocol):
    """A group that this client has joined: what its calls mean then."""

    async def prepare(
        self, sessions: list[Session], *, want_norm: bool, norm_order: float, timeout_s: float | None
    ) -> list[Prepared | None]: ...

    async def commit(self, commitments: list[Commitment], *, timeout_s: float | None) -> list[int]: ...

    async def discard(self, sessions: list[Session], *, timeout_s: float | None) -> list[int]: ...

    async def refresh(self) -> None:
        """Hear whether the group has begun a generation, and go on in that."""

    def adopt(self, session: Session) -> None:
        """One more table."""

    @property
    def place(self) -> tuple[int, int]:
        """Steps that this rank has seen committed, and the generation in which it is."""

    @property
    def steps_together(self) -> bool:
        """Whether all ranks commit as one: also those that have nothing pending."""

    @property
    def counts_steps(self) -> bool:
        """Whether others wait for the number of this rank's steps: also of those that it skips by itself."""

    @property
    def waits(self) -> bool:
        """Whether others may still commit what this rank has come with in a call that was cut off."""

    async def leave(self) -> None:
        """Say that this rank comes no more."""
