"""What look-ups over the wire shall cost beside other libraries, and how a run stands to it. Never enforced."""

from __future__ import annotations

from collections.abc import Sequence

from mempool.bench.goals import Standing, stand
from mempool.bench.serve.contenders.actor import RAY
from mempool.bench.serve.contenders.echoes import GRPC_ECHO
from mempool.bench.serve.contenders.pools import GRPC
from mempool.bench.serve.contenders.rpc import RPC
from mempool.bench.serve.lookups import LookUps

#: The large look-up, and the small ones.
_LARGE, _SMALL = ("1024x128",), ("64x32", "8x32")


def standings(measured: Sequence[LookUps]) -> list[Standing]:
    """How a run stands to the goals."""
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


def _added(measured: Sequence[LookUps], shape: str, peer: str) -> float | None:
    """None where the peer adds nothing: there is nothing to be compared with."""
    one = _of(measured, shape, peer)
    return one.added_ms(GRPC) / one.added_ms(peer) if one is not None and one.added_ms(peer) > 0.0 else None


def _ratio(measured: Sequence[LookUps], shape: str, peer: str) -> float | None:
    one = _of(measured, shape, peer)
    return None if one is None else one.times[GRPC].over(one.times[peer])


def _of(measured: Sequence[LookUps], shape: str, peer: str) -> LookUps | None:
    return next((one for one in measured if one.shape.name == shape and peer in one.times), None)
