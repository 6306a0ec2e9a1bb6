"""Entering a group, and the group as its user holds it."""

import asyncio
import os
import warnings
from collections.abc import Awaitable, Callable

from mempool.client.groups.apart import ApartGroup
from mempool.client.groups.ending import end_before
from mempool.client.groups.joining import JOIN_VARIABLE, Joining, found
from mempool.client.groups.member import Member
from mempool.client.groups.stepping import SyncGroup
from mempool.client.opening.connection import Connection
from mempool.client.routing.router import Router
from mempool.client.training.coordinator import Coordinator
from mempool.errors import InvalidRequest
from mempool.types import PoolApi


class Group:
    """What ``Pool.join`` answers.

    Attributes:
        name, rank, world_size, consistency: As joined.
    """

    def __init__(self, joining: Joining, member: Member | None, versions: Callable[[], dict[str, int]]) -> None:
        self.name, self.rank = joining.group, joining.rank
        self.world_size, self.consistency = joining.terms.world_size, joining.terms.consistency
        self._member = member
        self._versions = versions

    def __repr__(self) -> str:
        return f"Group({self.name!r}, rank={self.rank}, world_size={self.world_size}, {self.consistency!r})"

    @property
    def step(self) -> int:
        """Steps that the group has committed, as far as its ranks have said: where a rank that comes back goes on."""
        return 0 if self._member is None else self._member.steps

    @property
    def versions(self) -> dict[str, int]:
        """The version of each of the pool's tables, by name, asked for now."""
        return self._versions()


async def enter(joining: Joining, *, coordinator: Coordinator, router: Router, api: PoolApi) -> Member | None:
    """Join: from now on this client's steps are the group's. None for a group of one, which is no group, unless it is
    elastic: it may be what is left of a larger one.

    Raises:
        InvalidRequest: This client has joined a group, or has something pending; or the group is joined under other
            terms.
        AlreadyExists: Another process is this rank, and lives.
        MempoolError: As the home's.
    """
    if coordinator.group is not None:
        raise InvalidRequest(
            "this client has joined a group already: one client is one rank; connect again for another"
        )
    sessions = coordinator.sessions
    await coordinator.applied(sessions)
    for session in sessions:
        if session.book.holds:
            raise InvalidRequest(
                f"table {router.name_of(session.table_id)!r} has {session.pending} updates pending: commit or discard "
                "them, and join before the first backward pass"
            )
    if joining.terms.world_size == 1 and not joining.terms.elastic:
        coordinator.found, coordinator.alone = None, True
        return None
    sync = joining.terms.consistency == "sync"
    group = SyncGroup(coordinator, router) if sync else ApartGroup(coordinator)
    group.member = member = Member(joining, router=router, api=api, changed=group.changed)
    step = await member.join()
    try:
        if await end_before(member, router, api) and member.undecided is not None:
            step = max(step, member.undecided.step)
    except BaseException:
        await member.leave()
        raise
    if joining.step is not None and step != joining.step:
        coordinator.warn(
            f"rank {joining.rank} of group {joining.group!r} says that its model is at step {joining.step}, and the "
            f"group is at step {step}: what it trains from here on is not what the others train. Load the state of step"
            f" {step} (group.step), or restore the pool's tables to where the model is: pool.restore(...)"
        )
    member.steps = step
    if not sync:
        member.meeting = step + 1
    coordinator.found, coordinator.group = None, group
    for session in sessions:
        group.adopt(session)
    return member


def join(joining: Joining, connection: Connection, versions: Callable[[], dict[str, int]]) -> Group:
    """Enter, waiting for it, and say what the user is to know. Raises as ``enter``."""
    if connection.where.embedded and joining.terms.world_size > 1:
        raise InvalidRequest(
            f"{connection.where.pool} is in this process, where no other rank reaches it: start one that all can"
            " connect to (mempool up), or join with world_size=1"
        )
    coordinator = connection.coordinator
    entering = enter(joining, coordinator=coordinator, router=connection.router, api=connection.api)
    member = connection.run_long(entering)
    for notice in coordinator.notices():
        warnings.warn(notice, stacklevel=3)
    return Group(joining, member, versions)


def finder(coordinator: Coordinator, router: Router, api: PoolApi) -> Callable[[], Awaitable[None]]:
    """Joins the group that a launcher has made this process a rank of, where it has, when the first step needs it."""
    one = asyncio.Lock()

    async def join_found() -> None:
        async with one:
            if coordinator.found is None:
                return
            joining = found()
            if joining is None:
                coordinator.alone = os.environ.get(JOIN_VARIABLE) == "0"
                coordinator.found = None
            else:
                await enter(joining, coordinator=coordinator, router=router, api=api)

    return join_found
