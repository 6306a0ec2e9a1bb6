"""A pool behind real gRPC on loopback: services, token, limits, health, reflection, errors, a shard's own answers."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from unittest.mock import AsyncMock

import grpc
import grpc.aio
import pytest
import torch
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from serving import ServedPool, served_pool

import mempool
from mempool import errors
from mempool.client import GrpcShard, connect
from mempool.config import resolve
from mempool.server import Server
from mempool.types import Envelope, GatherRequest, ShardInfo, ShardStatus
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.loop import run
from mempool.wire.codecs.lookup import LookupRequest
from mempool.wire.methods import CREATE_TABLE, GATHER, LOOKUP, STATUS

from .doors import served as served_door

CALL_S = 30.0


class Served:
    """A served pool for a test, from outside the loop."""

    def __init__(self, num_shards: int, **options: object) -> None:
        self._stack = AsyncExitStack()
        self.pool: ServedPool = run(
            self._stack.enter_async_context(served_pool(num_shards, **options)),  # type: ignore[arg-type]
            timeout_s=CALL_S,
        )

    def close(self) -> None:
        run(self._stack.aclose(), timeout_s=CALL_S)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedPool]:
    pool = Served(2)
    yield pool.pool
    pool.close()


@pytest.fixture(scope="module")
def guarded() -> Iterator[ServedPool]:
    pool = Served(1, token="sesame", max_message_bytes=1 << 20)
    yield pool.pool
    pool.close()


@pytest.fixture
def client(served: ServedPool) -> Iterator[mempool.Pool]:
    with connect(served.address, timeout_s=CALL_S) as pool:
        yield pool


def test_gather_over_grpc_equals_embedding_bag(client: mempool.Pool) -> None:
    table = client.create_table(mempool.TableConfig(name="plain", num_slots=500, value_dim=130, seed=3))
    values = table.rows(torch.arange(500))
    ids, weights = torch.randint(500, (7, 9)), torch.randn(7, 9)
    expected = torch.nn.functional.embedding_bag(ids, values.double(), per_sample_weights=weights.double(), mode="sum")
    torch.testing.assert_close(table.gather(ids, weights).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keys", [mempool.ProductKeys(heads=2, key_dim=16), mempool.FlatKeys(key_dim=16)])
@pytest.mark.parametrize("at", ["controller", "shard"])
def test_lookup_of_a_thin_client_equals_the_clients_own(
    served: ServedPool, client: mempool.Pool, keys: mempool.ProductKeys | mempool.FlatKeys, at: str
) -> None:
    heads = 2 if isinstance(keys, mempool.ProductKeys) else 1
    name = f"keyed-{heads}-{at}"
    table = client.create_table(mempool.TableConfig(name=name, num_slots=256, value_dim=64, keys=keys))
    queries = torch.randn(5, heads, 16)
    own = table.lookup(queries if heads == 2 else queries.squeeze(1), topk=8)
    address = served.address if at == "controller" else served.shards[1].info.address

    async def ask(asked: torch.Tensor) -> list[torch.Tensor]:
        async with GrpcChannel(address) as channel:
            reply = await channel.call(LOOKUP, LookupRequest(table=name, queries=asked, topk=8), timeout_s=CALL_S)
            return [reply.ids.clone(), reply.scores.clone(), reply.weights.clone(), reply.values.clone()]

    shapes = [queries] if heads == 2 else [queries, queries.squeeze(1)]
    for asked in shapes:
        ids, scores, weights, values = run(ask(asked), timeout_s=CALL_S)
        assert torch.equal(ids.reshape(own.ids.shape), own.ids)
        assert torch.equal(scores.reshape(own.ids.shape), own.scores)
        assert torch.equal(weights.reshape(own.ids.shape), own.weights)
        assert torch.equal(values, own.values)


def test_lookup_says_what_is_wrong(served: ServedPool, client: mempool.Pool) -> None:
    client.create_table(mempool.TableConfig(name="keyless", num_slots=16, value_dim=8))

    async def ask(table: str, queries: torch.Tensor) -> None:
        async with GrpcChannel(served.shards[0].info.address) as channel:
            await channel.call(LOOKUP, LookupRequest(table=table, queries=queries, topk=2), timeout_s=CALL_S)

    with pytest.raises(errors.InvalidRequest, match="has no keys in the pool"):
        run(ask("keyless", torch.zeros(1, 4)), timeout_s=CALL_S)
    with pytest.raises(errors.NotFound, match="no table 'nowhere'"):
        run(ask("nowhere", torch.zeros(1, 4)), timeout_s=CALL_S)


def test_a_shard_answers_reads_of_the_pool_and_refuses_changes(served: ServedPool, client: mempool.Pool) -> None:
    client.create_table(mempool.TableConfig(name="seen", num_slots=32, value_dim=8))
    with connect(served.shards[1].info.address, timeout_s=1.0) as by_shard:
        assert "seen" in {table.name for table in by_shard.tables()}
        assert [shard.state for shard in by_shard.status().shards] == ["ready", "ready"]
        ids = torch.tensor([[1, 2]])
        assert torch.equal(by_shard.table("seen").gather(ids), client.table("seen").gather(ids))
        with pytest.raises(errors.Unavailable, match="only the controller"):
            by_shard.create_table(mempool.TableConfig(name="more", num_slots=32, value_dim=8))
    assert "more" not in {table.name for table in client.tables()}


@pytest.mark.parametrize(("token", "message"), [(None, "needs a token"), ("wrong", "not this pool's")])
def test_without_the_token_nothing_is_answered(guarded: ServedPool, token: str | None, message: str) -> None:
    with pytest.raises(errors.Unauthenticated, match=message):
        connect(guarded.address, token=token, timeout_s=CALL_S)

    async def create() -> None:
        schema = resolve(mempool.TableConfig(name="theirs", num_slots=32, value_dim=8))
        async with GrpcChannel(guarded.address, token=token) as channel:
            await channel.call(CREATE_TABLE, schema, timeout_s=CALL_S)

    with pytest.raises(errors.Unauthenticated):
        run(create(), timeout_s=CALL_S)
    with connect(guarded.address, token="sesame", timeout_s=CALL_S) as pool:
        assert pool.tables() == ()


def test_messages_over_the_limit_are_refused_both_ways(guarded: ServedPool) -> None:
    with connect(guarded.address, token="sesame", timeout_s=CALL_S) as pool:
        table = pool.create_table(mempool.TableConfig(name="wide", num_slots=64, value_dim=1024))
        with pytest.raises(errors.RequestTooLarge, match="1,048,576"):
            table.gather(torch.zeros(1, 300 * 1024, dtype=torch.int64))  # a bag is never cut
        with pytest.raises(errors.RequestTooLarge, match="1,048,576"):
            table.gather(torch.zeros(300, 1, dtype=torch.int64))
        assert table.gather(torch.zeros(3, 2, dtype=torch.int64)).shape == (3, 1024)
        pool.drop_table("wide")


def test_no_token_no_foreign_interface() -> None:
    async def bind() -> None:
        Server(token=None).bind("0.0.0.0", [0])

    with pytest.raises(errors.ConfigError, match="there is no token"):
        run(bind(), timeout_s=CALL_S)


def test_a_taken_port_is_said(served: ServedPool) -> None:
    port = int(served.address.rpartition(":")[2])

    async def bind() -> int:
        return Server(token=None).bind("127.0.0.1", [port])

    with pytest.raises(errors.ConfigError, match=f"cannot listen on 127.0.0.1, port {port}"):
        run(bind(), timeout_s=CALL_S)


@pytest.mark.parametrize("frame", [b"\xff\xff\xff", b"", b"\x0a\x7f", bytes(range(256))])
def test_garbage_is_an_invalid_request(served: ServedPool, frame: bytes) -> None:
    async def send() -> None:
        async with grpc.aio.insecure_channel(served.shards[0].info.address) as channel:
            await channel.unary_unary(GATHER.path)(frame, timeout=CALL_S)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        run(send(), timeout_s=CALL_S)
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_errors_of_the_engine_arrive_as_themselves(served: ServedPool) -> None:
    info = served.shards[0].info

    async def gather() -> None:
        shard = GrpcShard(info, GrpcChannel(info.address, shard=info.shard))
        envelope = Envelope(table_id=999_999, epoch=1, incarnation=info.incarnation)
        ids, offsets = torch.tensor([0]), torch.tensor([0, 1])
        try:
            await shard.gather(
                GatherRequest(envelope=envelope, lookup_id=1, ids=ids, weights=None, offsets=offsets, remember=False)
            )
        finally:
            await shard.close()

    with pytest.raises(errors.NotFound) as caught:
        run(gather(), timeout_s=CALL_S)
    assert caught.value.shard == 0
    assert "999999" in str(caught.value).replace(",", "")


def test_health_needs_no_token_and_ends_with_the_server() -> None:
    async def probe(address: str) -> int:
        async with grpc.aio.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest(service="mempool.wire.v1.MemoryService")
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=CALL_S)
            return int(reply.status)

    served = Served(1, token="sesame")
    address = served.pool.shards[0].info.address
    try:
        assert run(probe(address), timeout_s=CALL_S) == health_pb2.HealthCheckResponse.SERVING
    finally:
        served.close()
    with pytest.raises(grpc.aio.AioRpcError):
        run(probe(address), timeout_s=CALL_S)


async def health(address: str, service: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=CALL_S)
        return int(reply.status)


NAMES = [
    "",
    "mempool.wire.v1.MemoryService",
    "mempool.wire.v1.PoolService",
    "mempool.wire.v1.ShardService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
]


def test_health_answers_for_each_service_also_while_calls_are_let_finish() -> None:
    async def main() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def status() -> ShardStatus:
            begun.set()
            await go_on.wait()
            return ShardStatus(info=ShardInfo(shard=0, address="", incarnation=1), state="ready")

        shard = AsyncMock()
        shard.status = status
        async with served_door(shard) as (address, server), GrpcChannel(address, shard=0) as channel:
            for name in NAMES:
                assert await health(address, name) == health_pb2.HealthCheckResponse.SERVING, name
            under_way = asyncio.create_task(channel.call(STATUS, None, timeout_s=CALL_S))
            await begun.wait()
            stopping = asyncio.create_task(server.stop(CALL_S))
            await asyncio.sleep(0.05)
            for name in NAMES:
                assert await health(address, name) == health_pb2.HealthCheckResponse.NOT_SERVING, name
            with pytest.raises(errors.ShardUnavailable, match="this process is ending"):
                await channel.call(STATUS, None, timeout_s=CALL_S)
            assert not stopping.done()
            go_on.set()
            assert (await under_way).state == "ready"
            await stopping

    run(main(), timeout_s=2 * CALL_S)


def test_a_bind_that_others_reach_without_encryption_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    async def bind(host: str) -> None:
        server = Server(token="sesame")
        server.bind(host, [0])
        await server.stop(0.0)

    run(bind("127.0.0.1"), timeout_s=CALL_S)
    assert caplog.text == ""
    run(bind("0.0.0.0"), timeout_s=CALL_S)
    assert "0.0.0.0 is reachable from other hosts and nothing is encrypted" in caplog.text
    assert "sesame" not in caplog.text


def test_reflection_shows_the_services_with_their_messages(served: ServedPool) -> None:
    async def files() -> list[bytes]:
        async with grpc.aio.insecure_channel(served.shards[0].info.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="mempool.wire.v1.MemoryService")
            async for reply in stub.ServerReflectionInfo(iter([request]), timeout=CALL_S):
                return list(reply.file_descriptor_response.file_descriptor_proto)
        return []

    descriptors = [FileDescriptorProto.FromString(raw) for raw in run(files(), timeout_s=CALL_S)]
    methods = {method.name for file in descriptors for service in file.service for method in service.method}
    assert {"Gather", "Update", "Prepare", "Commit", "Discard", "Score", "Lookup", "ReadRows", "WriteRows"} <= methods


def test_reflection_needs_the_token(guarded: ServedPool) -> None:
    async def services(metadata: tuple[tuple[str, str], ...]) -> list[str]:
        async with grpc.aio.insecure_channel(guarded.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            async for reply in stub.ServerReflectionInfo(iter([request]), timeout=CALL_S, metadata=metadata):
                return [service.name for service in reply.list_services_response.service]
        return []

    async def refusal() -> grpc.StatusCode:
        """Of a call that sends nothing: what gRPC's client says of a message that comes after the end varies."""
        async with grpc.aio.insecure_channel(guarded.address) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=CALL_S)
            code: grpc.StatusCode = await call.code()
            return code

    assert run(services((("authorization", "Bearer sesame"),)), timeout_s=CALL_S)
    assert run(refusal(), timeout_s=CALL_S) is grpc.StatusCode.UNAUTHENTICATED
