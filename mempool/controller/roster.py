"""The controller's memory: shards and tables as values. No I/O; every change goes through here."""

import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from mempool.agreement.recovery import Knowledge, learn
from mempool.errors import NotFound, ShardUnavailable
from mempool.types import Placement, SavedTable, ShardInfo, TableSchema, TableSource, TableView
from mempool.types.pool import newest_saved
from mempool.types.running import Clock
from mempool.types.schema_checks import shown

_AHEAD_MS = 10 * 365 * 24 * 3600 * 1000
"""So far a controller's clock may be ahead."""
_NAMED = 20
"""How many of a pool's tables a message names."""


class Roster:
    """Shards by id and table views by name. A view always names the shards as they are now.

    Args:
        controller: "host:port" of the controller whose memory this is; "" if embedded.
        wall_clock: Seconds since 1970.

    Attributes:
        dropped: Ids of tables that are gone, and that some shard may not have heard of yet.
        unfinished: Ids of tables that are being made: what a shard says of one is no news.
        complete: Every table of the pool is known. Not so from a doubt until each shard was heard, all after it.
        doubts: How often that came to be in doubt: what was heard before the last of them does not end it.
        unheard: Shards that did not say what they have when all were asked last, ascending.
        highest_incarnation: Of any shard that was ever heard of.
    """

    def __init__(self, *, controller: str = "", wall_clock: Clock = time.time) -> None:
        self.controller = controller
        self._wall_clock = wall_clock
        self.dropped: set[int] = set()
        self.unfinished: set[int] = set()
        self.complete = True
        self.doubts = 0
        self.unheard: tuple[int, ...] = ()
        self.highest_incarnation = 0
        self._shards: dict[int, ShardInfo] = {}
        self._views: dict[str, TableView] = {}
        self._last_table_id = 0
        self._heard_table_id = 0

    @property
    def shards(self) -> Mapping[int, ShardInfo]:
        return self._shards

    @property
    def infos(self) -> tuple[ShardInfo, ...]:
        """The shards, ascending."""
        return tuple(self._shards[shard] for shard in sorted(self._shards))

    @property
    def views(self) -> tuple[TableView, ...]:
        return tuple(self._views.values())

    @property
    def names(self) -> Set[str]:
        """Names of the tables."""
        return self._views.keys()

    @property
    def owners(self) -> frozenset[int]:
        """The shards that own any page of any table."""
        return frozenset(shard for view in self._views.values() for shard in view.placement.shards)

    def find(self, name: str) -> TableView | None:
        """The view of a table; None where there is none of that name."""
        return self._views.get(name)

    def view(self, name: str) -> TableView:
        """The view of a table. Raises NotFound naming tables that there are; ShardUnavailable where shards that were
        not heard yet may have it."""
        try:
            return self._views[name]
        except KeyError:
            if not self.complete:
                late = f"shard {self.unheard[0]} has not" if self.unheard else "not every shard has"
                raise ShardUnavailable(
                    f"whether there is a table {shown(name)} is not known yet: {late} said what it has; "
                    "ask again, and see mempool status",
                    shard=self.unheard[0] if self.unheard else None,
                ) from None
            known = ", ".join(sorted(self._views)[:_NAMED]) or "none"
            more = f", and {len(self._views) - _NAMED:,} more" if len(self._views) > _NAMED else ""
            raise NotFound(f"no table {shown(name)} in this pool; its tables: {known}{more}") from None

    def new_table_id(self) -> int:
        """An id above that of every table heard of: milliseconds of now, or more where an earlier controller's clock
        was ahead."""
        last = max(self._last_table_id, self._heard_table_id)
        self._last_table_id = max(last + 1, int(self._wall_clock() * 1000))
        return self._last_table_id

    def _believed(self, table_id: int) -> int:
        """An id, where a controller can have drawn it; else 0: beyond the wire's largest there would be none left."""
        return table_id if table_id <= int(self._wall_clock() * 1000) + _AHEAD_MS else 0

    def overtaken(self, table_id: int) -> bool:
        """Shards have spoken of a later table than that one, which is yet to be made."""
        return table_id <= self._heard_table_id

    def set_shards(self, infos: Iterable[ShardInfo]) -> None:
        """Take shards in, or take over a shard's new address and incarnation."""
        for info in infos:
            self._shards[info.shard] = info
            self.highest_incarnation = max(self.highest_incarnation, info.incarnation)
        self._refresh()

    def remove_shards(self, shards: Iterable[int]) -> None:
        for shard in shards:
            self._shards.pop(shard, None)
        self._refresh()

    def put(self, schema: TableSchema, placement: Placement, *, saved: SavedTable | None = None) -> TableView:
        """Add a table, or give it a new placement. saved: where it is saved, besides what is known."""
        self._last_table_id = max(self._last_table_id, self._believed(schema.table_id))
        known = self._views.get(schema.name)
        if known is not None and known.schema.table_id == schema.table_id:
            saved = newest_saved(known.saved, saved)
        view = TableView(schema=schema, placement=placement, shards=self.infos, controller=self.controller, saved=saved)
        self._views[schema.name] = view
        return view

    def save(self, view: TableView, source: TableSource, version: int) -> TableView:
        """That version of a table is in a checkpoint: the view that says so."""
        taken = int(self._wall_clock() * 1000)
        saved = SavedTable(
            url=source.url, checkpoint=source.checkpoint, table=source.table, version=version, taken=taken
        )
        return replace(view, saved=newest_saved(view.saved, saved))

    @property
    def knowledge(self) -> Knowledge:
        """What is known of tables, as a value."""
        return Knowledge(
            views=dict(self._views),
            dropped=frozenset(self.dropped),
            making=frozenset(self.unfinished),
            complete=self.complete,
        )

    def learn(self, known: Knowledge) -> None:
        """Take over what follows from what shards said."""
        for name in self._views.keys() - known.views.keys():
            del self._views[name]
        for name, view in known.views.items():
            if self._views.get(name) is not view:
                self.put(view.schema, view.placement, saved=view.saved)
        self.dropped |= known.dropped
        self.complete = known.complete

    def doubt(self) -> None:
        """Shards may have tables that are not known here: they are to be heard, from now on."""
        self.complete = False
        self.doubts += 1

    def hear(self, view: TableView) -> None:
        """Take over what a shard says of a table, where it is news: see ``agreement.recovery.learn``."""
        self.hear_of(view.shards)
        self.hear_ids([view.schema.table_id])
        self.learn(learn(self.knowledge, view))

    def hear_of(self, infos: Iterable[ShardInfo]) -> None:
        """Remember that there were such starts of shards."""
        self.highest_incarnation = max(self.highest_incarnation, *(info.incarnation for info in infos), 0)

    def hear_ids(self, table_ids: Iterable[int]) -> None:
        """Remember that there were such tables, made or not, dropped or not: later ones have higher ids."""
        self._heard_table_id = max(self._heard_table_id, *map(self._believed, table_ids), 0)

    def forget(self, table_id: int) -> None:
        """A table is dropped, or one that was being made is not made, whatever shards have of it."""
        self._views = {name: view for name, view in self._views.items() if view.schema.table_id != table_id}
        self.dropped.add(table_id)
        self._last_table_id = max(self._last_table_id, self._believed(table_id))

    def _refresh(self) -> None:
        self._views = {name: replace(view, shards=self.infos) for name, view in self._views.items()}
