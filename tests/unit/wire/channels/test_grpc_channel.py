"""Calls over real connections: frames, errors, sizes, tokens, deadlines."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
import torch

from mempool import errors
from mempool.types import Envelope, GatherReply, GatherRequest, RescaleProgress, Stamp
from mempool.wire import methods
from mempool.wire.channels.channel import server_options
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.loop import run
from mempool.wire.status import to_status
from mempool.wire.v1 import data_pb2, data_pb2_grpc

WAIT_S = 20.0
LIMIT = 2**20
STAMP = Stamp(shard=2, incarnation=1, epoch=5, table_version=7)


def gather_request(*, pairs: int = 6, lookup_id: int = 1) -> GatherRequest:
    return GatherRequest(
        envelope=Envelope(table_id=1, epoch=5, incarnation=1),
        lookup_id=lookup_id,
        ids=torch.arange(pairs),
        weights=None,
        offsets=torch.tensor([0, pairs]),
        remember=False,
    )


class Server:
    """Answers Gather as the lookup id says, and streams for Rescale."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.error: BaseException = errors.Internal("unset")
        self.cancelled = asyncio.Event()

    async def gather(self, frame: bytes, context: Any) -> bytes:
        request = methods.GATHER.request.decode(frame)
        self.metadata = dict(context.invocation_metadata())
        match request.lookup_id:
            case 1:
                values = request.ids.to(torch.float32)[None]
            case 2:
                await context.abort(*to_status(self.error))
            case 3:
                values = torch.zeros(1, LIMIT)
            case _:
                try:
                    await asyncio.sleep(WAIT_S)
                finally:
                    self.cancelled.set()
        return methods.GATHER.reply.encode(GatherReply(stamp=STAMP, blocks=(0,), values=values))

    async def rescale(self, frame: bytes, context: Any) -> AsyncIterator[bytes]:
        shards = methods.RESCALE.request.decode(frame)
        for moved in range(shards):
            yield methods.RESCALE.reply.encode(
                RescaleProgress(
                    shards_before=1,
                    shards_after=shards,
                    pages_moved=moved,
                    pages_total=shards,
                    bytes_moved=0,
                    bytes_total=0,
                    table="facts",
                    done=moved == shards - 1,
                )
            )
        if shards == 3:
            await context.abort(*to_status(errors.DataLoss("half way", shard=1)))

    async def start(self) -> str:
        self._server = grpc.aio.server(options=server_options(max_message_bytes=LIMIT))
        gather = grpc.unary_unary_rpc_method_handler(self.gather)
        rescale = grpc.unary_stream_rpc_method_handler(self.rescale)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(methods.MEMORY_SERVICE, {"Gather": gather}),
                grpc.method_handlers_generic_handler(methods.POOL_SERVICE, {"Rescale": rescale}),
            )
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(None)


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    async def start() -> tuple[Server, str]:
        served = Server()
        return served, await served.start()

    served, address = run(start(), WAIT_S)
    yield served, address
    run(served.stop(), WAIT_S)


