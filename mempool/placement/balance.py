"""Units to shards with bounded loads, keeping as much as possible where it is: an exact transportation problem.

Solved by successive shortest paths over the shards (Ahuja, Magnanti, Orlin: Network Flows, section 9.7); units that are
alike count as one kind. Knows nothing of pages or layouts. Shapes: U units, K kinds, S shards.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from mempool.placement.runs import Int64Array

__all__ = ["assign", "bounds", "transport"]

_FAR = np.int64(1) << np.int64(60)


def bounds(num_units: int, num_shards: int) -> tuple[int, int]:
    """Smallest and largest load of a shard when ``num_units`` are balanced to one unit."""
    return num_units // num_shards, -(-num_units // num_shards)


def transport(keep_KS: Int64Array, counts_K: Int64Array, *, low: int, high: int) -> Int64Array:
    """Chooses how many units of each kind every shard gets, so that the sum of ``keep`` is largest.

    Args:
        keep_KS: ``[K, S]`` what is gained when a unit of kind k goes to shard s.
        counts_K: ``[K]`` number of units of each kind, at least 1.
        low: least load of a shard, in units.
        high: largest load of a shard; ``S * low <= counts.sum() <= S * high``.

    Returns:
        ``[K, S]`` int64 units; rows add up to ``counts_K``, columns are within ``low`` and ``high``. The same input
        gives the same result.
    """
    num_kinds, num_shards = keep_KS.shape
    assert num_shards * low <= int(counts_K.sum()) <= num_shards * high
    if num_kinds == 1 and (keep_KS == keep_KS[0, 0]).all():
        return _even(int(counts_K[0]), num_shards, low=low, high=high)[None, :]
    # Every unit where it gains most is the best of all divisions that ignore loads; each shortest path then changes the
    # loads at the least cost, so the division stays the best one for its loads.
    units_KS = np.zeros((num_kinds, num_shards), dtype=np.int64)
    units_KS[np.arange(num_kinds), keep_KS.argmax(axis=1)] = counts_K
    network = _Network(keep_KS=keep_KS, units_KS=units_KS)
    while (network.loads > high).any():
        network.push(supply=network.loads - high, demand=high - network.loads)
    while (network.loads < low).any():
        network.push(supply=network.loads - low, demand=low - network.loads)
    return network.units_KS


def _even(num_units: int, num_shards: int, *, low: int, high: int) -> Int64Array:
    """What the paths come to where nobody keeps anything, as with a new table, without going them: cubic in shards."""
    full, rest = divmod(num_units, high)
    loads = np.zeros(num_shards, dtype=np.int64)
    loads[:full] = high
    loads[full : full + 1] = rest
    lacking = int(np.maximum(low - loads, 0).sum())
    if lacking:
        loads = np.maximum(loads, low)
        givers = np.flatnonzero(loads > low)
        given = np.minimum(np.cumsum(loads[givers] - low), lacking)
        loads[givers] -= np.diff(given, prepend=0)
    return loads


def assign(keep_US: Int64Array, *, low: int, high: int) -> Int64Array:
    """Chooses the shard of every unit ``[U]``, as ``transport`` does; like units go to shards in ascending order."""
    keep_KS, kind_U = np.unique(keep_US, axis=0, return_inverse=True)
    kind_U = kind_U.reshape(-1)
    units_KS = transport(keep_KS, np.bincount(kind_U), low=low, high=high)
    shard_U = np.empty(kind_U.size, dtype=np.int64)
    shards = np.tile(np.arange(keep_KS.shape[1]), len(keep_KS))
    shard_U[np.argsort(kind_U, kind="stable")] = np.repeat(shards, units_KS.ravel())
    return shard_U


@dataclass(slots=True, eq=False)
class _Network:
    """The residual graph between shards: ``cost[a, b]`` is lost when the best suited unit goes from a to b."""

    keep_KS: Int64Array
    units_KS: Int64Array
    loads: Int64Array = field(init=False)
    cost_SS: Int64Array = field(init=False)
    kind_SS: Int64Array = field(init=False)

    def __post_init__(self) -> None:
        num_shards = self.keep_KS.shape[1]
        self.loads = self.units_KS.sum(axis=0)
        self.cost_SS = np.full((num_shards, num_shards), _FAR, dtype=np.int64)
        self.kind_SS = np.zeros((num_shards, num_shards), dtype=np.int64)
        for shard in range(num_shards):
            self._reprice(shard)

    def push(self, *, supply: Int64Array, demand: Int64Array) -> None:
        """Sends units along the cheapest path from a shard with supply to one with demand."""
        distance, parent = self._cheapest_paths(supply > 0)
        end = int(np.where(demand > 0, distance, _FAR).argmin())
        path = [end]
        while parent[path[-1]] >= 0:
            path.append(int(parent[path[-1]]))
        path.reverse()
        arcs = [(a, b, int(self.kind_SS[a, b])) for a, b in pairwise(path)]
        amount = min(int(supply[path[0]]), int(demand[end]), *(int(self.units_KS[kind, a]) for a, _, kind in arcs))
        for a, b, kind in arcs:
            self.units_KS[kind, a] -= amount
            self.units_KS[kind, b] += amount
        self.loads[path[0]] -= amount
        self.loads[end] += amount
        for shard in path:
            self._reprice(shard)

    def _cheapest_paths(self, sources: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[Int64Array, Int64Array]:
        distance = np.where(sources, np.int64(0), _FAR)
        parent = np.full(distance.shape, -1, dtype=np.int64)
        while True:  # Bellman-Ford; ends because a division that is best for its loads has no negative cycle
            through = distance[:, None] + self.cost_SS
            best = through.argmin(axis=0)
            reached = np.take_along_axis(through, best[None, :], axis=0)[0]
            shorter = reached < np.minimum(distance, _FAR // 2)
            if not shorter.any():
                return distance, parent
            distance[shorter] = reached[shorter]
            parent[shorter] = best[shorter]

    def _reprice(self, shard: int) -> None:
        kinds = np.flatnonzero(self.units_KS[:, shard])
        if not kinds.size:
            self.cost_SS[shard] = _FAR
            return
        lost_KS = self.keep_KS[kinds, shard][:, None] - self.keep_KS[kinds]
        best = lost_KS.argmin(axis=0)
        self.kind_SS[shard] = kinds[best]
        self.cost_SS[shard] = np.take_along_axis(lost_KS, best[None, :], axis=0)[0]
        self.cost_SS[shard, shard] = _FAR
