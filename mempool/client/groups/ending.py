"""What became of steps of a group that nobody heard the end of, asked at tables' gates; after that they never change.

A Commit that names no updates is a question. That of the last step that there is is always refused, which ends the
generation at that gate: whatever of it, and of older ones, was not decided by then is not decided any more, whichever
number it has, though its trainer stood still meanwhile and goes on. So it comes first, then what became of a step.
"""

from contextlib import suppress

from mempool.agreement.step_events import Part
from mempool.client.groups.member import Member
from mempool.client.routing.router import Router
from mempool.client.routing.together import Together
from mempool.errors import DataLoss, NotFound, StepConflict
from mempool.types import PoolApi, StepId
from mempool.types.groups.meeting import Undecided

LAST_STEP = 2**53 - 1
"""Above any that is committed."""


async def became_decided(router: Router, table_id: int, step_id: StepId) -> bool:
    """Whether that step, or a later one of its generation, is decided on a table; if not, none ever is: of a table that
    was dropped, or has lost pages, nobody can say.

    Raises:
        MempoolError: As the router's; nothing is known then.
    """
    try:
        await end_generation(router, table_id, step_id)
        return await _asked(router, table_id, step_id)
    except (NotFound, DataLoss):  # a rank that waited for its answer would keep its group from going on
        return False


async def end_generation(router: Router, table_id: int, step_id: StepId) -> None:
    """Nothing of the step's generation, or of one before, is decided on a table from here on. Raises as above."""
    last = StepId(group=step_id.group, rank=step_id.rank, step=LAST_STEP, generation=step_id.generation)
    await _asked(router, table_id, last)


async def end_before(member: Member, router: Router, api: PoolApi) -> bool:
    """Before a process that has joined says anything else: what its group's earlier generations have not decided on any
    table never is. One of their trainers may stand still with all prepared and nobody left who has asked what of.

    Returns:
        Whether the step that ranks had arrived to commit is decided, which none of them has lived to say.
    """
    joining, decided = member.joining, False
    rank = 0 if joining.terms.consistency == "sync" else joining.rank
    views = await api.tables()
    for view in views:
        table_id = view.schema.table_id
        router.adopt(view)
        with suppress(NotFound, DataLoss):  # no step of it is decided any more
            before = StepId(group=joining.group, rank=rank, step=LAST_STEP, generation=member.generation - 1)
            await end_generation(router, table_id, before)
            number = _number(member.undecided, table_id)
            if number and member.undecided is not None:
                step_id = StepId(group=joining.group, rank=rank, step=number, generation=member.undecided.generation)
                decided = await _asked(router, table_id, step_id) or decided
    return decided


def _number(undecided: Undecided | None, table_id: int) -> int:
    return 0 if undecided is None else next((each.step for each in undecided.parts if each.table_id == table_id), 0)


async def _asked(router: Router, table_id: int, step_id: StepId) -> bool:
    async def ask(together: Together) -> bool:
        gate = together.owners[0].shards[0]
        part = Part(table_id=table_id, step_id=step_id, sequences=())
        try:
            reply = await together.commit(gate, (part,), one_phase=False)
        except StepConflict:
            return False
        return reply.parts[0].version > 0

    return await router.together([table_id], ask)
