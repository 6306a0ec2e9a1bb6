"""What a controller does from what it hears of its shards: one that was started anew, and one whose calls were missed.

Plain functions of values. First every shard is brought to the newest that any of them knows; only then, and only where
every shard was heard, is anything thawed or given up: a silent one may know more.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mempool.types import ShardInfo, TableView
from mempool.types.pool import merged, newest_saved


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Knowledge:
    """What a controller knows of its pool's tables.

    Attributes:
        views: The tables, by name.
        dropped: Ids of tables that are gone, and that some shard may not have heard of.
        making: Ids of tables that it is making now: what shards have of them is no news.
        unmade: Ids of tables that are pending and were confirmed nowhere, when every shard was heard. Another
            controller may confirm one just now, first at the pool's first shard: that is to drop it first, or refuse.
        complete: Every table of the pool is known. Not so from an adoption until each shard was heard once.
    """

    views: Mapping[str, TableView] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()
    making: frozenset[int] = frozenset()
    unmade: frozenset[int] = frozenset()
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heard:
    """What a shard says it has.

    Attributes:
        views: Of the tables that are made, as far as it knows.
        pending: Ids of those that are being made.
        frozen: Those whose pages are moving: the token of their round by id; "" where it has none.
        dropped: Ids of tables that it was told to drop: one shard that was decides it for all.
        hidden: Ids of tables that it has and that a later one of the same name took the place of: it missed their drop.
    """

    views: tuple[TableView, ...] = ()
    pending: frozenset[int] = frozenset()
    frozen: Mapping[int, str] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()
    hidden: frozenset[int] = frozenset()

    @property
    def table_ids(self) -> frozenset[int]:
        """Of all tables that it speaks of."""
        return _has(self) | self.dropped


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget a table."""

    table_id: int


@dataclass(frozen=True, slots=True, eq=False)
class Attach:
    """Make a table known to a shard that has missed, or lost, it."""

    view: TableView
    mode: Literal["lost", "empty"]


@dataclass(frozen=True, slots=True, eq=False)
class Confirm:
    """A table that is pending at a shard is made."""

    view: TableView


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """Give a shard the newest view of a table."""

    view: TableView


Action = Drop | Attach | Confirm | Push


def learn(known: Knowledge, view: TableView, *, made: Collection[int] = ()) -> Knowledge:
    """Take over what a shard says of a table that is made, where it is news: a higher epoch, or an unknown table.

    Of two tables of one name the later one lives: the other was dropped, and that shard missed it.

    Args:
        made: Unknown tables that are taken over even by who knows all there are.
    """
    table_id, name = view.schema.table_id, view.schema.name
    present = known.views.get(name)
    unknown = present is None or present.schema.table_id != table_id
    if table_id in known.dropped or table_id in known.making or (unknown and known.complete and table_id not in made):
        return known  # a table that nobody made through this controller is not for it to touch
    if present is not None and unknown:
        known = replace(known, dropped=known.dropped | {min(present.schema.table_id, table_id)})
        if present.schema.table_id > table_id:
            return known
    elif present is not None and present.placement.epoch >= view.placement.epoch:
        saved = newest_saved(present.saved, view.saved)
        if saved == present.saved:
            return known
        view = replace(present, saved=saved)
    elif present is not None:
        view = merged(present, view)
    return replace(known, views={**known.views, name: view})


def learn_all(known: Knowledge, heard: Iterable[Heard], *, everyone: bool) -> Knowledge:
    """Take over what shards say; ``everyone``: all of the pool's, so that what none of them knows there is not."""
    reports = list(heard)
    gone = {table_id for report in reports for table_id in report.dropped}
    known = replace(
        known,
        views={name: view for name, view in known.views.items() if view.schema.table_id not in gone},
        # Only of those that somebody has still: a shard remembers its drops for long.
        dropped=known.dropped.union(*((_has(report) & gone) | report.hidden for report in reports)),
    )
    pending = {table_id for report in reports for table_id in report.pending} - known.making - known.dropped
    confirmed = {view.schema.table_id for report in reports for view in report.views}
    made = pending & confirmed  # whoever makes them, they are made, and to be confirmed everywhere
    for report in reports:
        for view in report.views:
            known = learn(known, view, made=made)
    if everyone:
        known = replace(known, complete=True, unmade=frozenset(pending - confirmed))
    return known


def owed(known: Knowledge, info: ShardInfo, heard: Heard) -> list[Action]:
    """What a shard that was heard is to be told: drops first, so that there is room."""
    present = {view.schema.table_id: view for view in heard.views}
    has = _has(heard)
    actions: list[Action] = [Drop(table_id) for table_id in sorted(known.dropped & has)]
    for view in known.views.values():
        table_id = view.schema.table_id
        if table_id in known.making:
            continue
        if table_id in heard.pending:
            actions.append(Confirm(view))
        elif (mine := present.get(table_id)) is None:
            # One that owns nothing takes the table's history with its first pages.
            actions.append(Attach(view, "lost" if info.shard in view.placement.shards else "empty"))
        elif mine.placement.epoch < view.placement.epoch or _tells(view) != _tells(mine):
            actions.append(Push(view))
    return actions


def _tells(view: TableView) -> tuple[object, ...]:
    """What a view says besides where pages are."""
    return view.shards, view.controller, view.saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Thaws:
    """A table to be thawed: at its gate, whose epoch is then asked for again, and only where that is ``epoch`` still at
    the others: until the gate is thawed a round of a controller that is not dead may end there. By name: a message of
    this that comes late must not end a round that has begun since."""

    table_id: int
    tokens: tuple[str, ...]
    epoch: int
    gate: int
    others: tuple[int, ...]


def thaws(known: Knowledge, heard: Mapping[int, Heard]) -> list[Thaws]:
    """What is to be thawed, once every shard was heard and has what it is owed."""
    return [
        Thaws(
            table_id=view.schema.table_id,
            tokens=tokens,
            epoch=view.placement.epoch,
            gate=view.placement.shards[0],
            others=_others(view, heard),
        )
        for view in known.views.values()
        if view.schema.table_id not in known.making and (tokens := _rounds_of(view.schema.table_id, heard.values()))
    ]


def _has(heard: Heard) -> frozenset[int]:
    """Ids of the tables that a shard has, made or not."""
    return heard.pending.union(heard.hidden, (view.schema.table_id for view in heard.views))


def _rounds_of(table_id: int, heard: Collection[Heard]) -> tuple[str, ...]:
    return tuple(sorted({report.frozen[table_id] for report in heard if table_id in report.frozen}))


def _others(view: TableView, heard: Mapping[int, Heard]) -> tuple[int, ...]:
    gate = view.placement.shards[0]
    return tuple(shard for shard in sorted(heard) if shard != gate)
