"""The controller's memory: shards and tables as values. No I/O; every change goes through here."""

import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from mempool.errors import NotFound
from mempool.types import Placement, ShardInfo, TableSchema, TableView
from mempool.types.schema_checks import shown

_NAMED = 20
"""How many of a pool's tables a message names."""


class Roster:
    """Shards by id and table views by name. A view always names the shards as they are now.

    Attributes:
        dropped: Ids of tables that are gone, and that some shard may not have heard of yet.
        unfinished: Ids of tables that are being made: what a shard says of one is no news.
        complete: Every table of the pool is known. Not so from an adoption until each shard was heard once.
        highest_incarnation: Of any shard that was ever heard of.
    """

    def __init__(self) -> None:
        self.dropped: set[int] = set()
        self.unfinished: set[int] = set()
        self.complete = True
        self.highest_incarnation = 0
        self._shards: dict[int, ShardInfo] = {}
        self._views: dict[str, TableView] = {}
        self._last_table_id = 0

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
        """The view of a table. Raises NotFound naming tables that there are."""
        try:
            return self._views[name]
        except KeyError:
            known = ", ".join(sorted(self._views)[:_NAMED]) or "none"
            more = f", and {len(self._views) - _NAMED:,} more" if len(self._views) > _NAMED else ""
            raise NotFound(f"no table {shown(name)} in this pool; its tables: {known}{more}") from None

    def new_table_id(self) -> int:
        """An id that no table of this pool ever had: milliseconds of now, so that a restarted controller agrees."""
        self._last_table_id = max(self._last_table_id + 1, time.time_ns() // 1_000_000)
        return self._last_table_id

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

    def put(self, schema: TableSchema, placement: Placement) -> TableView:
        """Add a table, or give it a new placement."""
        self._last_table_id = max(self._last_table_id, schema.table_id)
        view = TableView(schema=schema, placement=placement, shards=self.infos)
        self._views[schema.name] = view
        return view

    def hear(self, view: TableView) -> None:
        """Take over what a shard says of a table, where it is news: a higher epoch, or a table not known yet.

        Of two tables of one name the later one lives: the other was dropped, and that shard missed it.
        """
        table_id = view.schema.table_id
        self.highest_incarnation = max(self.highest_incarnation, *(info.incarnation for info in view.shards), 0)
        known = self._views.get(view.schema.name)
        unknown = known is None or known.schema.table_id != table_id
        if table_id in self.dropped or table_id in self.unfinished or (unknown and self.complete):
            return  # a table that nobody made through this controller is not for it to touch
        if known is not None and known.schema.table_id != table_id:
            self.dropped.add(min(known.schema.table_id, table_id))
            if known.schema.table_id > table_id:
                return
        elif known is not None and known.placement.epoch >= view.placement.epoch:
            return
        self.put(view.schema, view.placement)

    def remove(self, name: str) -> TableView:
        view = self.view(name)
        del self._views[name]
        self.dropped.add(view.schema.table_id)
        return view

    def _refresh(self) -> None:
        self._views = {name: replace(view, shards=self.infos) for name, view in self._views.items()}
