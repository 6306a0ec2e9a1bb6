"""Large messages of one host: beside others' calls they are read with rests, as large answers are made."""

import asyncio
from unittest.mock import AsyncMock

import numpy as np
import pytest
import torch

from mempool.errors import ShardUnavailable
from mempool.server import turns as turns_module
from mempool.server.turns import LARGE_BYTES, Turns
from mempool.types import (
    DiscardPart,
    DiscardReply,
    DiscardRequest,
    Envelope,
    ExportPages,
    GatherReply,
    PageBatch,
    ShardInfo,
    ShardStatus,
    Stamp,
    StepId,
)
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.loop import run
from mempool.wire.methods import DISCARD, EXPORT_PAGES, GATHER, STATUS

from .doors import CALL_S, CONTROLLER_KEY, gather_request, served
from .waits import is_let_through, wait

LOUD, OF_LOUD = "loud", "loud:1"
STAMP = Stamp(shard=0, incarnation=1, epoch=1, table_version=1)
ENVELOPE = Envelope(table_id=1, epoch=1, incarnation=1)


@pytest.fixture(autouse=True)
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """So slow that whoever rests does so until the test has ended."""
    monkeypatch.setattr(turns_module, "_READ_S", 1.0)
    monkeypatch.setattr(turns_module, "_LONGEST_WAIT_S", 1e6)


async def is_read(turns: Turns, connection: str = OF_LOUD) -> bool:
    return await is_let_through(turns.to_read(connection.partition(":")[0], connection))


def test_beside_others_a_large_message_is_followed_by_a_rest() -> None:
    async def main() -> None:
        turns = Turns()
        turns.has_read(LOUD, OF_LOUD, LARGE_BYTES)
        for _ in range(3):
            assert await is_read(turns)  # nobody else is there
        turns.saw("quiet")
        assert await is_read(turns)  # it has had nothing yet beside the other
        assert not await is_read(turns)

    wait(main())


def test_small_messages_and_other_connections_do_not_rest() -> None:
    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        turns.has_read(LOUD, "loud:2", LARGE_BYTES - 1)
        turns.has_read(LOUD, OF_LOUD, LARGE_BYTES)
        turns.has_read("quiet", "quiet:1", 100)
        await turns.to_read(LOUD, OF_LOUD)
        assert not await is_read(turns)
        for connection in ("loud:2", "loud:3", "quiet:1"):
            assert await is_read(turns, connection)
            assert await is_read(turns, connection)

    wait(main())


def test_connections_of_a_host_rest_for_each_others_messages() -> None:
    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        for port in range(4):
            turns.has_read(LOUD, f"loud:{port}", LARGE_BYTES)
        assert [await is_read(turns, f"loud:{port}") for port in range(4)] == [True, False, False, False]

    wait(main())


def test_hosts_that_have_large_messages_do_not_rest_for_each_other() -> None:
    async def main() -> None:
        turns = Turns()
        for host in ("one", "other"):
            turns.saw(host)
            turns.has_read(host, f"{host}:1", LARGE_BYTES)
        for host in ("one", "other", "one", "other"):
            assert await is_read(turns, f"{host}:1")

    wait(main())


def test_a_rest_has_an_end_whatever_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_LONGEST_WAIT_S", 0.01)

    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        turns.has_read(LOUD, OF_LOUD, 100 * LARGE_BYTES)
        for _ in range(20):
            await turns.to_read(LOUD, OF_LOUD)

    wait(main())


def test_names_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_MAX_HOSTS", 8)
    monkeypatch.setattr(turns_module, "_LONGEST_WAIT_S", 0.0)

    async def main() -> None:
        turns = Turns()
        for number in range(100):
            turns.has_read(f"host{number}", f"host{number}:1", LARGE_BYTES)
            turns.saw("quiet")
            await turns.to_read(f"host{number}", f"host{number}:1")
        assert len(turns._large_messages) <= 8
        assert len(turns._reads_from) <= 8

    wait(main())


