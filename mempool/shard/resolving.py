"""Settles what a shard is in doubt of: answers what others ask, and asks them. What doubt is: ``agreement.doubt``.

Runs on the engine's thread and knows the tables; ``mempool.shard.steps.resolver`` carries questions to other shards.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mempool.agreement.doubt import AGAIN_S
from mempool.agreement.ledger import FORGOTTEN, generations
from mempool.agreement.rounds_here import fate_of_lapsed
from mempool.errors import NotFound
from mempool.shard.hosted import HostedTable
from mempool.shard.steps.held import PreparedStep
from mempool.types import DecidedStep, ResolveReply, ResolveRequest, ShardInfo, StepId, TableView
from mempool.types.running import Clock

_LOG = logging.getLogger("mempool.shard")

_Drop = Literal["", "lease", "unwanted"]
"""Why a step that is not decided is to be dropped."""

AT_ONCE = 256
"""Questions that wait for their answers."""
_MOST_STEPS = 512
"""Decided steps of one answer."""
_MOST_GONE = 16
"""Tables that were dropped, whose steps' parts at other tables are still known."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask of which shard; ``tables``: whose doubt it is. last: the decider that knows of no decision; a table's
    gate is asked, too, in case that is one that was started anew."""

    target: ShardInfo
    request: ResolveRequest
    tables: tuple[int, ...]
    asked_s: float
    last: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class DoubtfulRound:
    """A round of a move whose lease is over here, or of which readers have to know whether it is decided, and the shard
    that knows what became of it; None: nobody does."""

    table_id: int
    token: str
    gate: ShardInfo | None
    asked_s: float


class Decisions:
    """What is known here of steps, and what has to be asked.

    Args:
        shard: This one's number.
        tables: All tables here, by id, now.
        clock: Seconds, monotonic.
    """

    def __init__(self, shard: int, tables: Callable[[], Mapping[int, HostedTable]], *, clock: Clock) -> None:
        self._shard = shard
        self._tables = tables
        self._clock = clock
        self._gone: OrderedDict[int, dict[StepId, tuple[DecidedStep, ...]]] = OrderedDict()
        self._last: list[Question] = []
        self._turn = 0

    def answer(self, request: ResolveRequest) -> ResolveReply:
        """What this shard knows.

        Raises:
            NotFound: The order of a table is asked for that is not here: nobody may take that for an order of nothing.
        """
        table = self._tables().get(request.table_id)
        if table is None:
            return self._of_gone(request.table_id, request.step_id)
        steps: tuple[DecidedStep, ...] = ()
        state: Any = ""
        if request.step_id is not None:
            drop: _Drop = "unwanted" if request.unwanted else "lease" if request.give_up else ""
            state, steps = self._state(table, request.step_id, drop=drop)
        if request.after_version is not None:
            if table.updates.doubtful(self._clock()) is not None:
                table.peers_wait()  # one may be decided, and this gate was not told
            steps = (*steps, *table.order.after(request.after_version)[:_MOST_STEPS])
        return ResolveReply(version=table.order.numbered, state=state, steps=steps)

    def questions(self) -> tuple[list[Question], float | None]:
        """What is to be asked now, and in how many seconds to look again; None: not before something changes."""
        now = self._clock()
        found: list[Question] = []
        next_s: float | None = None
        steps: dict[tuple[int, StepId], list[tuple[HostedTable, PreparedStep]]] = {}
        for table in list(self._tables().values()):
            table.end_doubts()
            for doubt, is_order in ((table.order_doubt, True), (table.step_doubt, False)):
                at_s = doubt.ask_at()
                if at_s is None:
                    continue
                if at_s > now:
                    next_s = at_s if next_s is None else min(next_s, at_s)
                    continue
                doubt.asked(now)
                next_s = now + AGAIN_S if next_s is None else min(next_s, now + AGAIN_S)
                if is_order:
                    self._ask_order(table, found, now)
                else:
                    self._collect_steps(table, steps)
            if (at_s := table.round_doubt.ask_at()) is not None:  # ``doubtful_rounds`` asks
                at_s = at_s if at_s > now else now + AGAIN_S
                next_s = at_s if next_s is None else min(next_s, at_s)
        for (table_id, step_id), parts in steps.items():
            self._ask_step(table_id, step_id, parts, found, now)
        found += self._last
        self._last = []
        self._turn = (self._turn + AT_ONCE) % max(1, len(found))  # so that each has its turn where there are more
        found = [*found[self._turn :], *found[: self._turn]][:AT_ONCE]
        return found, None if next_s is None else max(0.001, next_s - now)

    def doubtful_rounds(self) -> list[DoubtfulRound]:
        """The rounds whose controllers have fallen silent, and those that readers wait for."""
        now = self._clock()
        found = []
        for table in self._tables().values():
            at_s = table.round_doubt.ask_at()
            awaited = at_s is not None and at_s <= now
            if table.rounds.token is not None and (awaited or table.rounds.lapsed):
                table.round_doubt.asked(now)
                found.append(DoubtfulRound(table.table_id, table.rounds.token, table.gate_info, now))
        return found

    def told_of_round(self, asked: DoubtfulRound, view: TableView | None, *, token: str | None) -> TableView | None:
        """What the gate says: its view, and which round holds the table there. Answers what is to be adopted."""
        table = self._tables().get(asked.table_id)
        if table is None or table.rounds.token != asked.token:
            return None  # it was heard of meanwhile
        gate_epoch = None if view is None else view.placement.epoch
        fate = fate_of_lapsed(asked.token, epoch=table.epoch, gate_epoch=gate_epoch, gate_token=token)
        if fate == "adopt":
            return view
        if fate == "thaw" and table.rounds.lapsed:
            table.end_round()
        if gate_epoch == table.epoch:  # it was not decided then
            table.round_doubt.settled(asked.asked_s)
            table.steps_changed()
        return None

    def told(self, question: Question, reply: ResolveReply) -> None:
        """What another shard has answered."""
        tables = self._tables()
        if question.request.step_id is not None:
            self._told_of_step(question, reply, tables)
        if question.request.after_version is not None:
            table = tables.get(question.request.table_id)
            if table is not None:
                try:
                    table.learn(reply.version, reply.steps)
                    if table.order.numbered >= reply.version:  # else there are more steps than one answer had
                        table.order_doubt.settled(question.asked_s)
                    table.apply_decided()
                finally:
                    table.steps_changed()

    def leave(self, table: HostedTable) -> None:
        """A table is dropped. Steps that were decided as its own may be in doubt at other tables."""
        kept: dict[StepId, tuple[DecidedStep, ...]] = {}
        for (group, rank), newest in table.ledger.snapshot().entries.items():
            for entry in generations(newest):
                if entry.others:
                    step_id = StepId(group=group, rank=rank, step=entry.step, generation=entry.generation)
                    kept[step_id] = entry.others
        for step in table.order.waiting():
            if others := table.others.get(step.version):
                kept[step.step_id] = others
        if kept:
            self._gone[table.table_id] = kept
        if len(self._gone) > _MOST_GONE:
            self._gone.popitem(last=False)

    def of_dropped(self) -> Iterator[tuple[int, StepId, tuple[DecidedStep, ...]]]:
        """What dropped tables had decided for others, the newest last."""
        for table_id, kept in self._gone.items():
            yield from ((table_id, step_id, others) for step_id, others in kept.items())

    def remember(self, table_id: int, step_id: StepId, others: tuple[DecidedStep, ...]) -> None:
        """One of these, in an earlier life."""
        self._gone.setdefault(table_id, {})[step_id] = others

    def _of_gone(self, table_id: int, step_id: StepId | None) -> ResolveReply:
        """Of a table that is not here: what was not decided of it never will be."""
        if step_id is None:
            raise NotFound(f"shard {self._shard} has no table {table_id}: it was dropped, or this shard is new")
        others = self._gone.get(table_id, {}).get(step_id)
        return ResolveReply(version=0, state="dropped" if others is None else "decided", steps=others or ())

    def supersede(self, table: HostedTable, prepared: PreparedStep) -> bool:
        """A trainer goes on with a later step: the one it has prepared on that table is not decided any more. Returns
        whether it is gone here: at its decider, at once; elsewhere its decider is asked, which drops it then, unless it
        was decided."""
        decider = self._tables().get(prepared.decider[0])
        if decider is None or not decider.is_gate:
            table.updates.give_up(prepared.step_id)
            return False
        step_id = _at_decider(prepared)
        if self._state(decider, step_id, drop="unwanted")[0] == "dropped":
            self.drop(decider.table_id, step_id)
        return not table.updates.is_prepared(prepared.step_id)

    def supersede_older(self, table: HostedTable, step_id: StepId) -> PreparedStep | None:
        """A trainer that has gone back comes with its first step: what its older generations have prepared here is not
        decided any more. Returns what of that is not gone yet."""
        if not (step_id.generation and table.updates.any_prepared):
            return None
        older = [
            prepared
            for prepared in table.updates.prepared()
            if (prepared.step_id.group, prepared.step_id.rank) == (step_id.group, step_id.rank)
            and prepared.step_id.generation < step_id.generation
        ]
        return next((prepared for prepared in older if not self.supersede(table, prepared)), None)

    def refuse(self, table: HostedTable, step_id: StepId) -> None:
        """The decider refuses a step's Commit: a copy of it that comes later is not decided either."""
        self._state(table, step_id, drop="unwanted")

    def is_decided(self, prepared: PreparedStep) -> bool:
        """Whether the decider, which is here, has decided the step."""
        table = self._tables().get(prepared.decider[0])
        return table is not None and self._state(table, _at_decider(prepared))[0] == "decided"

    def drop(self, table_id: int, step_id: StepId, *, said_elsewhere: bool = False) -> None:
        """A step was dropped for good by its decider: here too, at all its tables.

        said_elsewhere: By another shard. One that was started anew knows of no decision, and a table's gate may have
            heard of one: that is asked, before the step is dropped there.
        """
        for table in self._tables().values():
            for prepared in list(table.updates.prepared()):
                if prepared.decider[0] != table_id or _at_decider(prepared) != step_id:
                    continue
                ask_gate = said_elsewhere and table.table_id != table_id and not table.is_gate
                if ask_gate and (gate := table.gate_info) is not None:
                    request = ResolveRequest(
                        table_id=table.table_id, step_id=prepared.step_id, after_version=table.order.applied
                    )
                    last = Question(gate, request, (table.table_id,), self._clock(), last=prepared.decider)
                    self._last.append(last)
                    continue
                table.updates.discard(prepared.step_id)
                table.steps_changed()

    def _state(self, table: HostedTable, step_id: StepId, *, drop: _Drop = "") -> tuple[str, tuple[DecidedStep, ...]]:
        """At a step's decider: what became of it, and with it all its parts.

        drop: Where it is not decided it is dropped for good: unless it is under way here; or whatever it is.
        """
        waiting = table.order.find(step_id)
        if waiting is not None:
            return "decided", (waiting, *table.others.get(waiting.version, ()))
        entry = table.ledger.entry_of_its_generation(step_id)
        if entry is not None and 0 < step_id.step == entry.step:
            kept = tuple(step for step in table.order.after(entry.version - 1) if step.version == entry.version)
            return "decided", (*kept, *entry.others)
        # A client begins a step when all owners have answered for the one before: who is still in doubt of an earlier
        # one was never told to apply it. Of a generation that is over nothing is decided any more.
        newest = table.ledger.entry(step_id).generation
        if entry is None or step_id.generation < newest or step_id.step <= max(entry.step, entry.dropped):
            return "dropped", ()
        if not drop or not table.is_gate or (drop == "lease" and table.updates.under_way(step_id)):
            return "pending", ()
        # [BARRIER] a group's step is given up here, for all its ranks. Durable before it is said.
        table.ledger.drop(step_id)
        self.drop(table.table_id, step_id)
        return "dropped", ()

    def _ask_order(self, table: HostedTable, found: list[Question], now: float) -> None:
        target = table.gate_info
        if table.is_gate or target is None:
            table.order_doubt.settled(now)
            table.steps_changed()
            return
        request = ResolveRequest(table_id=table.table_id, after_version=table.order.applied)
        found.append(Question(target, request, (table.table_id,), now))

    def _collect_steps(
        self, table: HostedTable, steps: dict[tuple[int, StepId], list[tuple[HostedTable, PreparedStep]]]
    ) -> None:
        for prepared in table.updates.prepared():
            steps.setdefault((prepared.decider[0], _at_decider(prepared)), []).append((table, prepared))

    def _ask_step(
        self,
        table_id: int,
        step_id: StepId,
        parts: list[tuple[HostedTable, PreparedStep]],
        found: list[Question],
        now: float,
    ) -> None:
        give_up = any(
            not table.updates.lives(prepared.step_id)
            or (table.rest_waited_for and table.updates.stalled(prepared.step_id))
            for table, prepared in parts
        )
        unwanted = any(table.updates.unwanted(prepared.step_id) for table, prepared in parts)
        request = ResolveRequest(table_id=table_id, step_id=step_id, give_up=give_up or unwanted, unwanted=unwanted)
        decider = self._tables().get(table_id)
        tables = tuple(table.table_id for table, _ in parts)
        target = parts[0][1].decider_at if decider is None else decider.gate_info
        if target is None or target.shard == self._shard:
            try:
                self.told(Question(_NOWHERE, request, tables, now), self.answer(request))
            except Exception as error:  # of one table: others are asked for all the same
                _LOG.warning("what is decided of tables %s cannot be applied now: %s", tables, error)
            return
        found.append(Question(target, request, tables, now))

    def _told_of_step(self, question: Question, reply: ResolveReply, tables: Mapping[int, HostedTable]) -> None:
        step_id = question.request.step_id
        assert step_id is not None, "it was asked for"
        here = [tables[table_id] for table_id in question.tables if table_id in tables]
        # What a step was prepared for before says nothing of it once its trainer has named another decider.
        decider = question.last or (question.request.table_id, step_id.step)
        if question.last is not None and reply.state != "decided":
            for other in here:
                if other.updates.is_prepared(step_id, decider=decider):
                    other.updates.discard(step_id)
        elif reply.state == "dropped":
            self.drop(question.request.table_id, step_id, said_elsewhere=question.target is not _NOWHERE)
        elif reply.state == "decided":
            for step in reply.steps:
                table = tables.get(step.table_id)
                if table is None or not table.updates.is_prepared(step.step_id, decider=decider):
                    continue
                if step.version:
                    table.order.add(step)
                elif table.is_gate:
                    table.ledger.log.numbered(table.order.number(step))
            self._apply(here)
            _drop_strangers(question, reply, here)
            for table in here:
                if table.updates.any_prepared and not table.is_gate:
                    table.order_doubt.wait(self._clock())  # the gate of its order knows the version
        elif reply.state == "pending":
            for table in here:
                for prepared in table.updates.prepared():
                    if prepared.decider[0] == question.request.table_id and _at_decider(prepared) == step_id:
                        table.updates.settle(prepared.step_id, question.asked_s)
        for table in here:
            table.steps_changed()

    def _apply(self, tables: Sequence[HostedTable]) -> None:
        """Apply what is decided; what cannot be applied now is told to whoever waits, and tried again."""
        for table in tables:
            try:
                table.apply_decided()
            except Exception:
                for other in tables:
                    other.steps_changed()
                raise


def _drop_strangers(question: Question, reply: ResolveReply, tables: Sequence[HostedTable]) -> None:
    """What was prepared as part of a step that was decided without it is no part of any decision."""
    if FORGOTTEN in reply.steps:
        return
    parts = {(step.table_id, step.step_id) for step in reply.steps}
    for table in tables:
        for prepared in list(table.updates.prepared()):
            asked = (
                prepared.decider[0] == question.request.table_id and _at_decider(prepared) == question.request.step_id
            )
            # The decider's own table has the step it decided, whether its gate remembers the rest of it or not.
            if asked and table.table_id != prepared.decider[0] and (table.table_id, prepared.step_id) not in parts:
                table.updates.discard(prepared.step_id)


def _at_decider(prepared: PreparedStep) -> StepId:
    """The step, as the table that decides it counts."""
    return replace(prepared.step_id, step=prepared.decider[1])


_NOWHERE = ShardInfo(shard=0, address="", incarnation=0)
