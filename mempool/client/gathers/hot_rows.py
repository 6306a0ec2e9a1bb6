"""Rows that were read before, kept by the client: a gather sends only ids of others. Off unless a user gives it memory.

It serves gathers of one row a bag without weights, as n-gram memories read them, whose answers are rows: bitwise those
of the shards. (A sum of many rows costs 8 bytes a pair on the wire; its rows here would cost more to add up.) None is
answered without the shards: each that has a part in a kept row says with the answer of the others, or of a row that is
asked for again, by its stamp that nothing of its own has changed since. Where something has, all is asked for anew.

Which rows are kept: each id has a set of places; what is found there gains a use, what finds no place free of uses
takes one from each of that set (Misra and Gries's frequent items), so that rows that come once displace none that come
often.

Legend: B bags, L pairs, h of them kept here, m distinct rows asked for, V value dim.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool.client.routing.attempt import LookupRecord, SortedPairs
from mempool.client.routing.plan import TablePlan
from mempool.errors import InvalidRequest
from mempool.types import Stamp
from mempool.types.bags import Bags

T = TypeVar("T")
Ask = Callable[[Bags], tuple[Tensor, LookupRecord]]
_Numbers: TypeAlias = npt.NDArray[Any]
_Mark: TypeAlias = tuple[int, int, int, int]
"""Epoch, incarnation, version, writes of a shard's rows: ascending, and the rows are the same while they are."""

