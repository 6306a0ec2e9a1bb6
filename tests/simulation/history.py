"""What was asked, answered and decided in one run, and whether it may be so.

Written down while the run goes on; ``check`` goes over it once, table by table: an oracle is fed with the decided steps
in the order of their versions, and every answer is compared with it, bit for bit, at the version that it names.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.agreement.order import NOBODY
from mempool.errors import DataLoss, Internal, MempoolError
from mempool.types import (
    AttachTable,
    DecidedStep,
    HeartbeatRequest,
    Placement,
    ShardInfo,
    StepId,
    TableSchema,
    TableView,
)
from mempool.wire import methods
from tests.simulation.expected import Sums, rows_of
from tests.simulation.loop import ProcessLoop
from tests.simulation.network import Call, Network
from tests.simulation.oracle import Content, Oracle
from tests.simulation.pinned import Pinned, check_cuts
from tests.simulation.saved import Origin, Saved
from tests.simulation.tables import is_exact
from tests.simulation.writes import Write, check_written

Update = tuple[int, str, int, int]
"""(table id, group, generation, sequence); all ranks are 0."""
READS = (methods.GATHER.path, methods.READ_ROWS.path)


@dataclass(slots=True)
class Decided:
    """A step of one table as its messages say it."""

    step_id: StepId
    lr: float
    grad_scale: float
    sequences: tuple[int, ...]


@dataclass(slots=True)
class Read:
    """An answer to a lookup, or to reading rows."""

    call: Call
    floor: int


@dataclass(slots=True)
class Acknowledged:
    """A commit that its trainer was told of."""

    updates: tuple[Update, ...]
    at_s: float


@dataclass
class History:
    """One run.

    Attributes:
        violations: What may not be, in words.
        schemas: Of every table that there ever was, by id.
        contents: Updates by their number.
        owners: (shard, incarnation) of those that had pages of a table, by table; killed: of those that were killed.
        incarnations: Of the shards that run now, by their processes' names.
        together: What was told as one: [(table id, step), ...] of each commit of several tables.
        saved: The checkpoints that were taken.
        origins: Where tables come from that were restored.
        pinned: By the pin: what was pinned. cuts: What was pinned of several tables at one moment.
        answering: (table id, shard's process) that have the table: whether that was told that it is made.
    """

    violations: list[str] = field(default_factory=list)
    schemas: dict[int, TableSchema] = field(default_factory=dict)
    placements: dict[tuple[int, int], Placement] = field(default_factory=dict)
    contents: dict[Update, Content] = field(default_factory=dict)
    told: dict[tuple[int, StepId], Decided] = field(default_factory=dict)
    decided: dict[tuple[int, int], Decided] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    acknowledged: list[Acknowledged] = field(default_factory=list)
    discarded: set[Update] = field(default_factory=set)
    writes: dict[tuple[int, int], list[Write]] = field(default_factory=lambda: defaultdict(list))
    owners: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    killed: set[tuple[int, int]] = field(default_factory=set)
    hit: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    together: set[tuple[tuple[int, StepId], ...]] = field(default_factory=set)
    answers: list[tuple[int, StepId, int, int]] = field(default_factory=list)
    known: dict[tuple[ProcessLoop, int], int] = field(default_factory=lambda: defaultdict(int))
    floors: dict[int, int] = field(default_factory=dict)
    incarnations: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    saved: Saved = field(default_factory=Saved)
    origins: dict[int, Origin] = field(default_factory=dict)
    answering: dict[tuple[int, str], bool] = field(default_factory=dict)
    pinned: dict[str, Pinned] = field(default_factory=dict)
    cuts: list[Mapping[int, int]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Something that may not be."""
        if len(self.violations) < 20:
            self.violations.append(text)

    def watch(self, network: Network) -> None:
        network.on_sent.append(self._sent)
        network.on_served.append(self._served)
        network.on_answered.append(self._answered)

    # What goes by

    def _sent(self, call: Call) -> None:
        if call.method.path in READS:
            known = self.known[call.process, call.request.envelope.table_id]
            self.floors[call.number] = 0 if call.request.pin else known
        elif call.method.path == methods.COMMIT.path:
            steps = tuple((part.envelope.table_id, part.step_id) for part in call.request.parts)
            if len(steps) > 1 and not call.request.decided:
                self.together.add(steps)
            for part in call.request.parts:
                self._told(part)

    def _told(self, part: Any) -> None:
        key = part.envelope.table_id, part.step_id
        told = Decided(part.step_id, part.lr, part.grad_scale, tuple(sorted(part.sequences)))
        known = self.told.get(key)
        if known is None or not known.sequences:
            self.told[key] = told
        elif told.sequences and known != told and part.version:
            self.say(f"step {key} is told as {told} and as {known}")
        elif told.sequences:
            self.told[key] = told  # nothing was decided of what was told before

    def _served(self, call: Call, reply: Any) -> None:
        path = call.method.path
        for incarnation in _incarnations_of(call.request):
            if incarnation != self.incarnations[call.server]:
                self.say(
                    f"{call.method.name} of {call.client} was for incarnation {incarnation} of {call.server}, and "
                    f"incarnation {self.incarnations[call.server]} answered"
                )
        if path == methods.COMMIT.path:
            for asked, part in zip(call.request.parts, reply.parts, strict=True):
                if part.version and not part.missing:
                    self.answers.append((asked.envelope.table_id, asked.step_id, part.version, part.stamp.shard))
        elif path == methods.ATTACH_TABLE.path or path == methods.SET_VIEW.path:
            self.note_view(call.request.view)
            if path == methods.ATTACH_TABLE.path:
                self._attached(call.request, call.server)
        elif path == methods.LIST_TABLES.path:
            for view in reply:  # also one that a shard has taken, and failed to say so, as its disk did
                self._note_placement(view)
        elif path == methods.SHARD_DROP_TABLE.path:
            self.answering.pop((call.request.table_id, call.server), None)
        elif path == methods.RESOLVE.path:
            for step in reply.steps:
                if step.version:
                    self.note_decided(step.table_id, step.version, step.step_id, by=f"resolve at {call.server}")

    def note_view(self, view: TableView) -> None:
        """A shard was given a view: of one epoch there is one placement."""
        table_id = view.schema.table_id
        self.schemas.setdefault(table_id, view.schema)
        placed = set(view.placement.shards)
        self.owners[table_id] |= {(info.shard, info.incarnation) for info in view.shards if info.shard in placed}
        self._note_placement(view)

    def _note_placement(self, view: TableView) -> None:
        table_id = view.schema.table_id
        known = self.placements.setdefault((table_id, view.placement.epoch), view.placement)
        same = np.array_equal(known.owners, view.placement.owners)
        if not same or not np.array_equal(known.key_owners, view.placement.key_owners):
            self.say(f"table {table_id} has two placements of epoch {view.placement.epoch}")

    def _attached(self, request: AttachTable, shard: str) -> None:
        table_id = request.view.schema.table_id
        if request.pending:
            self.answering.setdefault((table_id, shard), False)  # a copy that comes late takes nothing back
        else:
            self.answering[table_id, shard] = True
        if request.source is not None:
            self._restored(table_id, self.saved.origin(request.source))

    @property
    def half_told(self) -> bool:
        """Whether some shard of a table that is made waits for a controller to say so, and answers nobody before."""
        made = {table_id for (table_id, _), told in self.answering.items() if told}
        return any(table_id in made and not told for (table_id, _), told in self.answering.items())

    def _restored(self, table_id: int, origin: Origin) -> None:
        """A table is made of a checkpoint's."""
        if self.origins.setdefault(table_id, origin) != origin:
            self.say(f"table {table_id} is restored from {origin}, and from {self.origins[table_id]}")
        began_s, ended_s = origin.taken_s
        for (other, slot), writes in list(self.writes.items()):
            if other == origin.table_id and (table_id, slot) not in self.writes:
                along = [write.taken_along(began_s, ended_s) for write in writes]
                self.writes[table_id, slot] = [write for write in along if write is not None]

    def check_written(self, view: TableView, ids: Tensor, rows: Tensor, asked_s: float) -> None:
        """Rows of slots that are not trained, as they were read."""
        schema = view.schema
        check_written(
            schema,
            ids,
            rows,
            writes_of=lambda slot: self.writes[schema.table_id, slot],
            asked_s=asked_s,
            say=self.say,
        )

    def note_applied(self, step: DecidedStep) -> None:
        """A shard has applied a step, or counted one that it has no part in."""
        key = step.table_id, step.version
        if step.step_id == NOBODY:
            return
        self.note_decided(step.table_id, step.version, step.step_id, by="some shard")
        told = self.decided.get(key)
        if told is not None and (told.lr, told.grad_scale) != (step.lr, step.grad_scale):
            self.say(f"version {step.version} of table {step.table_id} is applied with {step}, and was told as {told}")

    def note_decided(self, table_id: int, version: int, step_id: StepId, *, by: str) -> None:
        """Somebody says that this step made this version."""
        told = self.told.get((table_id, step_id))
        if told is None:
            self.say(f"{by} has version {version} of table {table_id} made by {step_id}, which nobody told")
            return
        known = self.decided.setdefault((table_id, version), replace(told))
        if known.step_id != step_id:
            self.say(f"version {version} of table {table_id} is {known.step_id} and, at {by}, {step_id}")

    def _answered(self, call: Call) -> None:
        if isinstance(call.error, Internal):
            self.say(f"{call.method.name} of {call.client} at {call.server}: {call.error}")
        if isinstance(call.error, DataLoss):
            table_id = _table_of(call.request)
            if table_id is not None and table_id not in self.lost:
                self.say(f"{call.method.name} at {call.server} says DataLoss, and nothing was lost: {call.error}")
        if call.done and call.method.path in READS:
            self.reads.append(Read(call, self.floors.pop(call.number)))
            stamp, table_id = call.reply.stamp, call.request.envelope.table_id
            self.known[call.process, table_id] = max(self.known[call.process, table_id], stamp.table_version)

    def shard_started(self, info: ShardInfo, name: str) -> None:
        self.incarnations[name] = info.incarnation

    def shard_killed(self, info: ShardInfo) -> None:
        """Tables that had pages there may answer DataLoss from now on."""
        self.killed.add((info.shard, info.incarnation))
        self.hit |= {table for (table, _), placement in self.placements.items() if info.shard in placement.shards}

    @property
    def lost(self) -> set[int]:
        """Tables that had pages on a shard that was killed, or were being made on it, in some placement of theirs."""
        if not self.killed:
            return set()
        return self.hit | {table_id for table_id, owners in self.owners.items() if owners & self.killed}

    def names_lost(self, error: MempoolError) -> bool:
        """Whether it is of a step that a lost table has part in. Its other tables wait: that its pages are lost nobody
        says before a controller has admitted the shard that came in the killed one's place."""
        return any(repr(self.schemas[table_id].name) in error.message for table_id in self.lost & self.schemas.keys())

    # The check

    def check(self) -> list[str]:
        """All that may not be; the run is over."""
        for table_id in sorted(self.schemas):
            self._check_table(table_id)
        self._check_answers()
        self._check_whole()
        self.saved.check_moments(self.together, self.decided, self.acknowledged_versions, say=self.say)
        check_cuts(self.cuts, self.together, self.decided, say=self.say)
        return self.violations

    def _check_table(self, table_id: int) -> None:
        versions = sorted(version for table, version in self.decided if table == table_id)
        reads = defaultdict(list)
        for read in self.reads:
            if read.call.request.envelope.table_id == table_id:
                reads[read.call.reply.stamp.table_version].append(read)
        base = self.base_of(table_id)
        newest = max([*versions, *reads], default=base)
        if versions != list(range(base + 1, base + 1 + len(versions))):
            self.say(f"table {table_id} of version {base} has versions {versions}: some are missing")
            return
        if newest > base + len(versions) or min(reads, default=base) < base:
            self.say(f"table {table_id}: answers name versions {sorted(reads)}; {base} and {versions} were made")
            return
        made_by = self._check_once(table_id, versions)
        floors = _Floors(self._acknowledged_versions(table_id, made_by))
        oracle = self.oracle_of(table_id, base)
        try:
            for version in range(base, newest + 1):
                if version > base:
                    self._replay(oracle, table_id, self.decided[table_id, version])
                self._check_reads(oracle, reads[version], floors)
        finally:
            oracle.close()

    def base_of(self, table_id: int) -> int:
        """The version with which a table begins."""
        return self.origins[table_id].version if table_id in self.origins else 0

    def oracle_of(self, table_id: int, version: int) -> Oracle:
        """The table as it was at that version: of one that was restored, what its origin was, and goes on from there.

        Raises KeyError where a step of that is not known."""
        origin = self.origins.get(table_id)
        if origin is None:
            oracle = Oracle(self.schemas[table_id])
        else:
            oracle = self.oracle_of(origin.table_id, origin.version)
            oracle.becomes(self.schemas[table_id])
        for number in range(self.base_of(table_id) + 1, version + 1):
            self._replay(oracle, table_id, self.decided[table_id, number])
        return oracle

    def _check_once(self, table_id: int, versions: Iterable[int]) -> dict[Update, int]:
        """Each update is in one step at most; answers in which version it is."""
        made_by: dict[Update, int] = {}
        newest: dict[str, tuple[int, int]] = {}
        for version in versions:
            step = self.decided[table_id, version]
            at = step.step_id.generation, step.step_id.step
            if at <= newest.get(step.step_id.group, (-1, -1)):
                self.say(f"version {version} of table {table_id} is {step.step_id}, after {newest[step.step_id.group]}")
            newest[step.step_id.group] = at
            for sequence in step.sequences:
                update = (table_id, step.step_id.group, step.step_id.generation, sequence)
                if update in made_by:
                    self.say(f"update {update} is in version {made_by[update]} and again in {version}")
                if update in self.discarded:
                    self.say(f"update {update} was discarded and is in version {version}")
                made_by[update] = version
        return made_by

    def acknowledged_versions(self, table_id: int) -> list[tuple[float, int]]:
        """When versions of a table were acknowledged, to anybody."""
        made_by = {
            (table_id, step.step_id.group, step.step_id.generation, sequence): version
            for (table, version), step in self.decided.items()
            if table == table_id
            for sequence in step.sequences
        }
        return [
            (told.at_s, made_by[update])
            for told in self.acknowledged
            for update in told.updates
            if update[0] == table_id and update in made_by
        ]

    def _acknowledged_versions(self, table_id: int, made_by: Mapping[Update, int]) -> list[tuple[float, int]]:
        found = []
        for acknowledged in self.acknowledged:
            for update in acknowledged.updates:
                if update[0] == table_id and update not in made_by:
                    self.say(f"update {update} was acknowledged at {acknowledged.at_s:.3f} s and is in no version")
                elif update[0] == table_id:
                    found.append((acknowledged.at_s, made_by[update]))
        return found

    def _replay(self, oracle: Oracle, table_id: int, step: Decided) -> None:
        group, generation = step.step_id.group, step.step_id.generation
        contents = [self.contents[table_id, group, generation, sequence] for sequence in step.sequences]
        oracle.step(contents, lr=step.lr, grad_scale=step.grad_scale)

    def _check_reads(self, oracle: Oracle, reads: list[Read], floors: "_Floors") -> None:
        """Answers of one version."""
        self.checked += len(reads)
        whole = [read for read in reads if self._is_in_time(oracle, read, floors)]
        sums = Sums(oracle)
        for read in whole:
            call = read.call
            placement = self.placements[call.request.envelope.table_id, call.reply.stamp.epoch]
            if call.method.path == methods.GATHER.path:
                sums.ask(call, placement)
            else:
                self._check_same(oracle, call, *rows_of(oracle, call, placement))
        for call, expected in sums.found():
            self._check_same(oracle, call, expected, call.reply.values)

    def _is_in_time(self, oracle: Oracle, read: Read, floors: "_Floors") -> bool:
        """Whether an answer is of a version and an epoch that it may be of, so that it can be compared."""
        call, stamp = read.call, read.call.reply.stamp
        where = _where(oracle, call)
        if stamp.table_version < read.floor:
            self.say(f"{where}: answered of version {stamp.table_version}, and this client had seen {read.floor}")
        floor = floors.at(call.sent_s)
        if call.request.pin:
            floor = self.pinned[call.request.pin].checked(stamp, floors.at, where, say=self.say)
        if stamp.table_version < floor:
            self.say(
                f"{where}: sent at {call.sent_s:.3f} s, answered of version {stamp.table_version}; version {floor} was "
                "acknowledged before"
            )
        if (call.request.envelope.table_id, stamp.epoch) not in self.placements:
            self.say(f"{where}: answered of epoch {stamp.epoch}, which was never told")
            return False
        if stamp.epoch != call.request.envelope.epoch:
            self.say(f"{where}: planned by epoch {call.request.envelope.epoch}, answered of epoch {stamp.epoch}")
            return False
        return True

    def _check_same(self, oracle: Oracle, call: Call, expected: Tensor, found: Tensor) -> None:
        same = expected.shape == found.shape and expected.dtype == found.dtype
        if same and is_exact(oracle.schema):
            same = torch.equal(expected, found)
        elif same:
            same = torch.allclose(expected, found, rtol=1e-5, atol=1e-6)
        if not same:
            version = call.reply.stamp.table_version
            self.say(
                f"{_where(oracle, call)}: version {version} is not what was trained: {_difference(expected, found)}"
            )

    def _check_answers(self) -> None:
        """A Commit is answered with the version that its step makes; one that comes late, with a later of its rank."""
        made, lost = defaultdict(list), self.lost
        for (table_id, version), step in self.decided.items():
            made[table_id, step.step_id.group, step.step_id.rank].append((_age(step.step_id), version))
        for table_id, step_id, version, shard in self.answers:
            of_rank = made[table_id, step_id.group, step_id.rank]
            least = min((other for age, other in of_rank if age >= _age(step_id)), default=sys.maxsize)
            if least == sys.maxsize and table_id in lost:
                continue  # its gate died behind its answer, before it applied the step
            if version < least:
                self.say(f"shard {shard} answered that {step_id} makes version {version} of table {table_id}, not so")

    def _check_whole(self) -> None:
        """A step of several tables is of all of them or of none."""
        made = {(table_id, step.step_id) for (table_id, _), step in self.decided.items()}
        gone = self.lost | self.dropped
        for steps in sorted(self.together, key=repr):
            done = [step for step in steps if step in made]
            if done and len(done) < len(steps) and not any(table_id in gone for table_id, _ in steps):
                self.say(f"of a step of {len(steps)} tables {len(done)} were made: {done} of {steps}")


def _age(step_id: StepId) -> tuple[int, int]:
    return step_id.generation, step_id.step


class _Floors:
    """The highest version acknowledged to anybody before some moment."""

    def __init__(self, acknowledged: list[tuple[float, int]]) -> None:
        self._acknowledged = sorted(acknowledged)

    def at(self, when_s: float) -> int:
        return max((version for at_s, version in self._acknowledged if at_s < when_s), default=0)


def _where(oracle: Oracle, call: Call) -> str:
    return f"{call.method.name} {call.number} of {call.client} at {call.server}, table {oracle.schema.name!r}"


def _incarnations_of(request: Any) -> list[int]:
    """The start of a shard that a request is for, as often as it says so."""
    if isinstance(request, HeartbeatRequest):
        return [request.incarnation]
    parts = (request,) if hasattr(request, "envelope") else getattr(request, "parts", ())
    return [part.envelope.incarnation for part in parts if hasattr(part, "envelope")]


def _table_of(request: Any) -> int | None:
    if hasattr(request, "envelope"):
        return int(request.envelope.table_id)
    parts = getattr(request, "parts", ())
    return int(parts[0].envelope.table_id) if len(parts) == 1 else None


def _difference(expected: Tensor, found: Tensor) -> str:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"{list(found.shape)} {found.dtype}, expected {list(expected.shape)} {expected.dtype}"
    at = (expected != found).nonzero()[0].tolist()
    return f"at {at} {float(found[tuple(at)])!r}, expected {float(expected[tuple(at)])!r}"