def test_the_door_says_what_it_reads_and_asks_before() -> None:
    asked: list[tuple[str, str]] = []

    async def main() -> None:
        shard = AsyncMock()
        shard.gather.return_value = GatherReply(stamp=STAMP, blocks=(0,), values=torch.zeros(1, 8))
        async with served(shard) as (address, server), GrpcChannel(address) as channel:
            turns = server._door.turns
            to_read = turns.to_read

            async def noted(host: str, sender: str) -> float:
                asked.append((host, sender))
                assert server._admission.active == 0, "who rests takes no room"
                return await to_read(host, sender)

            turns.to_read = noted  # type: ignore[method-assign]
            await channel.call(GATHER, gather_request(), timeout_s=CALL_S)
            assert not turns._large_messages
            await channel.call(GATHER, gather_request(pairs=LARGE_BYTES // 8), timeout_s=CALL_S)
            ((connection, (_, num_bytes)),) = turns._large_messages.items()
            assert num_bytes >= LARGE_BYTES
            assert asked == [(connection.partition(" ")[0].rpartition(":")[0], connection)] * 2

    run(main(), 3 * CALL_S)


def test_who_sent_a_large_message_does_not_rest_for_small_ones() -> None:
    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        turns.has_read(LOUD, OF_LOUD, LARGE_BYTES)
        for _ in range(5):
            reserved_s = await turns.to_read(LOUD, OF_LOUD)
            assert reserved_s > 0
            turns.has_read(LOUD, OF_LOUD, LARGE_BYTES - 1, reserved_s=reserved_s)
        reserved_s = await turns.to_read(LOUD, OF_LOUD)
        turns.has_read(LOUD, OF_LOUD, LARGE_BYTES, reserved_s=reserved_s)
        assert not await is_read(turns)

    wait(main())


def test_what_is_given_back_was_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_LONGEST_WAIT_S", 0.0)

    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        turns.has_read(LOUD, OF_LOUD, LARGE_BYTES)
        first = await turns.to_read(LOUD, OF_LOUD)
        rests_until_s = turns._reads_from[LOUD]
        for _ in range(50):  # the longest wait is reached: these add little, whatever they are taken to be
            turns.has_read(LOUD, OF_LOUD, 0, reserved_s=await turns.to_read(LOUD, OF_LOUD))
        assert turns._reads_from[LOUD] == pytest.approx(rests_until_s, abs=1.0)
        turns.gives_back(LOUD, first)
        turns.gives_back("forgotten", first)

    wait(main())


def test_whoever_gives_up_resting_leaves_no_rest_behind() -> None:
    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        turns.has_read(LOUD, OF_LOUD, LARGE_BYTES)
        await turns.to_read(LOUD, OF_LOUD)
        rests_until_s = turns._reads_from[LOUD]
        for _ in range(3):
            assert not await is_read(turns)
        assert turns._reads_from[LOUD] == pytest.approx(rests_until_s)
        assert turns._num_resting == 0

    wait(main())


def test_so_many_rest_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_MAX_RESTING", 2)

    async def main() -> None:
        turns = Turns()
        turns.saw("quiet")
        turns.has_read(LOUD, OF_LOUD, LARGE_BYTES)
        await turns.to_read(LOUD, OF_LOUD)
        resting = [asyncio.ensure_future(turns.to_read(LOUD, OF_LOUD)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ShardUnavailable, match="2 calls rest here already; try again"):
            await turns.to_read(LOUD, OF_LOUD)
        await turns.to_read("quiet", "quiet:1")
        for task in resting:
            task.cancel()
        await asyncio.gather(*resting, return_exceptions=True)

    wait(main())


def test_the_door_takes_calls_of_other_methods_for_messages_of_other_sizes() -> None:
    async def main() -> None:
        shard = AsyncMock()
        shard.gather.return_value = GatherReply(stamp=STAMP, blocks=(0,), values=torch.zeros(1, 8))
        shard.discard.return_value = DiscardReply(discarded=0)
        async with served(shard) as (address, server), GrpcChannel(address) as channel:
            for _ in range(2):
                server._door.turns.saw("quiet")
                await channel.call(GATHER, gather_request(pairs=LARGE_BYTES // 8), timeout_s=CALL_S)
            part = DiscardPart(envelope=ENVELOPE, step_id=StepId(group="g", rank=0, step=1))
            for _ in range(3):
                server._door.turns.saw("quiet")
                await channel.call(DISCARD, DiscardRequest(parts=(part,)), timeout_s=CALL_S)

    run(main(), 3 * CALL_S)


def test_a_call_that_rested_while_the_server_ended_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        shard = AsyncMock()
        async with served(shard) as (address, server), GrpcChannel(address) as channel:

            async def ended_meanwhile(*_: str) -> float:
                server._door.closed = True
                return 0.0

            monkeypatch.setattr(server._door.turns, "to_read", ended_meanwhile)
            with pytest.raises(ShardUnavailable, match="this process is ending"):
                await channel.call(GATHER, gather_request(), timeout_s=CALL_S)
            shard.gather.assert_not_called()

    run(main(), 3 * CALL_S)


def test_a_call_that_is_not_let_in_leaves_no_rest_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        given_back: list[float] = []
        async with served() as (address, server), GrpcChannel(address) as channel:
            turns = server._door.turns
            monkeypatch.setattr(turns, "to_read", AsyncMock(return_value=7.0))
            monkeypatch.setattr(turns, "gives_back", lambda _, reserved_s: given_back.append(reserved_s))
            monkeypatch.setattr(server._admission, "enter", AsyncMock(side_effect=ShardUnavailable("full")))
            with pytest.raises(ShardUnavailable, match="full"):
                await channel.call(GATHER, gather_request(), timeout_s=CALL_S)
        assert given_back == [7.0]

    run(main(), 3 * CALL_S)


def test_pages_that_move_do_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever trains waits until they have moved."""
    pages = np.zeros(1, dtype=np.int64)
    request = ExportPages(table_id=1, row_pages=pages, blocks=(0,))
    batch = PageBatch(
        table_id=1,
        row_pages=pages,
        blocks=(0,),
        key_pages=(),
        arrays={"values": torch.zeros(LARGE_BYTES // 8, 8)},
        version=1,
    )

    info = ShardInfo(shard=0, address="127.0.0.1:1", incarnation=1)

    async def main() -> None:
        shard = AsyncMock()
        shard.export_pages.return_value = batch
        shard.status.return_value = ShardStatus(info=info, state="ready")
        async with served(shard) as (address, server), GrpcChannel(address, controller_key=CONTROLLER_KEY) as channel:
            turns = server._door.turns
            monkeypatch.setattr(turns, "room", AsyncMock(side_effect=AssertionError))
            await channel.call(EXPORT_PAGES, request, timeout_s=CALL_S)
            assert not turns._had_large
            assert not turns._on_the_way
            await channel.call(STATUS, None, timeout_s=CALL_S)
            assert not turns._seen, "nobody rests for who asks how a shard is"

    run(main(), 3 * CALL_S)
