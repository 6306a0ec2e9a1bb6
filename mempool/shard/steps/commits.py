"""Preparing, applying and discarding a rank's step on one table.

The order of arithmetic is the canonical one, (rank, sequence, bag, pair), whatever the order of arrival. Everything is
checked before the first row is written. Where a step's pairs fit into the shard's commit memory they are sorted once,
and the sums that Prepare makes for the norm are kept for the commit; else ``parts`` sums them in parts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mempool import kernels
from mempool.agreement.ledger import AppliedLedger
from mempool.agreement.order import NOBODY
from mempool.errors import DataLoss, StepConflict
from mempool.kernels import OptimizerStep, SortedPairs
from mempool.shard.pages.storage import Lane, Storage
from mempool.shard.steps.budget import Budget
from mempool.shard.steps.canonical import Canonical
from mempool.shard.steps.held import (
    KEPT_BYTES,
    HeldUpdate,
    HeldUpdates,
    InOrder,
    Pairs,
    PreparedStep,
    Reduction,
)
from mempool.shard.steps.optimizers import optimizer_step, rounding
from mempool.shard.steps.parts import pairs_bytes, reduce_in_parts, reduce_in_smaller_parts
from mempool.shard.usage.counting import Uses, held_twice
from mempool.types import DecidedStep, ShardInfo, StepId
from mempool.types.norms import joined_norm

# Elements of sums whose norm of an order other than 2 is taken at a time.
_NORM_PIECE = 262_144


def missing(updates: HeldUpdates, step_id: StepId, sequences: Sequence[int]) -> tuple[int, ...]:
    """Those of ``sequences`` that are not held for that step, ascending."""
    return tuple(sequence for sequence in sorted(sequences) if updates.get(step_id, sequence) is None)


def prepare(
    table: Storage,
    updates: HeldUpdates,
    step_id: StepId,
    sequences: Sequence[int],
    *,
    decider: tuple[int, int],
    decider_at: ShardInfo | None = None,
    decided_here: bool = False,
    want_norm: bool = False,
    norm_order: float = 0.0,
    caller: str = "",
) -> PreparedStep:
    """Prepare a step of which nothing is missing; a repeat answers what was found the first time.

    Pairs are sorted, or summed where the norm is wanted, and kept for the commit where they are small enough: once the
    step is decided, there is little left that could fail.

    Raises:
        StepConflict: A later step of the rank is prepared already.
        Overloaded: There is no room to remember that it is prepared.
    """
    in_order = tuple(sorted(sequences))
    known = updates.prepared_step(step_id)
    refuse_older(known, step_id)
    again = known is not None and known.is_of(step_id, in_order) and known.decider == decider
    if again and known is not None and known.answers(want_norm=want_norm, norm_order=norm_order):
        return known
    norm = _Norm(norm_order)
    held = _held(updates, step_id, in_order)
    reductions = _reduce(table, held, norm, updates.budget) if want_norm and held else None
    prepared = PreparedStep(
        step_id=step_id,
        decider=decider,
        decider_at=decider_at,
        decided_here=decided_here,
        sequences=in_order,
        want_norm=want_norm,
        squared_norm=norm.squared,
        finite=norm.finite,
        reductions=reductions,
        sorted=_sorted(table, held, updates.budget) if held and not want_norm else None,
        norm_order=norm_order,
        norm=norm.norm,
    )
    updates.set_prepared(step_id, prepared, caller=caller)
    return prepared


def require_prepared(
    updates: HeldUpdates,
    step_id: StepId,
    sequences: Sequence[int] | None,
    *,
    decider: tuple[int, int] | None = None,
) -> None:
    """Raises StepConflict for a step that is not prepared, or with other updates, or another decider (None: any)."""
    prepared = updates.prepared_step(step_id)
    if prepared is None or prepared.step_id != step_id:
        raise StepConflict(
            f"step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} is not prepared here: its trainer "
            "was not heard of for longer than its lease, or it was never sent; send Prepare first (one_phase does both "
            "where one shard owns everything). Nothing was changed."
        )
    if decider is not None and prepared.decider != decider:
        raise StepConflict(
            f"step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} was prepared as a part of step "
            f"{prepared.decider[1]} of table {prepared.decider[0]}, and is to be committed as one of step {decider[1]} "
            f"of table {decider[0]}; prepare it again. Nothing was changed."
        )
    in_order = prepared.sequences if sequences is None else tuple(sorted(sequences))
    if prepared.sequences != in_order:
        raise StepConflict(
            f"step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} was prepared with updates "
            f"{_shown(prepared.sequences)} and is to be committed with {_shown(in_order)}; prepare it again. Nothing "
            "was changed."
        )


def apply(
    table: Storage,
    updates: HeldUpdates,
    ledger: AppliedLedger,
    decided: DecidedStep,
    *,
    others: tuple[DecidedStep, ...] = (),
) -> None:
    """Apply a step that was decided, in place, with the updates of it that are here.

    Raises:
        DataLoss: A kernel failed when rows may have been written to: what the table holds is not known any more.
        Exception: What failed before the first row was written, as it was. Nothing was changed.
    """
    step_id = decided.step_id
    prepared = updates.prepared_step(step_id)
    if prepared is not None and prepared.step != step_id.step:
        prepared = None
    sequences = prepared.sequences if prepared is not None else tuple(sorted(decided.sequences))
    held = _held(updates, step_id, sequences)
    step = optimizer_step(table.schema, lr=decided.lr, grad_scale=decided.grad_scale, number=ledger.step + 1)
    write_to = partial(_Write, table, step=step, version=ledger.version + 1, twice=held_twice(table, held))
    if prepared is not None and prepared.reductions is not None:
        writes: Iterable[Callable[[], None]] = _writes_of_sums(prepared.reductions, write_to)
    elif prepared is not None and prepared.sorted is not None:
        writes = _writes_in_order(prepared.sorted, write_to)
    elif pairs_bytes(table, held) <= updates.budget.commit_room:
        writes = _writes_in_order(_in_order(table, held) if held else (), write_to)
    else:
        writes = _writes_of_sums(reduce_in_smaller_parts(table, held, updates.budget.commit_room), write_to)
    begun = 0
    try:
        for write in writes:  # which sums what it writes
            begun += 1
            write()
        if table.schedule is not None:
            table.schedule.append(decided.lr, number=step.step)
    except Exception as error:
        # On a GPU memory is taken before the kernel that writes is launched.
        if begun == 0 or (begun == 1 and isinstance(error, torch.OutOfMemoryError)):
            raise
        table.lose_all()
        raise DataLoss(
            f"step {step_id.step} of group {step_id.group!r} failed half way on table {table.schema.name!r} "
            f"({type(error).__name__}: {error}): its pages on this shard are not usable any more; drop the table and "
            "make it anew"
        ) from error
    ledger.add(None if step_id == NOBODY else step_id, sequences, others)
    ledger.log.applied(replace(decided, sequences=sequences), others)
    table.moments.stepped(ledger.version)
    if step_id != NOBODY:
        updates.decided(step_id)


def _held(updates: HeldUpdates, step_id: StepId, sequences: Sequence[int]) -> list[HeldUpdate]:
    held = [updates.get(step_id, sequence) for sequence in sequences]
    return [update for update in held if update is not None and update.bags.ids.numel()]


class _Norm:
    """The squared norm so far, the norm of another order if there is one, and whether every number was finite."""

    def __init__(self, order: float) -> None:
        self.squared = 0.0
        self.finite = True
        self.norm = 0.0
        self._order = order

    def add(self, sums: Tensor) -> None:
        """Sums of rows."""
        self.add_known(sums, *kernels.squared_norm(sums))

    def add_known(self, sums: Tensor, part: float, finite: bool) -> None:
        """Sums of rows whose squared norm is known, and whether they are finite."""
        self.squared += part
        self.finite = self.finite and finite and math.isfinite(self.squared)
        if self._order:
            self.norm = joined_norm([self.norm, *_norms(sums, self._order)], self._order)


def _norms(sums: Tensor, order: float) -> Iterator[float]:
    """Of pieces of ``sums``, which need little memory for it."""
    for piece in torch.split(sums.reshape(-1), _NORM_PIECE) if sums.numel() else ():
        largest = float(torch.linalg.vector_norm(piece, math.inf))
        if order == math.inf or largest == 0.0 or not math.isfinite(largest):
            yield largest
        else:
            yield largest * float(torch.linalg.vector_norm(piece.double() / largest, order))


def _reduce(table: Storage, held: list[HeldUpdate], norm: _Norm, budget: Budget) -> tuple[Reduction, ...] | None:
    """Sum per row and add to the norm. The sums are answered where they are small enough to be kept for the commit."""
    room = budget.commit_room
    rest = room - pairs_bytes(table, held)
    if rest < room // 4:
        for reduction in reduce_in_parts(table, held, room):
            norm.add(reduction.sums)
        return None
    canonical = Canonical.of(held)
    pairs = _joined(canonical, held)
    in_order = [canonical.in_order(lane.arena) for lane in table.lanes]
    kept_bytes = sum(
        (4 * lane.arena.width + 24) * sorted_pairs.rows.shape[0] + KEPT_BYTES
        for lane, sorted_pairs in zip(table.lanes, in_order, strict=True)
    )
    keep = kept_bytes <= min(rest, budget.kept_room)
    reductions = []
    for lane, sorted_pairs in zip(table.lanes, in_order, strict=True):
        grads = lane.of(pairs.grads)
        for part in [sorted_pairs] if keep else _row_parts(sorted_pairs, max(1, rest // (4 * grads.shape[1]))):
            sums, squared, finite = kernels.segment_sum_and_norm(part, pairs.weights, pairs.bags, grads)
            norm.add_known(sums, squared, finite)
            if keep:
                reductions.append(Reduction.of(lane, part, sums))
    return tuple(reductions) if keep else None


def _joined(canonical: Canonical, held: list[HeldUpdate]) -> Pairs:
    return canonical.pairs([update.grads for update in held])


def _row_parts(pairs: SortedPairs, num_rows: int) -> Iterator[SortedPairs]:
    """Cut sorted pairs by rows, so that the sums of a part stay small."""
    for first in range(0, pairs.rows.shape[0], num_rows):
        rows = slice(first, first + num_rows)
        starts = pairs.starts[first : first + num_rows + 1]
        order = pairs.order[int(starts[0]) : int(starts[-1])]
        yield SortedPairs(order=order, rows=pairs.rows[rows], slots=pairs.slots[rows], starts=starts - starts[0])


def _writes_of_sums(
    reductions: Iterable[Reduction], write_to: "Callable[[Lane], _Write]"
) -> Iterator[Callable[[], None]]:
    """Per reduction, the call that applies it."""
    for reduction in reductions:
        yield partial(write_to(reduction.lane).sums, reduction)


def _in_order(table: Storage, held: list[HeldUpdate]) -> tuple[InOrder, ...]:
    """The pairs of updates, sorted for each arena. All that needs memory for it."""
    canonical = Canonical.of(held)
    pairs = _joined(canonical, held)
    return tuple(
        InOrder(
            lane=lane,
            in_order=canonical.in_order(lane.arena),
            pairs=pairs,
            copied=len(held) > 1,
            kept=canonical,
        )
        for lane in table.lanes
    )


def _sorted(table: Storage, held: list[HeldUpdate], budget: Budget) -> tuple[InOrder, ...] | None:
    """Sorted, where that may be kept until the commit."""
    if pairs_bytes(table, held) > budget.commit_room:
        return None
    parts = _in_order(table, held)
    return parts if sum(part.num_bytes for part in parts) <= budget.kept_room else None


def _writes_in_order(parts: Iterable[InOrder], write_to: "Callable[[Lane], _Write]") -> list[Callable[[], None]]:
    """Per arena, the call that sums and applies in one pass."""
    return [
        partial(write_to(part.lane).pairs, part.in_order, part.pairs, part.lane.of(part.pairs.grads)) for part in parts
    ]


class _Write:
    """Applies a step, which makes that version, to rows of one arena. twice: As of ``Uses.of``."""

    def __init__(
        self, table: Storage, lane: Lane, *, step: OptimizerStep, version: int, twice: Sequence[Tensor]
    ) -> None:
        arena = lane.arena
        rounded = rounding(table.schema, arena.blocks, number=step.step, device=table.device)
        self._table = table
        self._arena = arena
        self._step = step if rounded is None else replace(step, rounding=rounded)
        self._version = version
        self._twice = twice

    def sums(self, reduction: Reduction) -> None:
        """Apply sums."""
        pairs = reduction.pairs
        paged, state = self._before(pairs)
        uses = Uses.of(self._arena, pairs, more=reduction.more, twice=self._twice)
        with self._arena.writing(pairs.rows):
            kernels.optimizer_step(paged, state, pairs, reduction.sums, self._step)
            self._after(pairs, uses)

    def pairs(self, in_order: SortedPairs, pairs: Pairs, grads: Tensor) -> None:
        """Sum and apply; grads: the arena's columns."""
        paged, state = self._before(in_order)
        uses = Uses.of(self._arena, in_order, twice=self._twice)
        with self._arena.writing(in_order.rows):
            kernels.fused_step(paged, state, in_order, pairs.weights, pairs.bags, grads, self._step)
            self._after(in_order, uses)

    def _before(self, pairs: SortedPairs) -> tuple[kernels.Paged, dict[str, Tensor]]:
        if self._table.schedule is not None:
            self._arena.catch_up(pairs.rows, self._table.schedule, self._table.step_names)
        return self._arena.paged(), self._arena.state(self._table.step_names)

    def _after(self, pairs: SortedPairs, uses: Uses | None) -> None:
        if self._table.schedule is not None:
            version = self._table.schedule.last_step + 1  # recorded when all rows are written
            self._arena.state((kernels.LAST_STEP,))[kernels.LAST_STEP][pairs.rows] = version
        if uses is not None:
            uses.count(self._version)


def refuse_older(prepared: PreparedStep | None, step_id: StepId) -> None:
    """Raises StepConflict: a late message about an older step must not undo what is prepared."""
    if prepared is not None and prepared.step > step_id.step:
        raise StepConflict(
            f"step {prepared.step} of rank {step_id.rank} of group {step_id.group!r} is prepared here already; "
            f"step {step_id.step} is older and cannot be decided any more"
        )


def _shown(sequences: tuple[int, ...]) -> str:
    return f"{list(sequences[:8])}{' ...' if len(sequences) > 8 else ''}"
