"""Rare branches inside shards, controller and client that a run met, seen by what is wrapped while it lasts.

Nothing of it is in the product. ``missed`` says which ones many runs never met: these were not tested at all.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from mempool.agreement import recovery
from mempool.agreement.ledger import AppliedLedger
from mempool.agreement.order import Order
from mempool.agreement.rounds import Round
from mempool.agreement.rounds_here import RoundsHere
from mempool.agreement.step import StepOfTables
from mempool.agreement.writes import SeenWrites
from mempool.controller.changes import TableChanges
from mempool.errors import MempoolError
from mempool.journal import Journal
from mempool.journal.snapshots import Snapshots
from mempool.shard import resolving
from mempool.shard.hosted import HostedTable
from mempool.shard.resolving import Decisions
from mempool.shard.tenancy import Tenancy

Say = Callable[..., str | None]
"""(result, error, *arguments) -> what was met, in words; None: nothing rare."""


def _always(what: str) -> Say:
    return lambda *_: what


def _where(what: str) -> Say:
    """Where the result is true."""
    return lambda result, *_: what if result else None


def _refused(kinds: Mapping[str, str]) -> Say:
    """By a part of the refusal's words."""

    def say(_: Any, error: Any, *__: Any) -> str | None:
        return next((what for words, what in kinds.items() if words in str(error)), None) if error else None

    return say


def _early(taken: Any, *_: Any) -> str | None:
    return "a decided step that came before the one before it" if taken is False else None


def _write(due: Any, error: Any, *_: Any) -> str | None:
    if error is not None:
        return "a write that was over"
    return "a write that came again" if due is False else None


def _given(start: str) -> Say:
    return lambda result, *_: f"{start} {result}"


def _torn(_: Any, __: Any, journal: Journal, *___: Any) -> str | None:
    return "a torn tail that was cut off" if journal.torn is not None else None


_WRAPPED: list[tuple[Any, str, Say]] = [
    (HostedTable, "park_for_order", _always("a request that waited for earlier steps")),
    (HostedTable, "park_for_steps", _always("a request that waited for what became of a prepared step")),
    (HostedTable, "park_until_thaw", _always("a request that waited for a move")),
    (HostedTable, "park_until_rest", _always("a freeze that waited for steps")),
    (HostedTable, "end_round", _always("a round that ended undecided")),
    (HostedTable, "check", _refused({"": "a request of another placement"})),
    (resolving, "fate_of_lapsed", _given("a lapsed round, away from its gate, whose fate was to")),
    (Decisions, "supersede", _where("a prepared step whose place a later one took")),
    (Decisions, "leave", _always("a table that was dropped on a shard")),
    (Order, "may_take", _early),
    (
        AppliedLedger,
        "applied",
        _refused({"has begun": "a step of a generation that is over", "was dropped": "a step that was dropped"}),
    ),
    (
        RoundsHere,
        "check",
        _refused({"is over": "a call of a round that is over", "asks": "a call of a round while another holds"}),
    ),
    (Tenancy, "check_incarnation", _refused({"": "a request of an earlier start of a shard"})),
    (Tenancy, "attach", _refused({"is late": "an attach that came after the drop"})),
    (StepOfTables, "_reopen", _always("a step that was prepared again")),
    (StepOfTables, "_renumber", _always("a step that was given up and went on under its next number")),
    (Round, "_undo", _always("a round that its controller undid")),
    (Round, "_not_told", _always("a view that was decided and that a shard had to be told again")),
    (SeenWrites, "is_due", _write),
    (Snapshots, "_became", _always("a snapshot of a shard")),
    (Journal, "_tidy", _torn),
    (Journal, "_failed", _always("a write that the disk refused")),
    (TableChanges, "drop", _refused({"gone already": "a drop that came after its table had been made anew"})),
]
_OWED = "a shard that had to be told to"

EXPECTED = frozenset(
    {
        "a request that waited for earlier steps",
        "a request that waited for what became of a prepared step",
        "a request that waited for a move",
        "a freeze that waited for steps",
        "a round that ended undecided",
        "a request of another placement",
        "a lapsed round, away from its gate, whose fate was to adopt",
        "a lapsed round, away from its gate, whose fate was to thaw",
        "a lapsed round, away from its gate, whose fate was to wait",
        "a prepared step whose place a later one took",
        "a table that was dropped on a shard",
        "a decided step that came before the one before it",
        "a step of a generation that is over",
        "a step that was dropped",
        "a call of a round that is over",
        "a call of a round while another holds",
        "a request of an earlier start of a shard",
        "an attach that came after the drop",
        "a step that was prepared again",
        "a step that was given up and went on under its next number",
        "a round that its controller undid",
        "a view that was decided and that a shard had to be told again",
        "a drop that came after its table had been made anew",
        f"{_OWED} attach",
        f"{_OWED} confirm",
        f"{_OWED} drop",
        f"{_OWED} push",
        "a write that came again",
        "a write that was over",
        "a trainer that went back to an earlier step",
        "a snapshot of a shard",
        "a torn tail that was cut off",
        "a write that the disk refused",
        "a checkpoint",
        "a table that was restored in its place",
        "a table restored beside it",
        "a trainer that another one of a higher generation took the place of",
    }
)
"""What many runs must have met, each at least once."""


def missed(marks: Counter[str]) -> list[str]:
    """Branches that were never met."""
    return sorted(EXPECTED - {name for name, count in marks.items() if count})


@contextmanager
def counted(marks: Counter[str]) -> Iterator[None]:
    """What is met meanwhile is counted."""
    owed = recovery.owed

    def owing(*arguments: Any) -> list[recovery.Action]:
        actions = owed(*arguments)
        marks.update(f"{_OWED} {type(action).__name__.lower()}" for action in actions)
        return actions

    patches = [
        mock.patch.object(owner, name, _counting(getattr(owner, name), say, marks)) for owner, name, say in _WRAPPED
    ]
    patches.append(mock.patch.object(recovery, "owed", owing))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def _counting(original: Callable[..., Any], say: Say, marks: Counter[str]) -> Callable[..., Any]:
    def note(result: Any, error: MempoolError | None, arguments: tuple[Any, ...]) -> None:
        what = say(result, error, *arguments)
        if what is not None and (error is None or what):
            marks[what] += 1

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def wait(*arguments: Any, **named: Any) -> Any:
            try:
                result = await original(*arguments, **named)
            except MempoolError as error:
                note(None, error, arguments)
                raise
            note(result, None, arguments)
            return result

        return wait

    @functools.wraps(original)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            result = original(*arguments, **named)
        except MempoolError as error:
            note(None, error, arguments)
            raise
        note(result, None, arguments)
        return result

    return call
