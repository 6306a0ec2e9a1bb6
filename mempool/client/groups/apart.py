"""A group whose ranks are trainers each by itself: async, or bounded, where none runs far ahead of the slowest."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mempool.client.groups.member import Member
from mempool.client.training.commitment import Commitment, Prepared
from mempool.client.training.coordinator import Coordinator

if TYPE_CHECKING:
    from mempool.client.training.session import Session


class ApartGroup:
    """This client as a rank of an async or bounded group (``Stepping``).

    Args:
        coordinator: Its steps.

    Attributes:
        member: Who it is; set before anything else.
    """

    member: Member

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._meeting = asyncio.Lock()

    @property
    def place(self) -> tuple[int, int]:
        return self.member.steps, self.member.generation

    @property
    def steps_together(self) -> bool:
        return self.counts_steps  # also with nothing pending

    @property
    def counts_steps(self) -> bool:
        return self.member.joining.terms.consistency == "bounded"

    @property
    def waits(self) -> bool:
        return False  # nobody but itself

    def adopt(self, session: Session) -> None:
        joining = self.member.joining
        session.rejoin(group=joining.group, rank=joining.rank, generation=self.member.generation)

    async def prepare(
        self, sessions: list[Session], *, want_norm: bool, norm_order: float, timeout_s: float | None
    ) -> list[Prepared | None]:
        return await self._coordinator.prepare_own(
            sessions, want_norm=want_norm, norm_order=norm_order, timeout_s=timeout_s
        )

    async def commit(self, commitments: list[Commitment], *, timeout_s: float | None) -> list[int]:
        member = self.member
        async with self._meeting:
            if member.joining.terms.consistency == "bounded":
                await member.arrive(member.offer())
            counts = await self._coordinator.commit_own(commitments, timeout_s=timeout_s)
            member.steps += 1
            member.meeting = member.steps + 1
            return counts

    async def discard(self, sessions: list[Session], *, timeout_s: float | None) -> list[int]:
        return await self._coordinator.discard_own(sessions, timeout_s=timeout_s)

    async def refresh(self) -> None:
        """Generations are each rank's own: there is nothing to hear."""

    async def changed(self, generation: int) -> None:
        """As ``refresh``."""

    async def leave(self) -> None:
        await self.member.leave()
