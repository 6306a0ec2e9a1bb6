"""What a shard does with steps: prepares, decides, applies and discards them, each whole or not at all.

A step is of several tables; what of it is on this shard comes in one request. All runs on the engine's thread.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from mempool.errors import InvalidRequest, NotFound, StalePlacement, StepConflict
from mempool.observe import Stages
from mempool.shard import bounds
from mempool.shard.durable.records import Decided, Prepared
from mempool.shard.hosted import HostedTable
from mempool.shard.parking import Parked
from mempool.shard.steps import commits
from mempool.shard.steps.held import PreparedStep
from mempool.shard.tenancy import Tenancy
from mempool.shard.work.jobs import Answered
from mempool.types import (
    CommitPart,
    CommitReply,
    CommitRequest,
    CommittedPart,
    DecidedStep,
    DiscardReply,
    DiscardRequest,
    PreparedPart,
    PreparePart,
    PrepareReply,
    PrepareRequest,
    StepId,
)


class Committing:
    """The steps of a shard.

    Args:
        tenancy: The tables.
        stages: Where time is counted.
        asked_s: When the request that is being answered came, on the shard's clock.
    """

    def __init__(self, tenancy: Tenancy, *, stages: Stages, asked_s: Callable[[], float]) -> None:
        self._tenancy = tenancy
        self._stages = stages
        self._asked_s = asked_s

    def prepare(self, request: PrepareRequest, *, caller: str = "") -> PrepareReply | Parked:
        bounds.check_prepare(request)
        tables = self._fenced(request.parts)
        self._tenancy.table(request.decider_table)  # where it was dropped, nobody decides the step any more
        found = []
        for table, part in zip(tables, request.parts, strict=True):
            reply = self._looked_at(table, part, request.attempt)
            if isinstance(reply, Parked):
                return reply
            if reply.missing:
                table.turns.set_back(part.step_id, self._asked_s())
            if reply.held_off:
                table.turns.held_off(part.step_id)
                if request.wait and not table.held_off_for_long(self._asked_s()):
                    return table.park_until_thaw(self._asked_s())
            found.append(reply)
        if any(reply.missing or reply.held_off for reply in found):
            return PrepareReply(parts=tuple(found))
        self._tenancy.log.require()
        decider = request.decider_table, request.decider_step
        begun = []
        try:
            for number, (table, part) in enumerate(zip(tables, request.parts, strict=True)):
                if found[number].applied:
                    continue
                known = table.updates.prepared_step(part.step_id)
                with self._stages.measure("kernel"):
                    step = commits.prepare(
                        table.storage,
                        table.updates,
                        part.step_id,
                        part.sequences,
                        decider=decider,
                        decider_at=self._tenancy.gate_of(request.decider_table),
                        decided_here=self._tenancy.decides(request.decider_table),
                        want_norm=request.want_norm,
                        norm_order=request.norm_order,
                        caller=caller,
                    )
                table.updates.attempted(part.step_id, request.attempt)
                if known is None:
                    begun.append((table, part.step_id))
                found[number] = PreparedPart(
                    stamp=table.stamp,
                    squared_norm=step.squared_norm,
                    finite=step.finite,
                    norm=step.norm if request.norm_order else 0.0,
                )
        except BaseException:
            for table, step_id in begun:
                table.updates.end_prepare(step_id)
                table.steps_changed()
            raise
        if not all(reply.applied for reply in found):
            self._tenancy.log.add(Prepared(request))
        return PrepareReply(parts=tuple(found))

    def _fenced(self, parts: Sequence[PreparePart | CommitPart]) -> list[HostedTable]:
        """The parts' tables. A step that is refused as its pages have moved goes before they move again."""
        try:
            return [self._tenancy.fenced(part.envelope) for part in parts]
        except StalePlacement:
            for part in parts:
                with suppress(NotFound):
                    self._tenancy.table(part.envelope.table_id).turns.set_back(part.step_id, self._asked_s())
            raise

    def _looked_at(self, table: HostedTable, part: PreparePart, attempt: int) -> PreparedPart | Parked:
        """What speaks against preparing a part."""
        table.updates.touch(part.step_id)
        table.require_newest(part.step_id)
        if table.is_decided(part.step_id):
            return PreparedPart(stamp=table.stamp, applied=True)
        if late := table.updates.late(part.step_id, attempt):
            step_id = part.step_id
            raise StepConflict(
                f"Prepare {attempt} of step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} comes "
                f"late: {late}. Nothing was changed."
            )
        if (before := self._before(table, part.step_id)) is not None:
            return table.park_for_steps(before, self._asked_s())
        prepared = table.updates.prepared_step(part.step_id)
        if (table.frozen or table.storage.crowded()) and prepared is None:
            return PreparedPart(stamp=table.stamp, held_off=True)
        return PreparedPart(stamp=table.stamp, missing=commits.missing(table.updates, part.step_id, part.sequences))

    def _before(self, table: HostedTable, step_id: StepId) -> PreparedStep | None:
        """What a trainer had prepared there before that step, in its generation or an older one: it wants that no more,
        but what became of it comes first. None: all of it is settled."""
        decisions, prepared = self._tenancy.decisions, table.updates.prepared_step(step_id)
        if prepared is not None and prepared.step < step_id.step and not decisions.supersede(table, prepared):
            return prepared
        return decisions.supersede_older(table, step_id)

    def commit(self, request: CommitRequest) -> CommitReply | Parked | Answered:
        bounds.check_commit(request)
        tables = self._fenced(request.parts)
        self._tenancy.log.require()
        if request.decided:
            return self._apply(request, tables)
        first, step_id = tables[0], request.parts[0].step_id
        # Of one without updates it is a question: it is answered also of a generation that is over.
        asks = len(tables) == 1 and not request.parts[0].sequences
        if (asks and _known(first, request.parts[0])) or self._decided_version(first, request.parts[0]):
            return _committed(tables, [_known(table, part) for table, part in zip(tables, request.parts, strict=True)])
        if not first.is_gate:
            raise StalePlacement(
                f"shard {first.info.shard} decides no steps of table {first.view.schema.name!r}: shard "
                f"{first.gate} does"
            )
        if (before := self._before(first, step_id)) is not None:
            return first.park_for_steps(before, self._asked_s())
        try:
            for table, part in zip(tables, request.parts, strict=True):
                table.require_newest(part.step_id)
                if table is not first and self._decided_version(table, part):
                    raise _decided_apart(table, part)
            if request.one_phase:
                return self._commit_in_one(request, tables)
            decider = first.table_id, step_id.step
            if (other := self._with_another_decider(first, request.parts[0], decider)) is not None:
                return first.park_for_steps(other, self._asked_s())
            for table, part in zip(tables, request.parts, strict=True):
                if table.owns:  # which updates they are is said to the table's own gate
                    sequences = part.sequences if table.is_gate else None
                    commits.require_prepared(table.updates, part.step_id, sequences, decider=decider)
        except StepConflict as refusal:
            # Its trainer goes on under the next number: a copy of this that comes late must find the step over.
            self._tenancy.decisions.refuse(first, step_id)
            raise StepConflict(
                f"{refusal.message} With that the step is over here, too: commit its updates as a later one."
            ) from refusal
        return self._decide(request, tables)

    def _with_another_decider(
        self, table: HostedTable, part: CommitPart, decider: tuple[int, int]
    ) -> PreparedStep | None:
        """The step, where it is prepared here with a decider that its trainer goes on without, and which may have
        decided it: that comes first."""
        prepared = table.updates.prepared_step(part.step_id)
        if prepared is None or prepared.step_id != part.step_id or prepared.decider == decider:
            return None
        return None if self._tenancy.decisions.supersede(table, prepared) else prepared

    def _commit_in_one(self, request: CommitRequest, tables: list[HostedTable]) -> CommitReply | Parked | Answered:
        """Prepare and commit at once: nobody else has a part in it."""
        for table in tables:
            if not table.owns_all:
                raise InvalidRequest(
                    f"shard {table.info.shard} does not own all pages of table {table.view.schema.name!r}: its steps "
                    "are prepared at every owner first. Nothing was changed."
                )
        for table, part in zip(tables, request.parts, strict=True):
            table.updates.touch(part.step_id)
            if (before := self._before(table, part.step_id)) is not None:
                return table.park_for_steps(before, self._asked_s())
            prepared = table.updates.prepared_step(part.step_id)
            commits.refuse_older(prepared, part.step_id)
            if (table.frozen or table.storage.crowded()) and prepared is None:
                table.turns.held_off(part.step_id)
                return table.park_until_thaw(self._asked_s())
        missing = [
            commits.missing(table.updates, part.step_id, part.sequences)
            for table, part in zip(tables, request.parts, strict=True)
        ]
        if any(missing):
            return CommitReply(
                parts=tuple(
                    CommittedPart(stamp=table.stamp, missing=lacks)
                    for table, lacks in zip(tables, missing, strict=True)
                )
            )
        if len(tables) > 1:  # so that what could fail does before any is decided
            self.prepare(_as_prepare(request))
            for table, part in zip(tables, request.parts, strict=True):
                commits.require_prepared(table.updates, part.step_id, part.sequences)
            return self._decide(request, tables)
        table, part = tables[0], request.parts[0]
        prepared = table.updates.prepared_step(part.step_id)
        if prepared is not None and prepared.sequences != tuple(sorted(part.sequences)):
            table.updates.end_prepare(part.step_id)
        table.apply_decided()
        with self._stages.measure("kernel"):
            table.apply_now(_decision(table, part, version=table.order.applied + 1, sequences=part.sequences))
        return _committed(tables, [table.order.applied])

    def _decide(self, request: CommitRequest, tables: list[HostedTable]) -> Answered:
        """The decision of a step: a version at each table that is numbered here. All of it, or none."""
        for table in tables:
            if table.is_gate:
                table.order.require_room(table.table_id)
        decisions = [_decision(table, part) for table, part in zip(tables, request.parts, strict=True)]
        versions = [
            table.order.number(step).version if table.is_gate else 0
            for table, step in zip(tables, decisions, strict=True)
        ]
        if len(tables) > 1:
            tables[0].others[versions[0]] = tuple(
                replace(step, version=version) for step, version in zip(decisions[1:], versions[1:], strict=True)
            )
        for table, step in zip(tables, decisions, strict=True):
            if not table.is_gate:  # another shard gives its version: who reads it here has to wait for that
                table.updates.decided_unnumbered(step.step_id)
        steps = (replace(step, version=version) for step, version in zip(decisions, versions, strict=True))
        self._tenancy.log.add(Decided(tuple(steps)))  # all of it in one record, and durable before it is said
        # [BARRIER] a group's is made when all its ranks have committed.
        return Answered(_committed(tables, versions), partial(self._apply_all, tables))

    def _apply_all(self, tables: list[HostedTable]) -> None:
        with self._stages.measure("apply"):
            for table in tables:
                table.apply_decided()

    def _apply(self, request: CommitRequest, tables: list[HostedTable]) -> CommitReply | Parked:
        """Apply what was decided elsewhere, each table's part in its turn."""
        versions = []
        for table, part in zip(tables, request.parts, strict=True):
            table.updates.touch(part.step_id)
            versions.append(self._decided_version(table, part))
            if not versions[-1]:
                _check_decided(table, part)
                _check_never_given(table, part, asked_s=self._asked_s())
        for number, (table, part) in enumerate(zip(tables, request.parts, strict=True)):
            if versions[number]:
                continue
            step = _decision(table, part, version=part.version)
            if not part.version:
                table.ledger.log.numbered(numbered := table.order.number(step))
                versions[number] = numbered.version
            else:
                versions[number] = part.version
                if table.order.may_take(part.version):  # else it waits: that it was given at all is a trainer's word
                    table.order.add(step)
        with self._stages.measure("apply"):
            for table in tables:
                table.apply_decided()
        for table, version in zip(tables, versions, strict=True):
            if version > table.order.applied:
                return table.park_for_order(self._asked_s())
        return _committed(tables, versions)

    def _decided_version(self, table: HostedTable, part: CommitPart) -> int:
        """The version of a step that is decided already, else 0. Raises StepConflict where it is over."""
        waiting = table.order.find(part.step_id)
        return waiting.version if waiting is not None else table.ledger.applied(part.step_id)

    def discard(self, request: DiscardRequest) -> DiscardReply | Parked:
        bounds.check_discard(request)
        self._tenancy.log.require()
        # It needs no pages: a trainer goes on with other tables once a step that has lost one is given up everywhere.
        tables = [self._tenancy.fenced(part.envelope, whole=False) for part in request.parts]
        waits = None
        for table, part in zip(tables, request.parts, strict=True):
            # Its Commit may be at the decider, or on its way there: what that says is done.
            if not request.keep_updates and (prepared := table.updates.give_up(part.step_id)) is not None:
                waits = waits or (table, prepared)
        if waits is not None:
            return waits[0].park_for_steps(waits[1], self._asked_s())
        discarded = 0
        for table, part in zip(tables, request.parts, strict=True):
            prepared = table.updates.prepared_step(part.step_id)
            if table.order.find(part.step_id) is not None or (
                prepared is not None
                and prepared.step_id == part.step_id
                and self._tenancy.decisions.is_decided(prepared)
            ):
                continue  # decided: it stays
            if request.keep_updates:
                table.updates.end_attempt(part.step_id, request.attempt)
            else:
                known = table.updates.lives(part.step_id)
                held = table.updates.discard(part.step_id)
                discarded += held
                entry = table.ledger.entry(part.step_id)
                applied = entry.step if entry.generation == part.step_id.generation else 0
                # A Prepare of it that comes late finds it over: but not with it an earlier step that is prepared here,
                # and may be decided.
                undecided = prepared is not None and prepared.step < part.step_id.step
                if (known or held or applied) and applied < part.step_id.step and not undecided:
                    table.ledger.drop(part.step_id)
                table.turns.served(part.step_id)
            table.steps_changed()
        return DiscardReply(discarded=discarded)


