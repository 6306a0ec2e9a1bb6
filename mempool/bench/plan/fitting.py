"""A machine's constants out of measured points: the kernels first, then what each path costs beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mempool.bench.plan.points import CALLS, KERNELS, Call, Point
from mempool.sizing import Costs, Kernels, Machine, Path
from mempool.sizing.fit import fitted
from mempool.sizing.times import all_kernels_s, here_s, kernels_s, wall_amounts
from mempool.sizing.traffic import Amounts, client_amounts, columns_sent, gather_amounts, update_amounts


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one call of a point.

    Attributes:
        wall: The median of rounds.
        client: CPU of this process; server: of those that answer. None where nobody can tell.
    """

    wall: float
    client: float | None = None
    server: float | None = None


Times = Mapping[Point, Measured]


def machine_of(name: str, times: Times, *, copy_bytes_per_s: float, cores: int) -> Machine:
    """The constants.

    Args:
        name: The machine's.
        times: Of points that are to be fitted: of the kernels, and of each path.
        copy_bytes_per_s: Of a copy.
        cores: Of the machine.
    """
    kernels = _kernels({point: found for point, found in times.items() if point.path == KERNELS})
    paths = {}
    for path in dict.fromkeys(point.path for point in times if point.path != KERNELS):
        mine = {point: found for point, found in times.items() if point.path == path}
        costs = {call: _costs(mine, call, kernels, cores) for call in CALLS}
        paths[path] = Path(gather=costs["gather"], step=costs["step"])
    return Machine(name=name, copy_bytes_per_s=copy_bytes_per_s, kernels={"cpu": kernels}, paths=paths)


@dataclass(frozen=True)
class Tried:
    """A point on which constants were tried. Milliseconds."""

    point: Point
    measured_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        """How far the prediction is from what was measured, as a share of that."""
        return abs(self.predicted_ms - self.measured_ms) / self.measured_ms


def tried(machine: Machine, times: Times, *, cores: int) -> list[Tried]:
    """What the constants predict, beside what was measured at other points than those they come from."""
    return [
        Tried(
            point,
            found.wall,
            1e3 * here_s(
                machine, point.path, point.call, point.split, bags=point.bags, pairs=point.pairs, cores=cores
            ),
        )
        for point, found in times.items()
    ]  # fmt: skip


def median_error(found: Sequence[Tried]) -> float | None:
    """None of no points."""
    return median(one.error for one in found) if found else None


def _kernels(times: Times) -> Kernels:
    """The gather's rows and bytes; and those of what a step does besides. A step follows its gather."""
    points = list(times)
    gathers, steps = points[::2], points[1::2]
    seconds = [times[point].wall / 1e3 for point in gathers]
    whole = [times[point].wall / 1e3 for point in steps]
    read = [gather_amounts(point.split.busiest, point.split, pairs=point.pairs) for point in gathers]
    changed = [update_amounts(point.split.busiest, point.split, pairs=point.pairs) for point in steps]
    besides = [step - gather for step, gather in zip(whole, seconds, strict=True)]
    return Kernels(gather=_of_work(read, seconds, seconds), update=_of_work(changed, besides, whole))


def _of_work(amounts: Sequence[Amounts], seconds: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """Without what a call of a kernel takes whatever its work: that is a part of what a path's call takes."""
    found = fitted([{**work, "call": 1.0} for work in amounts], seconds, weights)
    return {term: constant for term, constant in found.items() if term != "call"}


def _costs(times: Times, call: Call, kernels: Kernels, cores: int) -> Costs:
    points = {point: found for point, found in times.items() if point.call == call}
    amounts = [client_amounts(point.split, bags=point.bags, pairs=point.pairs) for point in points]
    shared = [
        wall_amounts(kernels, call, point.split, bags=point.bags, pairs=point.pairs, cores=cores) for point in points
    ]
    walls = [found.wall / 1e3 for found in points.values()]
    beside = [kernels_s(kernels, call, point.split, pairs=point.pairs, cores=cores) for point in points]
    wall = fitted(shared, [seconds - work for seconds, work in zip(walls, beside, strict=True)], walls)
    client = server = None
    inside = [not point.pids for point in points]
    works = [all_kernels_s(kernels, call, point.split, pairs=point.pairs) for point in points]
    clients = [found.client for found in points.values()]
    if None not in clients:
        spent = [each / 1e3 for each in clients if each is not None]
        less = [seconds - work * here for seconds, work, here in zip(spent, works, inside, strict=True)]
        client = fitted(amounts, less, spent)
    servers = [found.server for found in points.values()]
    if None not in servers and not all(inside):
        spent = [each / 1e3 for each in servers if each is not None]
        less = [seconds - work for seconds, work in zip(spent, works, strict=True)]
        server = fitted([_servers_amounts(point) for point in points], less, spent)
    # Where the system does not tell what CPU was spent, a call's whole time is taken for its client's.
    return Costs(wall=wall, client=client or wall, server=server or {})


def _servers_amounts(point: Point) -> dict[str, float]:
    """Of all shards together."""
    split = point.split
    return {
        "call": split.asked,
        "pair": split.times_sent * point.pairs,
        "column": columns_sent(split, bags=point.bags, pairs=point.pairs),
    }
