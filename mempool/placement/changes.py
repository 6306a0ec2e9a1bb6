"""What is other in one view of a table than in another: between two epochs few of many pages change their owners."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mempool.errors import InvalidRequest
from mempool.types.pool import SavedTable, ShardInfo, TableView
from mempool.types.schema import Placement


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ViewChange:
    """What makes a view of one of an earlier epoch, or of the same.

    Attributes:
        from_epoch, epoch: Of the two placements.
        shards: Those that are new, or elsewhere, or were started again.
        gone: Numbers of those that are named no more.
        controller, saved: Of the view that is made.
        digest: Of the view that is made, as ``digest_of``.
        pages: [n, 3] int32: row page, column block, new owner.
        key_pages: [m, 2] int32: key page, new owner.
    """

    table_id: int
    from_epoch: int
    epoch: int
    shards: tuple[ShardInfo, ...]
    gone: tuple[int, ...]
    controller: str
    saved: SavedTable | None
    digest: int
    pages: npt.NDArray[np.int32]
    key_pages: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownView:
    """Which view of a table somebody has. digest: As ``digest_of``."""

    table_id: int
    epoch: int
    digest: int


def known_view(view: TableView) -> KnownView:
    """What tells this view from all others."""
    return KnownView(table_id=view.schema.table_id, epoch=view.placement.epoch, digest=digest_of(view))


def change_between(known: TableView, view: TableView) -> ViewChange | None:
    """What makes ``view`` of ``known``; None where that is more than the view's owners themselves, or another table's,
    or ``known`` is newer."""
    before, after = known.placement, view.placement
    if known.schema != view.schema or after.epoch < before.epoch:
        return None
    if before.epoch == after.epoch and not before.same_owners(after):
        return None
    pages, key_pages = _others(before.owners, after.owners), _others(before.key_owners, after.key_owners)
    if pages.size + key_pages.size >= after.owners.size + after.key_owners.size:
        return None
    were = {info.shard: info for info in known.shards}
    return ViewChange(
        table_id=after.table_id,
        from_epoch=before.epoch,
        epoch=after.epoch,
        shards=tuple(info for info in view.shards if were.get(info.shard) != info),
        gone=tuple(sorted(were.keys() - {info.shard for info in view.shards})),
        controller=view.controller,
        saved=view.saved,
        digest=digest_of(view),
        pages=pages,
        key_pages=key_pages,
    )


def changed(views: Iterable[TableView], change: ViewChange) -> TableView:
    """The view that a change makes of the one among ``views`` that it is of.

    Raises:
        InvalidRequest: There is none, or what comes of it is not the view that was meant.
    """
    known = next((view for view in views if view.schema.table_id == change.table_id), None)
    epoch = None if known is None else known.placement.epoch
    if known is None or epoch != change.from_epoch:
        here = "that table is not here" if known is None else f"epoch {epoch} is here"
        raise InvalidRequest(
            f"a view of table {change.table_id} is told as what is other than in epoch {change.from_epoch}, and {here}:"
            " send the view itself. Nothing was changed"
        )
    infos = {info.shard: info for info in known.shards if info.shard not in change.gone}
    infos |= {info.shard: info for info in change.shards}
    view = TableView(
        schema=known.schema,
        placement=Placement(
            table_id=change.table_id,
            epoch=change.epoch,
            owners=_with(known.placement.owners, change.pages, change),
            key_owners=_with(known.placement.key_owners, change.key_pages, change),
        ),
        shards=tuple(infos[shard] for shard in sorted(infos)),
        controller=change.controller,
        saved=change.saved,
    )
    if digest_of(view) != change.digest:
        raise InvalidRequest(
            f"what is told of epoch {change.epoch} of table {view.schema.name!r} was told of another view of epoch"
            f" {change.from_epoch} than is here: send the view itself. Nothing was changed"
        )
    unnamed = sorted({*change.pages[:, 2].tolist(), *change.key_pages[:, 1].tolist()} - infos.keys())
    if unnamed:
        raise InvalidRequest(
            f"pages of table {view.schema.name!r} are given to shards {unnamed[:10]}, which the view does not name."
            " Nothing was changed"
        )
    return view


def digest_of(view: TableView) -> int:
    """Tells owners and shards of views apart: 64 bits, the same on every machine (``ViewChange`` of the protos)."""
    made = hashlib.blake2b(digest_size=8)
    for owners in (view.placement.owners, view.placement.key_owners):
        made.update(np.ascontiguousarray(owners, dtype="<i4").data)
    for info in sorted(view.shards, key=lambda info: info.shard):
        made.update(f"{info.shard} {info.incarnation} {info.address}\n".encode())
    return int.from_bytes(made.digest(), "little")


class Changes:
    """The changes that were asked for last: many shards are told the same one.

    Args:
        most: How many are kept, with their views.
    """

    def __init__(self, *, most: int = 4) -> None:
        self._most = most
        self._found: list[tuple[TableView, TableView, ViewChange | None]] = []
        self._known: list[tuple[TableView, KnownView]] = []

    def known(self, view: TableView) -> KnownView:
        """As ``known_view``."""
        for each, known in self._known:
            if each is view:
                return known
        found = known_view(view)
        self._known = [*self._known[-self._most + 1 :], (view, found)]
        return found

    def between(self, known: TableView, view: TableView) -> ViewChange | None:
        """As ``change_between``."""
        for before, after, change in self._found:
            if before is known and after is view:
                return change
        found = change_between(known, view)
        self._found = [*self._found[-self._most + 1 :], (known, view, found)]
        return found


class ToldViews:
    """Views that were told of late, to tell those who have one of them what is other by now.

    Args:
        most: How many are kept, of all tables.
        most_owners: Owners of pages, four bytes each, in all of them together.
    """

    def __init__(self, *, most: int = 64, most_owners: int = 2**22) -> None:
        self._most, self._most_owners = most, most_owners
        self._told: OrderedDict[KnownView, TableView] = OrderedDict()  # what was of use last is last
        self._owners = 0
        # By table: what is told again and again is looked at once.
        self._last: dict[int, tuple[TableView, KnownView]] = {}
        self._changes = Changes()

    def tell(self, view: TableView) -> None:
        """This one is told to somebody."""
        table_id = view.schema.table_id
        last = self._last.get(table_id)
        if last is not None and last[0] is view:
            self._told.move_to_end(last[1])
            return
        known = known_view(view)
        before = self._told.pop(known, None)
        self._owners += _num_owners(view) - (0 if before is None else _num_owners(before))
        self._told[known] = view
        self._last[table_id] = view, known
        while len(self._told) > self._most or self._owners > self._most_owners:
            known, old = self._told.popitem(last=False)
            self._owners -= _num_owners(old)
            last = self._last.get(old.schema.table_id)
            if last is not None and last[1] == known:
                del self._last[old.schema.table_id]

    def view(self, known: KnownView) -> TableView:
        """The view that is meant. Raises InvalidRequest where it is not kept any more."""
        view = self._told.get(known)
        if view is None:
            raise InvalidRequest(
                f"a view of table {known.table_id} of epoch {known.epoch} is meant that is not here: send the view "
                "itself. Nothing was changed"
            )
        return view

    def change(self, known: KnownView, view: TableView) -> ViewChange | None:
        """What makes ``view`` of the one that somebody has; None where that is not kept any more, or as of
        ``change_between``."""
        before = self._told.get(known)
        if before is None:
            return None
        self._told.move_to_end(known)
        return self._changes.between(before, view)


def _num_owners(view: TableView) -> int:
    return int(view.placement.owners.size + view.placement.key_owners.size)


def _others(before: npt.NDArray[np.int32], after: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """[n, dims + 1] int32: where owners differ, and those of ``after``."""
    where = np.nonzero(before != after)
    return np.stack([*where, after[where]], axis=1).astype(np.int32)


def _with(owners: npt.NDArray[np.int32], entries: npt.NDArray[np.int32], change: ViewChange) -> npt.NDArray[np.int32]:
    """A copy of owners, with those of entries [n, dims + 1] in their places."""
    where, size = entries[:, :-1], np.array(owners.shape)
    if bool(((where < 0) | (where >= size)).any()):
        raise InvalidRequest(
            f"a view of table {change.table_id} is told to change pages that it does not have: it has"
            f" {list(owners.shape)}. Nothing was changed"
        )
    found = owners.copy()
    found[tuple(where.T)] = entries[:, -1]
    return found
