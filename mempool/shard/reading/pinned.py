"""A table as it is read at a pinned moment: the same answers, of that moment's rows.

Of a read that names no row which was written since, rows are read where they lie; else those that are named are laid
side by side first, as they were. Runs on the engine's thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mempool import kernels
from mempool.agreement.readers.pins import Moment
from mempool.errors import InvalidRequest, RequestTooLarge
from mempool.shard import bounds
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.named_arrays import KEYS, LAST_STEP, SCALES, VALUES
from mempool.shard.pages.scoring import Picked
from mempool.shard.pages.storage import Lane, Storage
from mempool.shard.reading.arrays import rows_then
from mempool.shard.reading.kept import KeptRows
from mempool.shard.reading.moments import Moments
from mempool.shard.reading.pieces import parts_of
from mempool.types import OwnKeySpec, PinReply, PinRequest, Stamp
from mempool.types.bags import Bags

_PIECE_BYTES = 16 * 2**20
"""Of rows that are laid side by side at once."""
_LARGEST_BAG_BYTES = 256 * 2**20
"""Of the rows of one bag, which is not cut."""
_LONGEST_LEASE_S = 600.0
_READ = (VALUES, SCALES, KEYS)


@dataclass(slots=True, eq=False)
class PinnedTable:
    """A table at a moment, for whoever answers reads.

    Attributes:
        hosted: The table; storage: its rows then.
        stamp: Of answers: of that version.
    """

    hosted: HostedTable
    storage: Storage
    stamp: Stamp

    @property
    def table_id(self) -> int:
        return self.hosted.table_id

    @property
    def epoch(self) -> int:
        return self.hosted.epoch

    @property
    def lookups(self) -> int:
        return self.hosted.lookups

    @lookups.setter
    def lookups(self, lookups: int) -> None:
        self.hosted.lookups = lookups


def pinned(table: HostedTable, pin: str) -> PinnedTable:
    """Raises VersionGone where the pin is not here any more."""
    moment = table.storage.moments.pins.moment(pin)
    return PinnedTable(table, PinnedStorage(table.storage, moment), replace(table.stamp, table_version=moment.version))


def answered_pin(table: HostedTable, request: PinRequest, *, now_s: float) -> PinReply:
    """Take, keep or release a pin. Raises as ``Pins`` does, and InvalidRequest for what cannot be meant."""
    bounds.check_token(request.pin)
    bounds.check_token(request.name)
    bounds.check_number("version", request.version)
    bounds.check_number("beside", request.beside or 0)
    nobody = not request.pin and not (request.do == "release" and request.name)
    if nobody or not 0.0 <= request.lease_s <= _LONGEST_LEASE_S:
        raise InvalidRequest(
            f"a pin has a token and a lease of at most {_LONGEST_LEASE_S:g} s; got {bounds.shown(request.pin)} and "
            f"{request.lease_s:g} s. Nothing was changed."
        )
    moments, ends_s = table.storage.moments, now_s + request.lease_s
    moments.expire(now_s)
    if request.do == "release":
        moments.release(request.pin, name=request.name)
        return PinReply(stamp=table.stamp, version=0)
    if request.do == "arm":
        version = table.ledger.version
        moment = moments.arm(request.pin, version=version, name=request.name, ends_s=ends_s)
    elif request.do == "attach":
        moment = moments.attach(
            request.pin, version=request.version, name=request.name, ends_s=ends_s, beside=request.beside
        )
    elif request.do == "settle":
        moment = moments.settle(request.pin, request.version, ends_s=ends_s, beside=request.beside)
    else:
        moment = moments.pins.renew(request.pin, ends_s=ends_s, keep=bool(request.name))
    return PinReply(stamp=table.stamp, version=moment.version)


class PinnedStorage(Storage):
    """The pages of a table as they were at a moment: for reads alone, within one job.

    Args:
        storage: As they are.
        moment: One that is kept.
    """

    def __init__(self, storage: Storage, moment: Moment) -> None:
        self.__dict__.update(storage.__dict__)
        self._now = storage
        self._moment = moment
        self._moments: Moments = storage.moments
        self._schedule, self.schedule = storage.schedule, None
        self.heads, self.head_keys = self._moments.heads(moment)

    def pooled(
        self,
        bags: Bags,
        dtype: torch.dtype = torch.float32,
        *,
        for_step: bool = False,  # noqa: ARG002  none follows
        out: Tensor | None = None,
    ) -> Tensor:
        """As of ``Storage``. Raises RequestTooLarge for a bag of more rows than are laid side by side."""
        if (then := self._as_arrays(bags)) is not None:
            return kernels.weighted_sum(
                then[0], then[1], bags.weights, bags.offsets, dtype=dtype, out=out, checked=True
            )
        sums = torch.empty((bags.num_bags, self.width), dtype=dtype, device=self.device) if out is None else out
        row_bytes = max(1, sum(kept.row_bytes for kept in self._kept()))
        for first, end, part in parts_of(bags, lambda: _PIECE_BYTES // row_bytes):
            storage, ids = self._at(part.ids)
            if storage is not self:
                if part.num_pairs * row_bytes > _LARGEST_BAG_BYTES and end - first == 1:
                    raise RequestTooLarge(
                        f"a bag of {part.num_pairs:,} pairs of table {self.schema.name!r}: at a pinned version one bag "
                        f"reads at most {_LARGEST_BAG_BYTES // row_bytes:,} rows. Cut it, and add up the sums"
                    )
                part = Bags(ids=ids.to(part.ids.dtype), weights=part.weights, offsets=part.offsets)
            Storage.pooled(storage, part, dtype, out=sums[first:end])
        return sums

    def _as_arrays(self, bags: Bags) -> tuple[kernels.Paged, Tensor] | None:
        """Rows as they were, and the bags' ids there, of the usual few on a CPU."""
        if self._now.array_rows is None or bags.ids.dtype != torch.int32:
            return None
        if not 0 < bags.num_pairs * self._kept()[0].row_bytes <= _PIECE_BYTES:
            return None
        then = rows_then(self._now, self._moment, bags.ids.numpy())
        return None if then is None else (then[0], torch.from_numpy(then[1]))

    def read(self, name: str, ids_M: Tensor) -> Tensor:
        """As of ``Storage``; of values, their scales and keys alone."""
        if name not in _READ:
            raise InvalidRequest(
                f"table {self.schema.name!r} is read at version {self._moment.version}: values and keys are kept for "
                f"that, and not {bounds.shown(name)}. A checkpoint has all of a version. Nothing was changed."
            )
        if name not in self.arrays:
            return Storage.read(self, name, ids_M)
        storage, ids = self._at(ids_M)
        return Storage.read(storage, name, ids)

    def score(
        self, queries_BHD: Tensor, topk: int, *, picked: Picked | None = None
    ) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """As of ``Storage``."""
        own = isinstance(self.schema.keys, OwnKeySpec)
        flat = [lane for lane in self._lanes if own or lane.arena.has(KEYS)]
        late = own and self._schedule is not None  # of which all rows have to be brought to that step
        if not late and not any(self._moments.kept(lane.arena).any_copied(self._moment.number) for lane in flat):
            return Storage.score(self, queries_BHD, topk, picked=picked)
        return Storage.score(self._with(self._pieces(flat)), queries_BHD, topk, picked=picked)

    def _kept(self) -> list[KeptRows]:
        return [self._moments.kept(lane.arena) for lane in self._lanes]

    def _at(self, ids: Tensor) -> tuple[Storage, Tensor]:
        """A storage that has these slots [M] as they were, and by which ids [M] it knows them."""
        found = [lane.arena.locate(ids) for lane in self._lanes]
        places = [kept.find(self._moment.number, rows) for kept, (_, rows) in zip(self._kept(), found, strict=True)]
        if not len(ids) or (self._schedule is None and not any(bool((copies >= 0).any()) for copies in places)):
            return self, ids
        lanes = []
        for lane, (here, rows), copies in zip(self._lanes, found, places, strict=True):
            table = torch.full((len(ids),), -1, dtype=torch.int32, device=self.device)
            table[here] = torch.arange(len(rows), dtype=torch.int32, device=self.device)
            lanes.append(replace(lane, arena=self._laid(lane.arena, rows, copies, table, shift=0)))
        return self._with(tuple(lanes)), torch.arange(len(ids), dtype=torch.int64, device=self.device)

    def _pieces(self, lanes: list[Lane]) -> Iterator[Lane]:
        """All pages, some at a time, under the ids that they have."""
        slots, shift = self.schema.page_slots, self.schema.page_shift
        for lane in lanes:
            arena, kept = lane.arena, self._moments.kept(lane.arena)
            pages = np.flatnonzero(arena.page_of >= 0)
            most = max(1, _PIECE_BYTES // max(1, kept.row_bytes * slots))
            for first in range(0, len(pages), most):
                some = torch.from_numpy(pages[first : first + most]).to(self.device)
                ids = ((some[:, None] << shift) + torch.arange(slots, device=self.device)).view(-1)
                rows = arena.locate(ids)[1]
                table = torch.full((len(arena.page_of),), -1, dtype=torch.int32, device=self.device)
                table[some] = torch.arange(len(some), dtype=torch.int32, device=self.device)
                copies = kept.find(self._moment.number, rows)
                yield replace(lane, arena=self._laid(arena, rows, copies, table, shift=shift))

    def _laid(self, arena: Arena, rows: Tensor, copies: Tensor, table: Tensor, *, shift: int) -> Arena:
        """Rows [M] of an arena as they were, side by side behind a page table."""
        stores = self._moments.kept(arena).read(rows, copies)
        if self._schedule is not None:
            to = self._moments.last_step(self._moment)
            late = (stores[LAST_STEP].amin(dim=1) < to).nonzero()[:, 0]
            if late.numel():
                arena.bring_up(stores, late, self._schedule, self.step_names, to=to)
        return _LaidRows(arena, stores, table, shift=shift)

    def _with(self, lanes: "tuple[Lane, ...] | Iterator[Lane]") -> Storage:
        storage = Storage.__new__(Storage)
        storage.__dict__.update(self.__dict__)
        storage._lanes = lanes  # type: ignore[assignment]  # they are gone through once
        return storage


class _LaidRows(Arena):
    """Rows that were laid side by side, as an arena that is read.

    Args:
        arena: Whose rows they are.
        stores: They, by store.
        page_table: [P] int32: where each of its pages, of ``2**shift`` rows, lies among them.
    """

    def __init__(self, arena: Arena, stores: dict[str, Tensor], page_table: Tensor, *, shift: int) -> None:
        self.__dict__.update(arena.__dict__)
        self._stores = stores
        self._page_table, self._page_shift, self._page_slots = page_table, shift, 1 << shift
        self._paged: dict[str, kernels.Paged] = {}
