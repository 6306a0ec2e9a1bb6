"""What look-ups over the wire shall cost beside other libraries, and how a run stands to it. Never enforced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mempool.bench.goals import Standing, stand
from mempool.bench.serve.contenders.actor import RAY
from mempool.bench.serve.contenders.echoes import GRPC_ECHO
from mempool.bench.serve.contenders.pools import GRPC
from mempool.bench.serve.contenders.rpc import RPC
from mempool.bench.serve.load import ALONE, CLOSED, FLOODED, OPEN, OPEN_SHARE, Load
from mempool.bench.serve.lookups import LookUps
from mempool.bench.serve.shards import Scaling

#: The large look-up, and the small ones.
_LARGE, _SMALL = ("1024x128",), ("64x32", "8x32")


def standings(
    measured: Sequence[LookUps], scalings: Sequence[Scaling], loads: Sequence[Load], flood: Mapping[str, Load]
) -> list[Standing]:
    """How a run stands to the goals."""
    return [*_lookups(measured), *_shards(scalings), *_loads(loads), _flood(flood)]


def _lookups(measured: Sequence[LookUps]) -> list[Standing]:
    found = []
    for shape in _LARGE:
        for peer, wanted in ((RPC, 1.0), (RAY, 0.25)):
            what = f"{shape}: time added over gRPC, beside {peer}'s, times"
            found.append(stand(what, wanted, _added(measured, shape, peer), under=True))
    for shape in _SMALL:
        for peer, wanted in ((RPC, 0.5), (GRPC_ECHO, 1.3)):
            what = f"{shape}: time over gRPC, beside {peer}'s, times"
            found.append(stand(what, wanted, _ratio(measured, shape, peer), under=True))
    return found


def _shards(scalings: Sequence[Scaling]) -> list[Standing]:
    found = {(one.layout, one.measured.shape.name): one for one in scalings}
    one = found.get(("columns", _LARGE[0]))
    what = f"{_LARGE[0]}: embedded look-up of {{}} shards, beside one, times"
    most = max(one.embedded, default=8) if one is not None else 8
    return [stand(what.format(most), 1.5, one.wall_ratio(one.embedded) if one is not None else None, under=True)]


def _loads(loads: Sequence[Load]) -> list[Standing]:
    by = {(load.target, load.shape.name, load.clients, load.loop): load for load in loads}
    small, large = _SMALL[0], _LARGE[0]

    def rate(target: str, shape: str, clients: int) -> float | None:
        load = by.get((target, shape, clients, CLOSED))
        return None if load is None else load.calls_per_s

    def share(of: float | None, beside: float | None) -> float | None:
        return of / beside if of is not None and beside else None

    opened = by.get((GRPC, small, 8, OPEN))
    tail = None if opened is None else opened.times.quantile_ms(0.99) / opened.times.median_ms
    echo = share(rate(GRPC, small, 8), rate(GRPC_ECHO, small, 8))
    several = share(rate(GRPC, large, 4), rate(GRPC, large, 1))
    return [
        stand(f"{small}: calls of 8 clients over gRPC, share of {GRPC_ECHO}'s", 0.7, echo),
        stand(f"{small}: p99 at {OPEN_SHARE:.0%} of the load of 8 clients, beside p50, times", 5.0, tail, under=True),
        stand(f"{large}: calls of 4 clients on a shard, share of one client's", 0.95, several),
    ]


def _flood(flood: Mapping[str, Load]) -> Standing:
    kept = flood[FLOODED].calls_per_s / flood[ALONE].calls_per_s if flood else None
    return stand(f"{_SMALL[0]}: calls that a client keeps beside one that floods, share", 0.5, kept)


def _added(measured: Sequence[LookUps], shape: str, peer: str) -> float | None:
    """None where the peer adds nothing: there is nothing to be compared with."""
    one = _of(measured, shape, peer)
    return one.added_ms(GRPC) / one.added_ms(peer) if one is not None and one.added_ms(peer) > 0.0 else None


def _ratio(measured: Sequence[LookUps], shape: str, peer: str) -> float | None:
    one = _of(measured, shape, peer)
    return None if one is None else one.times[GRPC].over(one.times[peer])


def _of(measured: Sequence[LookUps], shape: str, peer: str) -> LookUps | None:
    return next((one for one in measured if one.shape.name == shape and peer in one.times), None)
