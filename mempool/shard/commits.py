"""Preparing, applying and discarding a rank's step on one table.

The order of arithmetic is the canonical one, (rank, sequence, bag, pair), whatever the order of arrival. Everything is
checked before the first row is written.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from mempool import kernels
from mempool.errors import DataLoss, StepConflict
from mempool.kernels import SortedPairs
from mempool.shard.held import AppliedLedger, HeldUpdates, Pairs, PreparedStep, Reduction, in_canonical_order
from mempool.shard.optimizers import optimizer_step, state_arrays
from mempool.shard.table import Lane, Table
from mempool.types import CommitRequest, PrepareRequest, StepId

_KEPT_BYTES = 256 * 2**20
"""Sums that Prepare makes for the norm are kept for the commit up to this size; larger ones are made again, in one pass
with the optimizer, which gives the same bits."""


def missing(updates: HeldUpdates, step_id: StepId, sequences: Sequence[int]) -> tuple[int, ...]:
    """Those of ``sequences`` that are not held for that step, ascending."""
    return tuple(sequence for sequence in sorted(sequences) if updates.get(step_id, sequence) is None)


def prepare(table: Table, updates: HeldUpdates, request: PrepareRequest) -> PreparedStep:
    """Prepare a step of which nothing is missing; a repeat answers what was found the first time.

    Raises:
        StepConflict: A later step of the rank is prepared already.
    """
    step_id, sequences = request.step_id, tuple(sorted(request.sequences))
    known = updates.prepared_step(step_id)
    _refuse_older(known, step_id)
    if known is not None and known.is_of(step_id, sequences) and known.want_norm >= request.want_norm:
        return known
    norm = _Norm()
    reductions = _reduce(table, _pairs(table, updates, step_id, sequences), norm) if request.want_norm else None
    prepared = PreparedStep(
        step=step_id.step,
        sequences=sequences,
        want_norm=request.want_norm,
        squared_norm=norm.squared,
        finite=norm.finite,
        reductions=reductions,
    )
    updates.set_prepared(step_id, prepared)
    return prepared


def commit(table: Table, updates: HeldUpdates, ledger: AppliedLedger, request: CommitRequest) -> None:
    """Apply a step of which nothing is missing, in place.

    Raises:
        StepConflict: The step was not prepared, or with other updates. Nothing was changed.
        DataLoss: A kernel failed when rows may have been written to: what the table holds is not known any more.
    """
    step_id, sequences = request.step_id, tuple(sorted(request.sequences))
    prepared = updates.prepared_step(step_id)
    if request.one_phase:
        _refuse_older(prepared, step_id)
    elif prepared is None or prepared.step != step_id.step:
        raise StepConflict(
            f"step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} is not prepared here; send Prepare "
            "first (one_phase does both where a table has one owner)"
        )
    elif prepared.sequences != sequences:
        raise StepConflict(
            f"step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} was prepared with updates "
            f"{_shown(prepared.sequences)} and is to be committed with {_shown(sequences)}; prepare it again"
        )
    kept = prepared.reductions if prepared is not None and prepared.is_of(step_id, sequences) else None
    step = optimizer_step(table.schema, lr=request.lr, grad_scale=request.grad_scale, version=ledger.version + 1)
    if kept is not None:
        writes = _writes_of_sums(table, kept, step)
    else:
        writes = _writes_of_pairs(table, updates, step_id, sequences, step)
    try:
        for write in writes:
            write()
    except Exception as error:
        table.lose_all()
        raise DataLoss(
            f"step {step_id.step} of group {step_id.group!r} failed half way on table {table.schema.name!r} "
            f"({type(error).__name__}: {error}): its pages on this shard are not usable any more; drop the table and "
            "make it anew"
        ) from error
    ledger.add(step_id, sequences)
    updates.decided(step_id)


def _pairs(table: Table, updates: HeldUpdates, step_id: StepId, sequences: Sequence[int]) -> Pairs:
    held = [update for sequence in sequences if (update := updates.get(step_id, sequence)) is not None]
    return in_canonical_order(held, width=table.schema.width(table.blocks), device=table.device)


class _Norm:
    """The squared norm so far, and whether every number of it was finite."""

    def __init__(self) -> None:
        self.squared = 0.0
        self.finite = True

    def add(self, sums: Tensor) -> None:
        part, finite = kernels.squared_norm(sums)
        self.squared += part
        self.finite = self.finite and finite and math.isfinite(self.squared)


def _reduce(table: Table, pairs: Pairs, norm: _Norm) -> tuple[Reduction, ...] | None:
    """Sum per row and add to the norm. The sums are answered where they are small enough to be kept for the commit."""
    reductions, kept_bytes = [], 0
    for lane in _touched(table, pairs):
        in_order = kernels.sort_pairs(lane.arena.paged(), pairs.ids)
        grads = lane.of(pairs.grads)
        kept_bytes += in_order.rows.shape[0] * grads.shape[1] * grads.element_size()
        for part in [in_order] if kept_bytes <= _KEPT_BYTES else _parts(in_order, grads.shape[1]):
            sums = kernels.segment_sum(part, pairs.weights, pairs.bags, grads)
            norm.add(sums)
            if kept_bytes <= _KEPT_BYTES:
                reductions.append(Reduction(lane, part, sums))
    return tuple(reductions) if kept_bytes <= _KEPT_BYTES else None


def _parts(pairs: SortedPairs, width: int) -> Iterator[SortedPairs]:
    """Cut sorted pairs by rows, so that the sums of a part stay small."""
    num_rows = pairs.rows.shape[0]
    step = max(1, _KEPT_BYTES // (4 * width))
    for first in range(0, num_rows, step):
        starts = pairs.starts[first : min(first + step, num_rows) + 1]
        order = pairs.order[int(starts[0]) : int(starts[-1])]
        yield SortedPairs(order=order, rows=pairs.rows[first : first + step], starts=starts - starts[0])


def _writes_of_sums(
    table: Table, reductions: tuple[Reduction, ...], step: kernels.OptimizerStep
) -> list[Callable[[], None]]:
    """Per arena, the call that applies sums kept by Prepare."""
    names = _state_names(table)
    return [
        partial(
            kernels.optimizer_step,
            reduction.lane.arena.paged(),
            reduction.lane.arena.state(names),
            reduction.pairs.rows,
            reduction.sums,
            step,
        )
        for reduction in reductions
    ]


def _writes_of_pairs(
    table: Table, updates: HeldUpdates, step_id: StepId, sequences: Sequence[int], step: kernels.OptimizerStep
) -> list[Callable[[], None]]:
    """Per arena, the call that sums and applies in one pass. Sorting, which needs memory, is done before all."""
    names, pairs = _state_names(table), _pairs(table, updates, step_id, sequences)
    writes: list[Callable[[], None]] = []
    for lane in _touched(table, pairs):
        paged, state = lane.arena.paged(), lane.arena.state(names)
        in_order = kernels.sort_pairs(paged, pairs.ids)
        grads = lane.of(pairs.grads)
        writes.append(partial(kernels.fused_step, paged, state, in_order, pairs.weights, pairs.bags, grads, step))
    return writes


def _touched(table: Table, pairs: Pairs) -> tuple[Lane, ...]:
    """The arenas a step may write to: none where it has no pairs, as on a shard none of whose pages were looked up."""
    return table.lanes if pairs.ids.numel() else ()


def _state_names(table: Table) -> tuple[str, ...]:
    return tuple(array.name for array in state_arrays(table.schema.optimizer))


def _refuse_older(prepared: PreparedStep | None, step_id: StepId) -> None:
    """A late message about an older step must not undo what is prepared."""
    if prepared is not None and prepared.step > step_id.step:
        raise StepConflict(
            f"step {prepared.step} of rank {step_id.rank} of group {step_id.group!r} is prepared here already; "
            f"step {step_id.step} is older and cannot be decided any more"
        )


def _shown(sequences: tuple[int, ...]) -> str:
    return f"{list(sequences[:8])}{' ...' if len(sequences) > 8 else ''}"
