"""The stated goals of look-ups: which there are, and what of a run each is compared with."""

import pytest

from mempool.bench.measuring import Times
from mempool.bench.serve.contenders.actor import RAY
from mempool.bench.serve.contenders.echoes import GRPC_ECHO
from mempool.bench.serve.contenders.here import TORCH_BAG
from mempool.bench.serve.contenders.pools import EMBEDDED, GRPC, NEAR
from mempool.bench.serve.contenders.rpc import RPC
from mempool.bench.serve.goals import standings
from mempool.bench.serve.lookups import LookUps
from mempool.bench.serve.shapes import Shape, TableSize

_LARGE = {TORCH_BAG: 20.0, EMBEDDED: 21.0, GRPC: 28.0, NEAR: 21.0, RPC: 30.0, RAY: 60.0, GRPC_ECHO: 9.0}
_SMALL = {TORCH_BAG: 0.5, EMBEDDED: 0.6, GRPC: 2.6, NEAR: 0.8, RPC: 2.0, RAY: 8.0, GRPC_ECHO: 2.0}


def _looked_up(shape: Shape, medians_ms: dict[str, float]) -> LookUps:
    # A slow round counts for all alike.
    times = {name: Times((one, one, 4.0 * one)) for name, one in medians_ms.items()}
    return LookUps(shape, TableSize(8, 8), times, times, {}, [])


def test_goals_of_one_client() -> None:
    measured = [_looked_up(Shape(1024, 128), _LARGE), *(_looked_up(Shape(bags, 32), _SMALL) for bags in (64, 8))]
    found = [one for one in standings(measured, [], [], {}) if one.measured is not None]
    assert [(one.goal, one.measured, one.standing) for one in found] == [
        (1 / 8, pytest.approx(1 / 10), "ok"),  # what is added to the large one, beside rpc's
        (1 / 20, pytest.approx(1 / 40), "ok"),  # beside a Ray actor's
        (1.0, pytest.approx(8 / 10), "ok"),  # the same over gRPC
        (1 / 4, pytest.approx(8 / 40), "ok"),
        (0.5, pytest.approx(0.4), "ok"),  # a small one, beside rpc
        (1.3, pytest.approx(1.3), "ok"),  # over gRPC, beside the echo
        (0.675, 0.6, "ok"),  # embedded, milliseconds
        (0.5, pytest.approx(0.4), "ok"),
        (1.3, pytest.approx(1.3), "ok"),
        (0.525, 0.6, "above"),
    ]
    assert all(peer in one.what for one, peer in zip(found[:6], (RPC, RAY, RPC, RAY, RPC, GRPC_ECHO), strict=True))


def test_a_goal_without_its_peer_is_not_measured() -> None:
    own = {name: one for name, one in _LARGE.items() if name not in (RPC, RAY, NEAR)}
    found = standings([_looked_up(Shape(1024, 128), own)], [], [], {})
    assert {one.standing for one in found} == {"not measured"}
