"""The life of a call at the door: who asks and until when, slow senders, nothing left of what was refused."""

import asyncio
import gc
import time
import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock

import grpc
import grpc.aio
import pytest
import torch

from mempool.client import GrpcShard
from mempool.errors import DataLoss, DeadlineExceeded, InvalidRequest, ShardUnavailable, StalePlacement
from mempool.observe import Stages
from mempool.server import Server
from mempool.shard import Engine
from mempool.types import GatherReply, GatherRequest, RescaleProgress, ShardInfo, Stamp
from mempool.types.caller import Caller, calling, current_caller
from mempool.types.messages import ArrayGather, ArrayGathered
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.loop import run
from mempool.wire.methods import GATHER, RESCALE, STATUS

from .doors import CALL_S, RAW_OPTIONS, ended, gather_request, raw, served

STAMP = Stamp(shard=0, incarnation=1, epoch=1, table_version=1)
REPLY = GatherReply(stamp=STAMP, blocks=(0,), values=torch.zeros(1, 8))


def test_the_engine_hears_who_asks_and_until_when() -> None:
    found: list[Caller] = []

    async def gather(_: GatherRequest) -> GatherReply:
        found.append(current_caller())
        return REPLY

    async def main() -> None:
        shard = AsyncMock()
        shard.gather = gather
        async with served(shard) as (address, _), GrpcChannel(address) as channel:
            await channel.call(GATHER, gather_request(), timeout_s=CALL_S)
            await channel.call(GATHER, gather_request())

    run(main(), CALL_S)
    with_deadline, without = found
    assert with_deadline.name.startswith("ipv4:127.0.0.1:")
    left_s = with_deadline.remaining_s()
    assert left_s is not None
    assert 0.0 < left_s <= 1.01 * CALL_S  # gRPC sends it in a few digits, rounded up
    assert without.deadline_s is None


def test_the_callers_deadline_goes_along_to_the_next_server() -> None:
    found: list[Caller] = []

    async def gather(_: GatherRequest) -> GatherReply:
        found.append(current_caller())
        return REPLY

    async def main() -> None:
        shard = AsyncMock()
        shard.gather = gather
        async with served(shard) as (address, _):
            host = GrpcShard(ShardInfo(shard=0, address=address, incarnation=1), GrpcChannel(address, shard=0))
            with calling(Caller("a router", time.monotonic() + 4.98)):  # gRPC rounds it up, to 10 ms
                await host.gather(gather_request())
            await host.gather(gather_request())
            await host.close()

    run(main(), CALL_S)
    left_s = found[0].remaining_s()
    assert left_s is not None
    assert 0.0 < left_s <= 5.0
    assert found[1].deadline_s is None


def test_stages_of_a_call_are_timed_where_the_engine_times_its_own() -> None:
    stages = Stages()

    async def main() -> None:
        shard = AsyncMock()
        shard.gather.return_value = REPLY
        async with served(shard, stages=stages) as (address, _), GrpcChannel(address) as channel:
            for _ in range(3):
                await channel.call(GATHER, gather_request(), timeout_s=CALL_S)

    run(main(), CALL_S)
    assert {time.stage: time.count for time in stages.snapshot()} == dict.fromkeys(
        ("decode", "door", "encode", "receive", "reply"), 3
    )


class AnswersArrays:
    """A shard that is asked at once, for sums of one: what it was asked, and what it says."""

    def __init__(self, said: Exception | None = None, *, has: bool = True) -> None:
        self.asked: list[tuple[ArrayGather, int, str]] = []
        self.had: list[bool] = []
        self._said, self._has = said, has

    def gather_arrays(self, asked: ArrayGather, *, cost: int, caller: str, space: Any) -> ArrayGathered | None:
        self.asked.append((asked, cost, caller))
        if self._said is not None:
            raise self._said
        values = space(asked.offsets.shape[0] - 1, 8)
        self.had.append(values is not None)
        if values is None or not self._has:
            return None
        values[:] = 1.0
        return ArrayGathered(STAMP, (0,), values)

    def gather(self, request: GatherRequest, **_: Any) -> None:
        """It leaves all else to its own calls."""


