"""What look-ups over the wire shall cost beside other libraries, and how a run stands to it. Never enforced.

Where a goal is a share of what this product took before its calls went from the caller's own thread, that figure is in
milliseconds of the machine that it was measured on (two slow cores); it says little of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mempool.bench.goals import Standing, stand
from mempool.bench.serve.contenders.actor import RAY
from mempool.bench.serve.contenders.echoes import GRPC_ECHO
from mempool.bench.serve.contenders.pools import EMBEDDED, GRPC, NEAR, TCP
from mempool.bench.serve.contenders.rpc import RPC
from mempool.bench.serve.load import ALONE, CLOSED, FLOODED, OPEN, OPEN_SHARE, Load
from mempool.bench.serve.lookups import LookUps
from mempool.bench.serve.shards import KINDS, Scaling

#: The large look-up, and the small ones.
_LARGE, _SMALL = "1024x128", ("64x32", "8x32")
#: Of the time that others add to the large one. Clients of other hosts go by lines over TCP, else by gRPC.
_ADDED = {
    (NEAR, RPC): 1 / 8, (NEAR, RAY): 1 / 20, (TCP, RPC): 1.0, (TCP, RAY): 1 / 4, (GRPC, RPC): 1.0, (GRPC, RAY): 1 / 4
}  # fmt: skip
#: Of the time that others take for a small one.
_TAKEN = {(NEAR, RPC): 0.5, (GRPC, GRPC_ECHO): 1.3}
#: Milliseconds that an embedded pool took for a small one, before.
_EMBEDDED_BEFORE_MS = {"64x32": 2.7, "8x32": 2.1}
#: Milliseconds of the client's CPU that a further shard cost a large one, before.
_FURTHER_BEFORE_MS = {"columns": 1.6, "rows": 2.8}
#: Of the calls that 8 clients of the echo get together.
_TOTAL = {GRPC: 0.7, TCP: 0.7, NEAR: 2.0}
_MANY_SHARDS = 8
_MANY_CLIENTS, _SEVERAL_CLIENTS = 8, 4


def standings(
    measured: Sequence[LookUps],
    scalings: Sequence[Scaling],
    loads: Sequence[Load],
    flood: Mapping[str, Mapping[str, Load]],
) -> list[Standing]:
    """How a run stands to the goals."""
    return [*_lookups(measured), *_shards(scalings), *_loads(loads), *_flood(flood)]


def _lookups(measured: Sequence[LookUps]) -> list[Standing]:
    by = {one.shape.name: one for one in measured}
    found = []
    for (own, peer), wanted in _ADDED.items():
        what = f"{_LARGE}: time that {own} adds, beside {peer}'s, times"
        found.append(stand(what, wanted, _added(by.get(_LARGE), own, peer), under=True))
    for shape in _SMALL:
        one = by.get(shape)
        for (own, peer), wanted in _TAKEN.items():
            what = f"{shape}: time of {own}, beside {peer}'s, times"
            found.append(stand(what, wanted, _ratio(one, own, peer), under=True))
        before_ms = _EMBEDDED_BEFORE_MS[shape]
        embedded_ms = None if one is None else one.times[EMBEDDED].median_ms
        what = f"{shape}: {EMBEDDED}, ms (a quarter of {before_ms:g} before)"
        found.append(stand(what, round(before_ms / 4, 3), embedded_ms, under=True))
    return found


def _shards(scalings: Sequence[Scaling]) -> list[Standing]:
    by: dict[str, Scaling] = {one.layout: one for one in scalings if one.measured.shape.name == _LARGE}
    found = []
    for layout, before_ms in _FURTHER_BEFORE_MS.items():
        one = by.get(layout)
        for kind in KINDS:
            what = f"{_LARGE} by {layout}: a further shard of {kind}, ms of the client's CPU (a tenth of {before_ms:g})"
            further_ms = None if one is None else one.further_ms(kind)
            found.append(stand(what, round(before_ms / 10, 3), further_ms, under=True))
        what = f"{_LARGE} by {layout}: embedded look-up of {_MANY_SHARDS} shards, beside one, times"
        ratio = None if one is None else one.wall_ratio(EMBEDDED, _MANY_SHARDS)
        found.append(stand(what, 1.5, ratio, under=True))
    return found


def _loads(loads: Sequence[Load]) -> list[Standing]:
    by = {(load.target, load.shape.name, load.clients, load.loop): load for load in loads}

    def share(of: tuple[str, str, int], beside: tuple[str, str, int]) -> float | None:
        mine, its = by.get((*of, CLOSED)), by.get((*beside, CLOSED))
        return mine.calls_per_s / its.calls_per_s if mine is not None and its is not None else None

    found = []
    for target, wanted in _TOTAL.items():
        for small in _SMALL:
            what = f"{small}: calls of {_MANY_CLIENTS} clients of {target}, share of {GRPC_ECHO}'s"
            beside = share((target, small, _MANY_CLIENTS), (GRPC_ECHO, small, _MANY_CLIENTS))
            found.append(stand(what, wanted, beside))
            opened = by.get((target, small, _MANY_CLIENTS, OPEN))
            tail = None if opened is None else opened.times.quantile_ms(0.99) / opened.times.median_ms
            load = f"{OPEN_SHARE:.0%} of the load of {_MANY_CLIENTS} clients"
            what = f"{small}: p99 of {target} at {load}, beside p50, times"
            found.append(stand(what, 5.0, tail, under=True))
        what = f"{_LARGE}: calls of {_SEVERAL_CLIENTS} clients on a shard of {target}, share of one client's"
        found.append(stand(what, 0.95, share((target, _LARGE, _SEVERAL_CLIENTS), (target, _LARGE, 1))))
    return found


def _flood(flood: Mapping[str, Mapping[str, Load]]) -> list[Standing]:
    found = []
    for target in _TOTAL:
        both = flood.get(target)
        kept = None if both is None else both[FLOODED].calls_per_s / both[ALONE].calls_per_s
        what = f"{_SMALL[0]}: calls that a client of {target} keeps beside one that floods, share"
        found.append(stand(what, 0.5, kept))
    return found


def _added(one: LookUps | None, own: str, peer: str) -> float | None:
    """None where the peer adds nothing: there is nothing to be compared with."""
    if one is None or not {own, peer} <= one.times.keys() or one.added_ms(peer) <= 0.0:
        return None
    return one.added_ms(own) / one.added_ms(peer)


def _ratio(one: LookUps | None, own: str, peer: str) -> float | None:
    if one is None or not {own, peer} <= one.times.keys():
        return None
    return one.times[own].over(one.times[peer])