def with_channel(address: str, use: Callable[[GrpcChannel], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with GrpcChannel(address, shard=2, **options) as channel:
            return await use(channel)

    return run(main(), WAIT_S)


def gather(address: str, request: GatherRequest, *, timeout_s: float = WAIT_S, **options: Any) -> GatherReply:
    reply: GatherReply = with_channel(
        address, lambda channel: channel.call(methods.GATHER, request, timeout_s=timeout_s), **options
    )
    return reply


def test_a_call_and_its_token(server: tuple[Server, str]) -> None:
    served, address = server
    reply = gather(address, gather_request(), token="s3cret")
    assert reply.stamp == STAMP
    assert reply.values.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert served.metadata["authorization"] == "Bearer s3cret"
    gather(address, gather_request())
    assert "authorization" not in served.metadata


@pytest.mark.parametrize("token", ["", " \n", "two words", "two\nlines", "schlüssel"])
def test_a_token_that_no_header_bears_is_refused_unseen(token: str) -> None:
    with pytest.raises(errors.Unauthenticated, match="MEMPOOL_TOKEN") as caught:
        gather("127.0.0.1:1", gather_request(), token=token)
    assert not token.strip() or token not in str(caught.value)


def test_the_line_end_of_a_tokens_file_is_no_part_of_it(server: tuple[Server, str]) -> None:
    stub, address = server
    gather(address, gather_request(), token="s3cret\n")
    assert stub.metadata["authorization"] == "Bearer s3cret"


def test_a_plain_protobuf_client_is_answered(server: tuple[Server, str]) -> None:
    async def main() -> data_pb2.GatherReply:
        async with grpc.aio.insecure_channel(server[1]) as channel:
            stub: Any = data_pb2_grpc.MemoryServiceStub(channel)
            request = data_pb2.GatherRequest.FromString(methods.GATHER.request.encode(gather_request()))
            request.ids.ClearField("padding")
            reply: data_pb2.GatherReply = await stub.Gather(request, timeout=WAIT_S)
            return reply

    reply = run(main(), WAIT_S)
    assert reply.stamp.table_version == 7
    assert torch.frombuffer(bytearray(reply.values.inline), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "error",
    [
        errors.StalePlacement("the epoch is 6 – not 5", shard=2),
        errors.InvalidRequest("ids[3] = 99 is out of range\nsecond line", shard=0, address="a:1"),
        errors.DataLoss("x" * 1500),
    ],
)
def test_errors_cross_the_wire(server: tuple[Server, str], error: errors.MempoolError) -> None:
    served, address = server
    served.error = error
    with pytest.raises(type(error)) as caught:
        gather(address, gather_request(lookup_id=2))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert caught.value.shard == (2 if error.shard is None else error.shard)
    assert caught.value.address == (error.address or address)


def test_a_request_that_is_too_large_is_not_sent(server: tuple[Server, str]) -> None:
    with pytest.raises(errors.RequestTooLarge, match=r"GatherRequest has 8,\d\d\d bytes; 4,096 are accepted") as caught:
        gather(server[1], gather_request(pairs=1000), max_message_bytes=4096)
    assert caught.value.shard == 2


def test_a_request_that_the_server_refuses_for_its_size(server: tuple[Server, str]) -> None:
    with pytest.raises(errors.RequestTooLarge, match=r"has 1,600,\d\d\d bytes; 1,048,576 are accepted"):
        gather(server[1], gather_request(pairs=200_000))


@pytest.mark.parametrize("limit", [2**20, 2**30])
def test_a_reply_that_is_too_large(server: tuple[Server, str], limit: int) -> None:
    with pytest.raises(errors.RequestTooLarge, match=r"has 4,194,\d\d\d bytes; 1,048,576 are accepted"):
        gather(server[1], gather_request(lookup_id=3), max_message_bytes=limit)


def test_the_deadline_ends_the_call_on_both_sides(server: tuple[Server, str]) -> None:
    served, address = server
    with pytest.raises(errors.DeadlineExceeded, match=r"shard 2 at 127\.0\.0\.1:\d+ did not answer in time"):
        gather(address, gather_request(lookup_id=4), timeout_s=0.2)
    assert run(served.cancelled.wait(), WAIT_S)


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(errors.ShardUnavailable, match=r"shard 2 at .* does not answer") as caught:
            gather(address, gather_request())
    assert caught.value.retryable


def test_a_server_that_goes_away_in_the_middle(server: tuple[Server, str]) -> None:
    served, address = server

    async def main() -> None:
        async with GrpcChannel(address, shard=2) as channel:
            call = asyncio.ensure_future(channel.call(methods.GATHER, gather_request(lookup_id=4), timeout_s=WAIT_S))
            await asyncio.sleep(0.1)
            await served.stop()
            await call

    with pytest.raises(errors.ShardUnavailable):
        run(main(), WAIT_S)


def test_closing_a_channel_ends_its_calls_but_not_their_tasks(server: tuple[Server, str]) -> None:
    async def main() -> None:
        channel = GrpcChannel(server[1], shard=2)
        call = asyncio.ensure_future(channel.call(methods.GATHER, gather_request(lookup_id=4), timeout_s=WAIT_S))
        await asyncio.sleep(0.1)
        await channel.close()
        with pytest.raises(errors.ShardUnavailable, match="connection was closed"):
            await call
        with pytest.raises(errors.ShardUnavailable, match="connection was closed"):
            await channel.call(methods.GATHER, gather_request(), timeout_s=WAIT_S)
        with pytest.raises(errors.ShardUnavailable, match="connection was closed"):
            async for _ in channel.stream(methods.RESCALE, 4, timeout_s=WAIT_S):
                pass

    run(main(), WAIT_S)


def test_a_cancelled_caller_is_cancelled(server: tuple[Server, str]) -> None:
    served, address = server

    async def main() -> None:
        async with GrpcChannel(address, shard=2) as channel:
            call = asyncio.ensure_future(channel.call(methods.GATHER, gather_request(lookup_id=4), timeout_s=WAIT_S))
            await asyncio.sleep(0.1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.wait_for(served.cancelled.wait(), WAIT_S)

    run(main(), WAIT_S)


def test_a_call_the_server_does_not_know(server: tuple[Server, str]) -> None:
    with pytest.raises(errors.Internal, match="does not know this call"):
        with_channel(server[1], lambda channel: channel.call(methods.STATUS, None, timeout_s=WAIT_S))


def test_streams(server: tuple[Server, str]) -> None:
    async def collect(channel: GrpcChannel) -> list[RescaleProgress]:
        return [progress async for progress in channel.stream(methods.RESCALE, 4, timeout_s=WAIT_S)]

    found = with_channel(server[1], collect)
    assert [(progress.pages_moved, progress.done) for progress in found] == [
        (0, False),
        (1, False),
        (2, False),
        (3, True),
    ]


def test_a_stream_that_fails_gives_what_came_before(server: tuple[Server, str]) -> None:
    found: list[RescaleProgress] = []

    async def collect(channel: GrpcChannel) -> None:
        async for progress in channel.stream(methods.RESCALE, 3, timeout_s=WAIT_S):
            found.append(progress)  # noqa: PERF401

    with pytest.raises(errors.DataLoss, match="half way"):
        with_channel(server[1], collect)
    assert len(found) == 3


def test_two_servers_cannot_share_a_port(server: tuple[Server, str]) -> None:
    async def second() -> None:
        other = grpc.aio.server(options=server_options())
        try:
            other.add_insecure_port(server[1])
        finally:
            await other.stop(None)

    with pytest.raises(RuntimeError, match="Failed to bind"):
        run(second(), WAIT_S)
