"""Load evened by heat: which pages a shard has is changed, how many it has is not.

Pages of one kind change places between a shard with much load and one with little: memory stays as even as it was
planned, and whoever plans again without heat finds nothing to move. Exchanges that move no page more than was planned
come first. Shapes: P row pages, C blocks, U units (what moves as one), B blocks of a unit.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from mempool.placement.assignment import Int32Array
from mempool.placement.runs import Int64Array
from mempool.types.schema import Layout

__all__ = ["TOLERANCE", "FloatArray", "even"]

FloatArray = npt.NDArray[np.float64]

TOLERANCE = 0.05
"""A shard whose load is this part above the mean is left as it is."""
_LEAST_GAIN = TOLERANCE / 4
"""What takes less than this part of the mean off a shard is not worth its moves."""
_ALONE = -1
"""Comes back in place of a unit where one goes alone, as it may from a shard that has one more."""

_MOST_LOOKED_AT = 512
"""Moves of which it is found out whether they are needed after all: of many, few are not."""

# Of two units that change places: how many more moves each makes of the plan, by sign. What costs nothing comes first.
_FREE = ((-1, -1), (-1, 0), (0, -1), (0, 0), (-1, 1), (1, -1))
_DEAR = ((0, 1), (1, 0), (1, 1))

_Prices = tuple[tuple[int, int], ...]

_NONE = np.empty(0, dtype=np.int64)


def even(target_PC: Int32Array, present_PC: Int32Array, heat_P: FloatArray, *, layout: Layout, num_shards: int) -> None:
    """Changes planned owners, in place, until no shard's load is more than ``TOLERANCE`` above the mean, if it can be.

    It ends sooner where a page is too hot: two shards then differ by no more than the heat of the hottest unit and the
    tolerance. With ``columns``, and ``auto`` where the shards divide the blocks, loads are even by themselves. With
    ``auto`` pages change places within their block, so that there are no more (shard, block) pairs.

    Args:
        target_PC: Owners as indices below ``num_shards``, as the layout has them without heat.
        present_PC: The owners now, -1 where that is none of the shards.
        heat_P: How much each row page is read and written, in all its blocks: finite, none negative.
        layout: The table's.
        num_shards: S.
    """
    num_rows, num_blocks = target_PC.shape
    if layout == "columns" or (layout == "auto" and num_blocks % num_shards == 0) or not heat_P.any():
        return
    every_shard, one_kind = np.arange(num_shards), np.zeros(num_rows, dtype=np.int64)
    if layout == "auto":
        kind_U = np.tile(np.arange(num_blocks), num_rows)
        units = _Units(target_PC.ravel().copy(), present_PC.reshape(-1, 1), np.repeat(heat_P, num_blocks), kind_U)
        _Exchanges(units, every_shard).run()
        target_PC[:] = units.owner_U.reshape(target_PC.shape)
        return
    # Of a grid, column groups have shards of their own: whoever owns a block's first page tells to which it belongs.
    group_C = target_PC[0] if layout == "grid" else np.zeros(num_blocks, dtype=np.int64)
    for group in np.unique(group_C).tolist():
        blocks = np.flatnonzero(group_C == group)
        units = _Units(target_PC[:, blocks[0]].copy(), present_PC[:, blocks], heat_P, one_kind)
        _Exchanges(units, np.unique(units.owner_U) if layout == "grid" else every_shard).run()
        target_PC[:, blocks] = units.owner_U[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class _Units:
    """What moves as one.

    Attributes:
        owner_U: Planned; changed here.
        present_UB: The owners of each one's pages now.
        heat_U: Load of each.
        kind_U: Those of one kind may change places.
    """

    owner_U: Int32Array
    present_UB: Int32Array
    heat_U: FloatArray
    kind_U: Int64Array

    def price(self, units: Int64Array, *, of: int, to: int) -> Int64Array:
        """Whether a unit of one shard that goes to the other makes moves more (1) or fewer (-1), or as many (0)."""
        present = self.present_UB[units]
        prices: Int64Array = np.sign((present == of).sum(axis=1) - (present == to).sum(axis=1)).astype(np.int64)
        return prices

    def heat(self, units: Int64Array) -> FloatArray:
        return np.where(units == _ALONE, 0.0, self.heat_U[units])


class _Exchanges:
    """Between some shards, the hottest first, until they are even or nothing helps.

    Args:
        units: What they have; owners are changed.
        shards: They, ascending.
    """

    def __init__(self, units: _Units, shards: Int64Array) -> None:
        self._units = units
        self._planned_U = units.owner_U.copy()
        order = np.argsort(units.owner_U, kind="stable")
        cuts = np.cumsum(np.bincount(units.owner_U, minlength=int(shards[-1]) + 1))
        self._owned = dict(enumerate(np.split(order, cuts[:-1])))
        self._shards = shards.tolist()
        self._counts = np.bincount(units.owner_U, minlength=self._shards[-1] + 1)
        self._loads = np.bincount(units.owner_U, weights=units.heat_U, minlength=self._shards[-1] + 1)
        self._mean = float(self._loads.sum()) / len(self._shards)

    def run(self) -> None:
        for _ in range(2):  # what came home may have made room for more
            self._even_out()
            if (self._units.owner_U != self._planned_U).any():
                self._send_home()

    def _even_out(self) -> None:
        for prices in (_FREE, _FREE + _DEAR):
            movable = set(self._shards)
            # Each exchange lessens the sum of the loads' squares, so that this ends; the bound is one of time.
            for _ in range(16 * len(self._shards)):
                hot = max(movable, key=lambda shard: (self._loads[shard], -shard), default=None)
                if hot is None or self._is_even(hot):
                    break
                if not self._relieve(hot, prices):
                    movable.remove(hot)

    def _send_home(self) -> None:
        """Takes back moves that are not needed: units of which one comes home change places, while loads allow it."""
        units = self._units
        home_U = np.where((units.present_UB == units.present_UB[:, :1]).all(axis=1), units.present_UB[:, 0], -1)
        moved = np.flatnonzero((units.owner_U != home_U) & np.isin(home_U, self._shards))
        if moved.size > _MOST_LOOKED_AT:
            return
        limit = max(self._mean * (1 + TOLERANCE), float(self._loads.max()))
        heat, kind, home = units.heat_U[moved], units.kind_U[moved], home_U[moved]
        for both in (True, False):  # first those that both come home
            for _ in range(moved.size):
                owner = units.owner_U[moved]
                # One row for each that comes home, one column for each that makes room for it there.
                fits = (owner[None, :] == home[:, None]) & (kind[None, :] == kind[:, None])
                fits &= (home[None, :] == owner[:, None]) if both else (home[None, :] != home[:, None])
                more = heat[:, None] - heat[None, :]
                fits &= self._loads[home][:, None] + more <= limit
                fits &= self._loads[owner][:, None] - more <= limit
                if not fits.any():
                    break
                one, other = divmod(int(np.where(fits, np.abs(more), np.inf).argmin()), moved.size)
                here, there, gone = int(owner[one]), int(home[one]), float(more[one, other])
                units.owner_U[moved[[one, other]]] = there, here
                for shard in (here, there):
                    self._owned[shard] = np.flatnonzero(units.owner_U == shard)
                self._loads[here] -= gone
                self._loads[there] += gone

    def _is_even(self, shard: int) -> bool:
        return bool(self._loads[shard] <= self._mean * (1 + TOLERANCE))

    def _relieve(self, hot: int, prices: _Prices) -> bool:
        """Takes load off a shard. Returns whether any went."""
        relieved = False
        for cold in sorted(self._shards, key=lambda shard: (self._loads[shard], shard)):
            if self._is_even(hot):
                break
            relieved |= self._exchange(hot, cold, prices)
        return relieved

    def _exchange(self, hot: int, cold: int, prices: _Prices) -> bool:
        """Lets units of two shards change places, as few as bring one of them to the mean. Returns whether any did."""
        least, gap = self._mean * _LEAST_GAIN, self._loads[hot] - self._loads[cold]
        if gap < 2 * least:
            return False
        lacking = self._mean - self._loads[cold]
        # Who lacks nothing takes half of it, and hands it on: with ``auto`` not every two shards share a block.
        wanted = min(self._loads[hot] - self._mean, lacking) if lacking > least else gap / 2
        gives, takes = self._offers(hot, to=cold, hottest_first=True), self._offers(cold, to=hot, hottest_first=False)
        kinds = sorted({kind for kind, _ in gives} & {kind for kind, _ in takes})
        alone = bool(self._counts[hot] > self._counts[cold])
        given, taken, gone = [], [], 0.0
        for (price, other), kind in product(prices, kinds):
            mine, its = gives.get((kind, price), _NONE), takes.get((kind, other), _NONE)
            if alone and other == 0:  # one move in place of two
                its = np.concatenate([[_ALONE], its])
            # The largest differences first: so the fewest change places.
            pairs = min(mine.size, its.size)
            less = self._units.heat(mine[:pairs]) - self._units.heat(its[:pairs])
            pairs = int(((less > 0) & (gone + np.cumsum(less) <= wanted)).sum())  # both hold for the first ones
            if pairs:
                given.append(mine[:pairs])
                taken.append(its[:pairs])
                gone += float(less[:pairs].sum())
                gives[kind, price], takes[kind, other] = mine[pairs:], its[pairs:]
                alone &= other != 0
        last = self._last(gives, takes, kinds, prices, wanted=wanted - gone, gap=gap - 2 * gone, alone=alone)
        if last is not None:
            given.append(np.array([last[0]]))
            taken.append(np.array([last[1]]))
        return bool(given) and self._swap(hot, cold, np.concatenate(given), np.concatenate(taken), gap=gap)

    def _swap(self, hot: int, cold: int, given: Int64Array, taken: Int64Array, *, gap: float) -> bool:
        gone = float(self._units.heat(given).sum() - self._units.heat(taken).sum())
        if min(gone, gap - gone) < self._mean * _LEAST_GAIN:
            return False
        self._units.owner_U[given] = cold
        self._units.owner_U[taken[taken != _ALONE]] = hot
        both = np.concatenate([self._owned[hot], self._owned[cold]])
        for shard in (hot, cold):
            self._owned[shard] = both[self._units.owner_U[both] == shard]
        alone = int((taken == _ALONE).sum())
        for shard, sign in ((hot, -1), (cold, 1)):
            self._counts[shard] += sign * alone
            self._loads[shard] += sign * gone
        return True

    def _offers(self, shard: int, *, to: int, hottest_first: bool) -> dict[tuple[int, int], Int64Array]:
        """A shard's units by kind and price of going to another, each list by heat."""
        owned = self._owned[shard]
        heat = self._units.heat_U[owned]
        owned = owned[np.argsort(-heat if hottest_first else heat, kind="stable")]
        kinds, prices = self._units.kind_U[owned], self._units.price(owned, of=shard, to=to)
        offers = {}
        for kind in np.unique(kinds).tolist():
            for price in (-1, 0, 1):
                offers[kind, price] = owned[(kinds == kind) & (prices == price)]
        return offers

    def _last(
        self,
        gives: dict[tuple[int, int], Int64Array],
        takes: dict[tuple[int, int], Int64Array],
        kinds: list[int],
        prices: _Prices,
        *,
        wanted: float,
        gap: float,
        alone: bool,
    ) -> tuple[int, int] | None:
        """The two units that come nearest to what is still wanted, if that is worth it; or one, and ``_ALONE``."""
        least = self._mean * _LEAST_GAIN
        if wanted < least:
            return None
        best: tuple[float, int, int] | None = None
        candidates: list[tuple[Int64Array, Int64Array]] = []
        for (price, other), kind in product(prices, kinds):
            mine, its = gives.get((kind, price), _NONE), takes.get((kind, other), _NONE)
            after = np.searchsorted(self._units.heat(its), self._units.heat(mine) - wanted)
            if alone and other == 0:
                candidates.append((mine, np.full_like(mine, _ALONE)))
            if its.size:
                nearest = np.maximum(after - 1, 0), np.minimum(after, its.size - 1)
                candidates += [(mine, its[place]) for place in nearest]
        for mine, its in candidates:
            less = self._units.heat(mine) - self._units.heat(its)
            missed = np.where(np.minimum(less, gap - less) >= least, np.abs(less - wanted), np.inf)
            found = int(missed.argmin()) if missed.size else 0
            if missed.size and missed[found] < (np.inf if best is None else best[0]):
                best = float(missed[found]), int(mine[found]), int(its[found])
        return None if best is None else best[1:]