@pytest.mark.parametrize(
    ("at_once", "asks", "answers"),
    [
        (AnswersArrays(), {}, True),
        (AnswersArrays(has=False), {}, False),
        (AnswersArrays(StalePlacement("another epoch")), {}, False),
        (AnswersArrays(), {"bags": 2**13}, False),
        (AnswersArrays(), {"pin": "8c1e"}, False),
    ],
)
def test_a_small_gather_is_answered_where_it_arrives_and_else_by_its_own_call(
    at_once: AnswersArrays, asks: dict[str, Any], answers: bool
) -> None:
    stages = Stages()
    bags, pin = asks.get("bags", 1), asks.get("pin", "")
    request = replace(
        gather_request(), ids=torch.tensor([3, 1, 2, 1]).to(torch.uint32), pin=pin,
        offsets=torch.cat((torch.zeros(bags, dtype=torch.int64), torch.tensor([4]))),
    )  # fmt: skip

    async def main() -> GatherReply:
        shard = AsyncMock()
        shard.gather.return_value = REPLY
        async with served(shard, at_once=at_once, stages=stages) as (address, _), GrpcChannel(address) as channel:
            reply = await channel.call(GATHER, request, timeout_s=CALL_S)
            assert shard.gather.await_count == (not answers)
            return reply

    reply = run(main(), CALL_S)
    assert (reply.stamp, reply.blocks) == (STAMP, (0,))
    assert torch.equal(reply.values, torch.full((1, 8), float(answers)))
    for asked, cost, caller in at_once.asked:
        assert asked.ids.tolist() == [3, 1, 2, 1]
        assert cost > asked.ids.nbytes
        assert caller.startswith("ipv4:127.0.0.1:")
    assert len(at_once.asked) == (not pin)
    if bags > 1:
        assert at_once.had == [False], "there is no room for so large an answer yet"
    counts = {time.stage: time.count for time in stages.snapshot()}
    assert counts.keys() == {"decode", "door", "encode", "receive", "reply"}
    assert set(counts.values()) == {1}


def test_a_sender_that_is_too_slow_is_given_up() -> None:
    async def main() -> grpc.StatusCode:
        async with (
            served(receive_timeout_s=0.2) as (address, server),
            grpc.aio.insecure_channel(address, options=RAW_OPTIONS) as channel,
        ):
            call = channel.stream_unary(GATHER.path)(timeout=CALL_S)  # sends its headers, and then nothing
            code: grpc.StatusCode = await call.code()
            assert server._admission.active <= 1
            await server._admission.empty(CALL_S)
            assert server._admission.used_bytes == 0
            return code

    assert run(main(), CALL_S) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_call_without_a_message_is_refused() -> None:
    async def main() -> grpc.StatusCode:
        async with served() as (address, _), grpc.aio.insecure_channel(address, options=RAW_OPTIONS) as channel:
            code: grpc.StatusCode = await channel.stream_unary(GATHER.path)(iter(()), timeout=CALL_S).code()
            return code

    assert run(main(), CALL_S) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_caller_that_hangs_up_gives_its_room_back() -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def gather(_: GatherRequest) -> GatherReply:
            begun.set()
            await asyncio.sleep(CALL_S)
            return REPLY

        shard = AsyncMock()
        shard.gather = gather
        async with served(shard) as (address, server):
            calling_task = asyncio.create_task(raw(address, GATHER.path, GATHER.request.encode(gather_request())))
            await begun.wait()
            assert server._admission.active == 1
            calling_task.cancel()
            await server._admission.empty(CALL_S)
            assert (server._admission.active, server._admission.used_bytes) == (0, 0)

    run(main(), CALL_S)


def test_nothing_of_a_refused_call_outlives_it() -> None:
    """With the cyclic collector off: errors hold tracebacks, these frames, these the requests and replies."""
    alive: list[weakref.ref[torch.Tensor]] = []

    async def refuse(request: GatherRequest) -> GatherReply:
        alive.append(weakref.ref(request.ids))
        try:
            raise KeyError("on the way")
        except KeyError as cause:
            error = StalePlacement("the request was planned for another epoch")  # which its own frame keeps alive
            raise error from cause

    async def too_much(request: GatherRequest) -> GatherReply:
        alive.append(weakref.ref(request.ids))
        values = torch.zeros(1, 2**19)
        alive.append(weakref.ref(values))
        return GatherReply(stamp=STAMP, blocks=(0,), values=values)

    async def main(gather: Any, code: grpc.StatusCode) -> None:
        shard = AsyncMock()
        shard.gather = gather
        frame = GATHER.request.encode(gather_request(pairs=10_000))
        async with (
            served(shard, max_message_bytes=2**20) as (address, _),
            grpc.aio.insecure_channel(address, options=RAW_OPTIONS) as channel,
        ):
            call = channel.unary_unary(GATHER.path)
            for _ in range(50):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(frame, timeout=CALL_S)
                assert caught.value.code() is code
                del caught
            await asyncio.sleep(0.05)

    engine = Engine(ShardInfo(shard=0, address="", incarnation=1))

    async def by_engine(request: GatherRequest) -> GatherReply:
        alive.append(weakref.ref(request.ids))
        return await engine.gather(request)

    gc.collect()
    gc.disable()
    try:
        run(main(refuse, grpc.StatusCode.ABORTED), 3 * CALL_S)
        run(main(too_much, grpc.StatusCode.RESOURCE_EXHAUSTED), 3 * CALL_S)
        run(main(by_engine, grpc.StatusCode.NOT_FOUND), 3 * CALL_S)
        left = sum(reference() is not None for reference in alive)
    finally:
        gc.enable()
        run(engine.close(), CALL_S)
    assert len(alive) == 200
    assert left == 0


