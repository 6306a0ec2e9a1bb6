"""Every method of every service is answered by the call of its name, and by no other."""

from typing import Any
from unittest.mock import AsyncMock

import grpc
import pytest

from mempool.observe import Stages
from mempool.server.admission import Admission
from mempool.server.calls import Door
from mempool.server.services import Handlers, Services
from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2

FILES = {"MemoryService": data_pb2, "ShardService": shard_pb2, "PoolService": pool_pb2}


def services() -> Services:
    door = Door(
        admission=Admission(budget_bytes=1, message_bytes=1), stages=Stages(), controller_key="k", receive_timeout_s=1.0
    )
    return Services(max_message_bytes=1, door=door)


def handlers(service: str) -> Handlers:
    made: dict[str, Any] = {
        "MemoryService": lambda: services().memory(AsyncMock(), AsyncMock()),
        "ShardService": lambda: services().shard(AsyncMock()),
        "PoolService": lambda: services().pool(AsyncMock()),
    }
    found: Handlers = made[service]()
    return found


@pytest.mark.parametrize("service", list(FILES))
def test_every_method_of_the_proto_has_its_handler(service: str) -> None:
    descriptor = FILES[service].DESCRIPTOR.services_by_name[service]
    assert sorted(handlers(service)) == sorted(method.name for method in descriptor.methods)


@pytest.mark.parametrize("service", list(FILES))
def test_no_handler_lets_grpc_read_a_message_by_itself(service: str) -> None:
    for name, handler in handlers(service).items():
        assert handler.request_streaming, name
        assert handler.response_streaming == (name in ("Rescale", "Rebalance", "Checkpoint"))


def test_the_controllers_address_has_lookup_alone() -> None:
    found = services().memory(None, AsyncMock())
    assert list(found) == ["Lookup"]
    assert isinstance(found["Lookup"], grpc.RpcMethodHandler)
