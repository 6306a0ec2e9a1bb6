"""Shards behind any ``Channel``: a transport of a test's own, which hands requests over as they are."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from mempool.client.transport.shard import GrpcDialer, GrpcShard
from mempool.errors import ShardUnavailable
from mempool.types import Envelope, GatherRequest, ShardInfo, ShardStatus
from mempool.types.caller import Caller, calling
from mempool.wire.methods import Method

INFO = ShardInfo(shard=3, address="somewhere", incarnation=1)


class Handing:
    """A ``Channel`` without a network: every call is encoded, decoded, and answered by what is given."""

    def __init__(self, address: str, answers: dict[str, Any]) -> None:
        self.address = address
        self.answers = answers
        self.calls: list[tuple[str, float | None, bool]] = []
        self.closed = False

    async def call(
        self, method: Method[Any, Any], request: Any, *, timeout_s: float | None = None, narrow_ids: bool = False
    ) -> Any:
        self.calls.append((method.name, timeout_s, narrow_ids))
        method.request.decode(method.request.encode(request, narrow_ids=narrow_ids))
        answer = self.answers[method.name]
        return await answer(request) if callable(answer) else answer

    async def stream(
        self, method: Method[Any, Any], request: Any, *, timeout_s: float | None = None
    ) -> AsyncIterator[Any]:
        yield await self.call(method, request, timeout_s=timeout_s)

    async def close(self) -> None:
        self.closed = True


def gather_request(*ids: int) -> GatherRequest:
    return GatherRequest(
        envelope=Envelope(table_id=1, epoch=1, incarnation=1),
        lookup_id=1,
        ids=torch.tensor(ids),
        weights=None,
        offsets=torch.tensor([0, len(ids)]),
        remember=False,
    )


def test_a_call_has_the_time_its_caller_has_left_and_narrow_ids_where_they_fit() -> None:
    async def main() -> None:
        channel = Handing("somewhere", {"Gather": "answer"})
        shard = GrpcShard(INFO, channel)
        assert await shard.gather(gather_request(0, 2**32 - 1)) == "answer"  # type: ignore[comparison-overlap]
        with calling(Caller("router", time.monotonic() + 5.0)):
            await shard.gather(gather_request(0, 2**32))
        (_, without, narrow), (_, left_s, wide) = channel.calls
        assert (without, narrow, wide) == (None, True, False)
        assert left_s is not None
        assert 0.0 < left_s <= 5.0
        await shard.close()
        assert channel.closed

    asyncio.run(main())


def test_a_connection_that_is_closed_while_a_thread_dials_is_forgotten() -> None:
    async def main() -> None:
        long_ago_s = -1e9

        def closed_meanwhile() -> float:
            dialer._close_idle(asyncio.get_running_loop().time())
            return long_ago_s

        dialer = GrpcDialer(lambda address, **_: Handing(address, {}), clock=closed_meanwhile)
        dialer.dial(INFO)
        dialer._used_s[INFO] = long_ago_s
        assert dialer.dial_at_once(INFO) is not None
        assert dialer.dial(ShardInfo(shard=4, address="elsewhere", incarnation=1))
        assert INFO not in dialer._used_s
        await dialer.close()

    asyncio.run(main())


def test_a_shard_is_busy_while_it_answers() -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def status(_: None) -> ShardStatus:
            await go_on.wait()
            return ShardStatus(info=INFO, state="ready")

        shard = GrpcShard(INFO, Handing("somewhere", {"Status": status}))
        asked = asyncio.create_task(shard.status())
        await asyncio.sleep(0)
        assert shard.busy
        go_on.set()
        assert (await asked).state == "ready"
        assert not shard.busy

    asyncio.run(main())


def test_a_dialer_makes_channels_of_the_kind_it_is_given() -> None:
    made: list[tuple[str, int | None]] = []

    def channels(address: str, *, shard: int | None = None) -> Handing:
        made.append((address, shard))
        return Handing(address, {"ListTables": ()})

    async def main() -> None:
        dialer = GrpcDialer(channels)
        host = dialer.dial(INFO)
        assert dialer.dial(INFO) is host
        assert await host.views() == ()
        await dialer.close()
        with pytest.raises(ShardUnavailable, match="closed on this side"):
            dialer.dial(INFO)

    asyncio.run(main())
    assert made == [("somewhere", 3)]
