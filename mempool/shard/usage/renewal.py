"""Slots that begin anew: their values are written, and what training has left beside them is as of new ones."""

from torch import Tensor

from mempool.errors import InvalidRequest, StepConflict
from mempool.shard.bounds import shown
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.named_arrays import LAST_STEP, VALUES
from mempool.shard.pages.storage import Storage
from mempool.types import WriteRowsRequest


def check_fresh(table: HostedTable, array: str) -> None:
    """Whether slots may begin anew now.

    Raises:
        InvalidRequest: Other rows than values are written.
        StepConflict: A step is undecided here: what it has of such a slot is a gradient of the value that was.
    """
    if array != VALUES:
        raise InvalidRequest(f"rows of {shown(array)} cannot be fresh: write {VALUES!r} so. Nothing was changed.")
    table.updates.expire()
    held = next(table.updates.prepared(), None)
    step_id = held.step_id if held is not None else next((step for step, _, _ in table.updates.all_held()), None)
    if step_id is not None:
        raise StepConflict(
            f"table {table.view.schema.name!r}: step {step_id.step} of rank {step_id.rank} of group "
            f"{shown(step_id.group)} is undecided, and slots cannot begin anew under it; commit or discard it first, "
            "on all ranks, or wait until its lease has ended. This shard has changed nothing."
        )


def written(table: Storage, request: WriteRowsRequest, ids_M: Tensor, rows_MW: Tensor) -> None:
    """Do a write that is due. ids_M, rows_MW: As they were checked."""
    table.write(request.array, ids_M, rows_MW)
    if not request.fresh:
        return
    for lane in table.lanes:
        arena = lane.arena
        rows = arena.locate(ids_M)[1]
        with arena.writing(rows):
            for array in arena.arrays:
                if array.initial is not None and array.name != LAST_STEP:  # which ``write`` has brought up
                    arena.rows(array.name)[rows] = array.initial
