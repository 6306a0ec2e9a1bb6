"""Health and reflection: whoever may ask them can make a server hold nothing by asking."""

import asyncio
import sys
from collections.abc import Iterator
from unittest.mock import patch

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mempool.server import public
from mempool.server.public import HEALTH_SERVICE, REFLECTION_SERVICE
from mempool.wire.channels.loop import run

from .doors import CALL_S, RAW_OPTIONS, ServerProcess, ended, served

MIB = 2**20
CHECK, WATCH = f"/{HEALTH_SERVICE}/Check", f"/{HEALTH_SERVICE}/Watch"
REFLECT = f"/{REFLECTION_SERVICE}/ServerReflectionInfo"
TOKEN = ("authorization", "Bearer sesame")


@pytest.fixture
def process() -> Iterator[ServerProcess]:
    process = ServerProcess()
    yield process
    process.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
@pytest.mark.parametrize(("path", "metadata"), [(CHECK, ()), (WATCH, ()), (REFLECT, (TOKEN,))])
def test_large_messages_of_many_are_read_one_at_a_time_and_refused(
    process: ServerProcess, path: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    before = process.resident_bytes()
    name = b"x" * (15 * MIB)
    body = health_pb2.HealthCheckRequest(service=name.decode()).SerializeToString()

    async def many() -> set[grpc.StatusCode]:
        return set(await asyncio.gather(*(ended(process.address, path, body, *metadata) for _ in range(48))))

    # One that waits its turn too long for its sender is given up; none is taken.
    assert run(many(), 60.0) <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED}
    # 720 MiB came. Of those that wait gRPC holds 2 MiB each.
    assert process.resident_bytes("VmHWM") - before < 288 * MIB


def test_a_name_that_is_no_service_is_not_found() -> None:
    async def main() -> None:
        async with served() as (address, _):
            body = health_pb2.HealthCheckRequest(service="of.others").SerializeToString()
            assert await ended(address, CHECK, body) is grpc.StatusCode.NOT_FOUND
            assert await ended(address, CHECK, b"\xff") is grpc.StatusCode.INVALID_ARGUMENT

    run(main(), CALL_S)


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECT])
def test_a_sender_that_says_nothing_holds_nobody_up(path: str) -> None:
    async def main() -> None:
        async with served() as (address, _), grpc.aio.insecure_channel(address, options=RAW_OPTIONS) as channel:
            kind = channel.stream_unary if path == CHECK else channel.stream_stream
            silent = kind(path)(timeout=CALL_S)
            await asyncio.sleep(0.05)
            asked = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
            assert asked.status == health_pb2.HealthCheckResponse.SERVING
            assert await silent.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    run(main(), 2 * CALL_S)


def test_watchers_hear_of_the_end_and_of_names_that_are_none() -> None:
    async def main() -> list[int]:
        heard: list[int] = []
        async with served() as (address, server), grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            unknown = stub.Watch(health_pb2.HealthCheckRequest(service="of.others"), timeout=CALL_S)
            heard.append((await unknown.read()).status)
            unknown.cancel()
            known = stub.Watch(health_pb2.HealthCheckRequest(service=HEALTH_SERVICE), timeout=CALL_S)
            heard.append((await known.read()).status)
            server._public.end()
            heard.append((await known.read()).status)
            known.cancel()
        return heard

    status = health_pb2.HealthCheckResponse
    assert run(main(), CALL_S) == [status.SERVICE_UNKNOWN, status.SERVING, status.NOT_SERVING]


def test_streams_are_few_and_counted_until_they_end() -> None:
    async def main() -> None:
        async with served() as (address, server), grpc.aio.insecure_channel(address, options=RAW_OPTIONS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            open_ones = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=CALL_S) for _ in range(2)]
            for stream in open_ones:
                await stream.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Watch(health_pb2.HealthCheckRequest(), timeout=CALL_S).read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            open_ones[0].cancel()
            while server._public._streams > 1:
                await asyncio.sleep(0.01)
            again = stub.Watch(health_pb2.HealthCheckRequest(), timeout=CALL_S)
            assert (await again.read()).status == health_pb2.HealthCheckResponse.SERVING
            again.cancel()
            open_ones[1].cancel()

    with patch.object(public, "MAX_WATCHERS", 2):
        run(main(), CALL_S)


def test_several_questions_about_the_services_are_answered_in_one_stream() -> None:
    async def main() -> list[int]:
        async with served() as (address, _), grpc.aio.insecure_channel(address) as channel:
            questions = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=HEALTH_SERVICE),
            ]
            stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter(questions), timeout=CALL_S
            )
            return [
                len(reply.list_services_response.service) + len(reply.file_descriptor_response.file_descriptor_proto)
                async for reply in stream
            ]

    services, files = run(main(), CALL_S)
    assert services == 5
    assert files >= 1