_WAYS = 8
_MOST_USES = 15
_BESIDE_BYTES = 9
"""Of a place, beside its row: id and uses."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatus:
    """Of a table's rows that are kept here.

    Attributes:
        num_bytes: What it may take.
        rows: So many are kept now.
        hits, misses: Rows that gathers took from here, and that they asked shards for, each as often as it was named.
        emptied: How often all rows were dropped, as the table had changed.
    """

    num_bytes: int
    rows: int
    hits: int
    misses: int
    emptied: int

    @property
    def hit_rate(self) -> float:
        """Of all rows named, 0 where there were none."""
        return self.hits / (self.hits + self.misses) if self.hits else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """What is kept of one gather.

    values: [L, V], rows of the kept in their places; of the others anything. missing: [L] bool. owed: By shard, of
    what mark the kept rows are.
    """

    values: Tensor
    missing: _Numbers
    owed: dict[int, _Mark]

    def confirmed(self, record: LookupRecord) -> bool:
        """Whether all shards that have a part in kept rows said that these are as they were."""
        marks = _marks_of(record.stamps)
        return all(marks.get(shard) == mark for shard, mark in self.owed.items())


class HotRows:
    """The kept rows of one table. All threads may use it.

    Args:
        num_bytes: What rows, their ids and uses may take.

    Raises:
        InvalidRequest: Less than one set of places takes.
    """

    def __init__(self, *, num_bytes: int, num_slots: int, value_dim: int, table: str) -> None:
        row_bytes = 4 * value_dim + _BESIDE_BYTES
        if num_bytes < _WAYS * row_bytes:
            raise InvalidRequest(
                f"table {table!r}: cache_bytes = {num_bytes} keeps no rows: give at least {_WAYS * row_bytes:,}, for "
                f"{_WAYS} rows of {row_bytes:,} bytes, or 0 for none"
            )
        sets = min(num_bytes // (_WAYS * row_bytes), num_slots)
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        self._busy = 0  # the thread that has it
        self._ids = np.full((sets, _WAYS), -1, dtype=np.int64)
        self._uses = np.full((sets, _WAYS), -1, dtype=np.int8)  # -1: free
        self._rows = torch.empty(sets * _WAYS, value_dim, dtype=torch.float32, device="cpu")
        self._marks: dict[int, _Mark] = {}  # of every shard that has a part in a kept row
        self._reply_dtype = ""
        self._hits = self._misses = self._emptied = 0

    @property
    def status(self) -> CacheStatus:
        rows = int(np.count_nonzero(self._ids >= 0))
        return CacheStatus(
            num_bytes=self._num_bytes, rows=rows, hits=self._hits, misses=self._misses, emptied=self._emptied
        )

    def gather(
        self, bags: Bags, *, plan: TablePlan, known_version: int, reply_dtype: str, ask: Ask
    ) -> tuple[Tensor, LookupRecord] | None:
        """Rows [B, V] float32, zeros for empty bags, and the record of a look-up that no shard remembers; None for bags
        of other kinds.

        Args:
            plan: As it is known.
            known_version: The newest of the table that is known.
            reply_dtype: What values are on the wire.
            ask: Asks the shards for sums of bags, which they are not to remember.
        """
        bag_of = _bag_of_each(bags)
        if bag_of is None or not bags.num_pairs:
            return None
        ids = bags.ids.numpy()
        cut = self._alone(partial(self._cut, ids, plan, known_version, reply_dtype))
        if cut is None:
            return None
        asked, places, times, rows, record = _asked(ids[cut.missing], ask)
        values, missing = cut.values, cut.missing
        if not cut.confirmed(record):
            asked, places, times, rows, record = _asked(ids, ask)
            missing = np.ones(len(ids), dtype=np.bool_)
        self._alone(partial(self._keep, asked, rows, times, record, reply_dtype, hits=int(np.count_nonzero(~missing))))
        values[torch.from_numpy(missing)] = rows[places]
        if bags.num_bags != len(ids):
            every = torch.zeros(bags.num_bags, values.shape[1], dtype=torch.float32, device="cpu")
            every[bag_of] = values
            values = every
        return values, replace(record, bags=bags, lookups=1, sorted=SortedPairs())

    def _alone(self, do: Callable[[], T]) -> T | None:
        """What it answers, no other thread at it meanwhile; None, and nothing is done, where a handler of a signal has
        interrupted this thread at it."""
        if self._busy == threading.get_ident():
            return None
        with self._lock:
            self._busy = threading.get_ident()
            try:
                return do()
            finally:
                self._busy = 0

    def _cut(self, ids: _Numbers, plan: TablePlan, known_version: int, reply_dtype: str) -> _Cut:
        self._drop_what_is_old(plan, known_version, reply_dtype)
        at = self._find(ids)
        again, owners = _to_confirm(plan, ids, at >= 0)
        at[again] = -1
        kept = at[at >= 0]
        self._uses.reshape(-1)[kept] = np.minimum(self._uses.reshape(-1)[kept] + 1, _MOST_USES)
        # Rows of the others are read, too, and written over: one pass instead of two.
        values = torch.index_select(self._rows, 0, torch.from_numpy(np.maximum(at, 0)))
        return _Cut(values, at < 0, {shard: self._marks[shard] for shard in owners})

    def _drop_what_is_old(self, plan: TablePlan, known_version: int, reply_dtype: str) -> None:
        if reply_dtype != self._reply_dtype:
            self._empty()
            self._reply_dtype = reply_dtype
        elif any(mark[0] != plan.epoch or mark[2] < known_version for mark in self._marks.values()):
            self._empty()

    def _empty(self) -> None:
        self._ids.fill(-1)  # before all else: an interrupt may come anywhere
        self._uses.fill(-1)
        if self._marks:
            self._emptied += 1
        self._marks = {}

    def _find(self, ids: _Numbers) -> _Numbers:
        """[n] int64, places of these ids; -1 where there is none."""
        sets = self._set_of(ids)
        found = self._ids[sets] == ids[:, None]
        ways = found.argmax(axis=1)
        return np.where(found[np.arange(len(ids)), ways], sets * _WAYS + ways, -1)

    def _set_of(self, ids: _Numbers) -> _Numbers:
        mixed = (ids.astype(np.uint64) * _GOLDEN) >> np.uint64(32)
        return ((mixed * np.uint64(len(self._ids))) >> np.uint64(32)).astype(np.int64)

    def _keep(
        self, ids: _Numbers, rows: Tensor, times: _Numbers, record: LookupRecord, reply_dtype: str, *, hits: int
    ) -> None:
        """Keep rows [m, V] of distinct ids that were named so many times, where there is a place for them."""
        self._hits += hits
        self._misses += int(times.sum())
        marks = _marks_of(record.stamps)
        known = [(mark, self._marks[shard]) for shard, mark in marks.items() if shard in self._marks]
        late = any(mark < newest for mark, newest in known)  # an answer that another thread's has overtaken
        unclear = not marks or len(marks) < len({stamp.shard for stamp in record.stamps})
        if unclear or late or reply_dtype != self._reply_dtype:
            return
        if any(mark > newest for mark, newest in known):
            self._empty()
        self._marks |= marks
        self._place(ids, rows, times)

    def _place(self, ids: _Numbers, rows: Tensor, times: _Numbers) -> None:
        new = np.flatnonzero(self._find(ids) < 0)
        sets = self._set_of(ids[new])
        order = np.lexsort((-times[new], sets))  # of those of one set, the most frequent first
        new, sets = new[order], sets[order]
        touched, firsts, which = np.unique(sets, return_index=True, return_inverse=True)
        rank = np.arange(len(sets)) - firsts[which]
        worst_first = np.argsort(self._uses[touched], axis=1, kind="stable")
        ways = worst_first[which, np.minimum(rank, _WAYS - 1)]
        taken = (rank < _WAYS) & (self._uses[sets, ways] <= 0)
        crowded = np.unique(sets[~taken])
        self._uses[crowded] -= self._uses[crowded] > 0
        new, sets, ways = new[taken], sets[taken], ways[taken]
        self._ids[sets, ways] = -1  # an interrupt may come anywhere, and a row is there before its id is
        self._rows[torch.from_numpy(sets * _WAYS + ways)] = rows[torch.from_numpy(new)]
        self._uses[sets, ways] = np.minimum(times[new], _MOST_USES)
        self._ids[sets, ways] = ids[new]


def _bag_of_each(bags: Bags) -> Tensor | None:
    """[L] the bag of each pair; None where pairs have weights, or a bag has more than one."""
    if bags.weights is not None or bags.num_pairs > bags.num_bags:
        return None
    sizes = bags.offsets[1:] - bags.offsets[:-1]
    return torch.nonzero(sizes).reshape(-1) if int(sizes.max()) == 1 else None


def _asked(ids: _Numbers, ask: Ask) -> tuple[_Numbers, Tensor, _Numbers, Tensor, LookupRecord]:
    """Rows of these ids as shards have them: distinct ids [m], of each of ``ids`` which, how often, rows [m, V]."""
    distinct, places, times = np.unique(ids, return_inverse=True, return_counts=True)
    offsets = torch.arange(len(distinct) + 1, dtype=torch.int64, device="cpu")
    rows, record = ask(Bags(ids=torch.from_numpy(distinct), weights=None, offsets=offsets))
    return distinct, torch.from_numpy(places), times, rows, record


def _to_confirm(plan: TablePlan, ids: _Numbers, kept: _Numbers) -> tuple[_Numbers, Iterable[int]]:
    """Kept rows that are asked for again, [n] positions, so that each shard that has a part in kept ones answers; and
    those shards."""
    if not kept.any():
        return np.empty(0, dtype=np.int64), ()
    if not plan.sortings:  # every shard is asked whatever the ids
        again = np.flatnonzero(kept)[: int(kept.all())]
        return again, [route.shard for route in plan.routes]
    owners, pages = plan.page_owners.numpy(), ids >> plan.schema.page_shift
    of_page = np.full(len(owners), -1, dtype=np.int64)
    of_page[pages[kept]] = np.flatnonzero(kept)  # of each page of kept rows one of these
    there = np.flatnonzero(of_page >= 0)
    owing, first = np.unique(owners[there], return_index=True)
    asked = np.unique(owners[np.unique(pages[~kept])])
    of_owner = of_page[there[first // owners.shape[1]]]
    return np.unique(of_owner[~np.isin(owing, asked)]), owing.tolist()


def _marks_of(stamps: Iterable[Stamp]) -> dict[int, _Mark]:
    """By shard, of what its answers were made; without those that do not say, or said different things."""
    marks: dict[int, _Mark] = {}
    unclear = set()
    for stamp in stamps:
        mark = stamp.epoch, stamp.incarnation, stamp.table_version, stamp.writes
        if not stamp.writes or marks.setdefault(stamp.shard, mark) != mark:
            unclear.add(stamp.shard)
    return {shard: mark for shard, mark in marks.items() if shard not in unclear}