def _decision(
    table: HostedTable, part: CommitPart, *, version: int = 0, sequences: tuple[int, ...] = ()
) -> DecidedStep:
    """sequences: where it was not prepared, and so with them."""
    return DecidedStep(
        table_id=table.table_id,
        version=version,
        step_id=part.step_id,
        lr=part.lr,
        grad_scale=part.grad_scale,
        sequences=sequences,
    )


def _check_decided(table: HostedTable, part: CommitPart) -> None:
    """Raises StepConflict where a step said to be decided cannot be, or is known not to be, StalePlacement at a shard
    that does not number it, Overloaded where it cannot wait."""
    if table.owns or part.sequences:
        commits.require_prepared(table.updates, part.step_id, part.sequences)
    if not part.version and not table.is_gate:
        raise StalePlacement(
            f"shard {table.info.shard} gives no versions to steps of table {table.view.schema.name!r}: shard "
            f"{table.gate} does"
        )
    waiting = table.order.at(part.version)
    if part.version and (part.version <= table.order.applied or waiting is not None):
        raise StepConflict(
            f"step {part.step_id.step} of group {part.step_id.group!r} is said to make version {part.version} of table "
            f"{table.view.schema.name!r}, which another step {'has made' if waiting is None else 'makes'}. Nothing was "
            "changed."
        )
    prepared = table.updates.prepared_step(part.step_id)
    numbered_here = bool(part.version) and table.is_gate  # a version that it has not given is refused as that
    if prepared is not None and prepared.step_id == part.step_id and prepared.decided_here and not numbered_here:
        raise StepConflict(
            f"step {part.step_id.step} of group {part.step_id.group!r} is said to be decided: its decider, shard "
            f"{table.info.shard}, has not decided it. Its trainer is ahead of that. Nothing was changed."
        )
    if not part.version:
        table.order.require_room(table.table_id)


