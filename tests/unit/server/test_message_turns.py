"""Large messages of one host: beside others' calls they are read with rests, as large answers are made."""

import asyncio
from collections.abc import Coroutine
from unittest.mock import AsyncMock

import pytest
import torch

from mempool.server import turns as turns_module
from mempool.server.turns import LARGE_BYTES, Turns
from mempool.types import GatherReply, Stamp
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.loop import run
from mempool.wire.methods import GATHER

from .doors import CALL_S, gather_request, served

BOUND_S = 20.0
LOUD, OF_LOUD = "loud", "loud:1"


def wait(coroutine: Coroutine[object, object, None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(BOUND_S):
            await coroutine

    asyncio.run(main())


@pytest.fixture(autouse=True)
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """So slow that whoever rests does so until the test has ended."""
    monkeypatch.setattr(turns_module, "_READ_S", 1.0)
    monkeypatch.setattr(turns_module, "_LONGEST_WAIT_S", 1e6)


async def is_read(turns: Turns, connection: str = OF_LOUD) -> bool:
    task = asyncio.ensure_future(turns.to_read(connection.partition(":")[0], connection))
    await asyncio.sleep(0)
    if task.done():
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


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
    stamp = Stamp(shard=0, incarnation=1, epoch=1, table_version=1)

    async def main() -> None:
        shard = AsyncMock()
        shard.gather.return_value = GatherReply(stamp=stamp, blocks=(0,), values=torch.zeros(1, 8))
        async with served(shard) as (address, server), GrpcChannel(address) as channel:
            turns = server._door.turns
            to_read = turns.to_read

            async def noted(host: str, connection: str) -> None:
                asked.append((host, connection))
                assert server._admission.active == 0, "who rests takes no room"
                await to_read(host, connection)

            turns.to_read = noted  # type: ignore[method-assign]
            await channel.call(GATHER, gather_request(), timeout_s=CALL_S)
            assert not turns._large_messages
            await channel.call(GATHER, gather_request(pairs=LARGE_BYTES // 8), timeout_s=CALL_S)
            ((connection, (_, num_bytes)),) = turns._large_messages.items()
            assert num_bytes >= LARGE_BYTES
            assert asked == [(connection.rpartition(":")[0], connection)] * 2

    run(main(), 3 * CALL_S)