@pytest.mark.parametrize("error", [InvalidRequest("no"), DataLoss("gone", shard=3), ShardUnavailable("later")])
def test_errors_arrive_as_themselves(error: Exception) -> None:
    async def main() -> None:
        shard = AsyncMock()
        shard.gather.side_effect = error
        async with served(shard) as (address, _), GrpcChannel(address, shard=0) as channel:
            with pytest.raises(type(error)) as caught:
                await channel.call(GATHER, gather_request(), timeout_s=CALL_S)
        assert str(caught.value.message) == str(error.message)  # type: ignore[attr-defined]

    run(main(), CALL_S)


def test_what_is_not_ours_is_a_bug_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> grpc.StatusCode:
        shard = AsyncMock()
        shard.status.side_effect = ZeroDivisionError("of all things")
        async with served(shard) as (address, _):
            return await ended(address, STATUS.path, b"")

    assert run(main(), CALL_S) is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError: of all things" in caplog.text


def test_an_error_half_way_through_a_stream_ends_it() -> None:
    async def rescale(shards: int) -> Any:
        yield RescaleProgress(
            shards_before=1,
            shards_after=shards,
            pages_moved=0,
            pages_total=1,
            bytes_moved=0,
            bytes_total=1,
            table="t",
            done=False,
        )
        raise DeadlineExceeded("half way")

    async def main() -> None:

        server = Server(token=None)
        address = f"127.0.0.1:{server.bind('127.0.0.1', [0])}"
        pool = AsyncMock()
        pool.rescale = rescale
        await server.start(shard=None, pool=pool, lookup=AsyncMock())
        try:
            async with GrpcChannel(address) as channel:
                stream = aiter(channel.stream(RESCALE, 2, timeout_s=CALL_S))
                assert (await anext(stream)).pages_total == 1
                with pytest.raises(DeadlineExceeded, match="half way"):
                    await anext(stream)
        finally:
            await server.stop(0.0)

    run(main(), CALL_S)


def test_answers_that_nobody_takes_stay_counted_and_lock_no_other_out() -> None:
    """Of clients that stopped reading: their answers lie in gRPC until they go away."""
    engine = Engine(ShardInfo(shard=0, address="", incarnation=1), client_memory_bytes=128 * 2**20)
    sizes: list[int] = []
    asked = 0

    async def gather(request: GatherRequest) -> GatherReply:
        nonlocal asked
        asked += 1
        width = 2**23 if request.ids.numel() == 2 else 8

        def answer(_: object) -> GatherReply:
            engine._thread.reserve(4 * width)
            sizes.append(width)
            return GatherReply(stamp=STAMP, blocks=(0,), values=torch.zeros(1, width))

        reply: GatherReply = await engine._thread.run("gather", answer)
        return reply

    async def main() -> None:
        shard = AsyncMock()
        shard.gather = gather
        large, small = (GATHER.request.encode(gather_request(pairs=pairs)) for pairs in (2, 1))
        async with served(shard, max_message_bytes=2**26, in_flight_bytes=2**28) as (address, server):
            channels = [grpc.aio.insecure_channel(address, options=RAW_OPTIONS) for _ in range(8)]
            calls = [channel.unary_stream(GATHER.path)(large, timeout=3 * CALL_S) for channel in channels]
            while asked < 8 or server._admission.active > len(sizes):  # those that are refused have ended
                await asyncio.sleep(0.01)
            assert sizes == [2**23, 2**23]  # 32 MiB each, of the 96 that calls may have; a third leaves room for none
            assert engine._budget.queued_bytes > 2**26
            await raw(address, GATHER.path, small)
            assert [call.done() for call in calls] == [False] * 8, "nobody has read"
            for channel in channels:
                await channel.close()
            await server._admission.empty(CALL_S)
            assert engine._budget.queued_bytes == 0

    try:
        run(main(), CALL_S)
    finally:
        run(engine.close(), CALL_S)