def _check_never_given(table: HostedTable, part: CommitPart, *, asked_s: float) -> None:
    """Raises StepConflict where the table's gate knows of no such version: this one, or one that was asked since."""
    heard = table.is_gate or table.order_doubt.covers(asked_s)
    if part.version > table.order.numbered and heard:
        raise StepConflict(
            f"step {part.step_id.step} of group {part.step_id.group!r} is said to make version {part.version} of table "
            f"{table.view.schema.name!r}: its gate, shard {table.gate}, has given {table.order.numbered} versions so "
            "far, and none to that step. Its trainer is ahead of what was decided. Nothing was changed."
        )


def _known(table: HostedTable, part: CommitPart) -> int:
    """The version of a part of a step that is decided, as far as it is known here; else 0."""
    waiting = table.order.find(part.step_id)
    if waiting is not None:
        return waiting.version
    entry = table.ledger.entry_of_its_generation(part.step_id)
    return entry.version if entry is not None and part.step_id.step <= entry.step else 0


def _decided_apart(table: HostedTable, part: CommitPart) -> StepConflict:
    return StepConflict(
        f"step {part.step_id.step} of rank {part.step_id.rank} of group {part.step_id.group!r} is decided on table "
        f"{table.view.schema.name!r} already, and not on the first table of this Commit. Nothing was changed."
    )


def _as_prepare(request: CommitRequest) -> PrepareRequest:
    """What prepares the step of a Commit in one phase."""
    first = request.parts[0]
    return PrepareRequest(
        parts=tuple(
            PreparePart(envelope=part.envelope, step_id=part.step_id, sequences=part.sequences)
            for part in request.parts
        ),
        want_norm=False,
        decider_table=first.envelope.table_id,
        decider_step=first.step_id.step,
    )


def _committed(tables: list[HostedTable], versions: list[int]) -> CommitReply:
    return CommitReply(
        parts=tuple(
            CommittedPart(stamp=table.stamp, version=version) for table, version in zip(tables, versions, strict=True)
        )
    )
