"""Shards behind any ``Channel``: a transport of a test's own, which hands requests over as they are."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mempool.client.transport.shard import GrpcDialer, GrpcShard
from mempool.errors import InvalidRequest, ShardUnavailable
from mempool.placement.changes import ToldViews, changed
from mempool.types import AttachTable, Envelope, GatherRequest, Placement, ShardInfo, ShardStatus, TableView
from mempool.types.caller import Caller, calling
from mempool.wire import methods
from mempool.wire.codecs.pages import AttachView, SetView
from mempool.wire.methods import Method
from tests.support.faulty import make_schema

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
        dialer._hosts[INFO].used_s = long_ago_s
        assert dialer.dial_at_once(INFO) is not None
        assert dialer.dial(ShardInfo(shard=4, address="elsewhere", incarnation=1))
        assert dialer.dial_at_once(INFO) is None
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


class Views:
    """A shard that takes views, as ``SetView`` is served; one of an old version knows no changes."""

    def __init__(self, *, old: bool = False) -> None:
        self.old = old
        self.view: TableView | None = None
        self.num_bytes: list[int] = []

    async def take(self, request: SetView) -> None:
        frame = methods.SET_VIEW.request.encode(request)
        self.num_bytes.append(len(frame))
        told = methods.SET_VIEW.request.decode(frame)
        if told.view is None and self.old:
            raise InvalidRequest("SetViewRequest.view is missing")
        if told.view is not None:
            self.view = told.view
        else:
            assert told.change is not None
            self.view = changed([] if self.view is None else [self.view], told.change)


def make_view(epoch: int, *moved: int) -> TableView:
    owners = np.zeros((4096, 4), dtype=np.int32)
    owners[list(moved)] = 1
    placement = Placement(table_id=1, epoch=epoch, owners=owners, key_owners=np.zeros(0, dtype=np.int32))
    infos = tuple(ShardInfo(shard=shard, address=f"host-{shard}:1", incarnation=1) for shard in range(2))
    schema = make_schema(num_slots=4096 * 8, value_dim=16)
    return TableView(schema=schema, placement=placement, shards=infos)


@pytest.mark.parametrize("old", [False, True])
def test_a_shard_is_told_what_is_other_in_a_view_than_in_the_one_it_took(old: bool) -> None:
    async def main() -> None:
        views = Views(old=old)
        shard = GrpcShard(INFO, Handing("somewhere", {"SetView": views.take, "DropTable": None}))
        for epoch, moved in enumerate([(), (7,), (7, 9)]):
            target = make_view(epoch, *moved)
            await shard.set_view(target, token="round")
            assert views.view is not None
            assert views.view.placement.same_owners(target.placement)
        were_whole = [num_bytes > 4 * 4096 * 4 for num_bytes in views.num_bytes]
        assert were_whole == ([True, False, True, False, True] if old else [True, False, False])
        assert min(views.num_bytes) < 200
        views.view = make_view(5, 1, 2, 3)  # another controller has told it
        await shard.set_view(make_view(6, 7))
        assert views.view.placement.same_owners(make_view(6, 7).placement)
        await shard.drop_table(1)
        await shard.set_view(make_view(7, 7))
        assert views.num_bytes[-1] > 4 * 4096 * 4

    asyncio.run(main())


class Attached:
    """A shard that tables are attached to, as it is served; one of an old version takes whole views alone."""

    def __init__(self, *, old: bool = False) -> None:
        self.old = old
        self.told = ToldViews()
        self.attached: list[tuple[str, TableView]] = []
        self.num_bytes: list[int] = []

    async def take(self, request: AttachView) -> None:
        frame = methods.ATTACH_TABLE.request.encode(request)
        self.num_bytes.append(len(frame))
        asked = methods.ATTACH_TABLE.request.decode(frame)
        if asked.view is None and self.old:
            raise InvalidRequest("AttachTableRequest.view is missing")
        if asked.view is None:
            assert asked.known is not None
        view = self.told.view(asked.known) if asked.known is not None else asked.view
        assert view is not None
        self.told.tell(view)
        self.attached.append((asked.mode, view))


@pytest.mark.parametrize("old", [False, True])
def test_a_shard_confirms_the_view_that_it_was_given_without_being_given_it_again(old: bool) -> None:
    async def main() -> None:
        shards = Attached(old=old)
        shard = GrpcShard(INFO, Handing("somewhere", {"AttachTable": shards.take}))
        given, other = make_view(0, 3), make_view(0, 4)
        await shard.attach_table(AttachTable(view=given, mode="initialise", pending=True))
        confirmed = replace(given, controller="elsewhere:1")  # the same pages at the same shards
        await shard.attach_table(AttachTable(view=confirmed, mode="confirm"))
        were_whole = [num_bytes > 4 * 4096 * 4 for num_bytes in shards.num_bytes]
        assert were_whole == ([True, False, True] if old else [True, False])
        assert shards.num_bytes[1] < 30
        await shard.attach_table(AttachTable(view=other, mode="confirm"))  # of another controller: it says which
        assert shards.num_bytes[-1] > 4 * 4096 * 4
        shards.told = ToldViews()  # it has been told much else meanwhile
        await shard.attach_table(AttachTable(view=other, mode="confirm"))
        assert shards.num_bytes[-1] > 4 * 4096 * 4
        expected = [("initialise", given), ("confirm", given), ("confirm", other), ("confirm", other)]
        assert [mode for mode, _ in shards.attached] == [mode for mode, _ in expected]
        for (_, view), (_, meant) in zip(shards.attached, expected, strict=True):
            assert view.placement.same_owners(meant.placement)

    asyncio.run(main())


def test_a_view_that_a_shard_did_not_take_is_no_ground_for_the_next_one() -> None:
    async def main() -> None:
        views = Views()
        handing = Handing("somewhere", {"SetView": views.take})
        shard = GrpcShard(INFO, handing)
        await shard.set_view(make_view(0))

        async def fails(_: SetView) -> None:
            raise ShardUnavailable("the connection broke")

        handing.answers["SetView"] = fails
        with pytest.raises(ShardUnavailable):
            await shard.set_view(make_view(1, 7))
        handing.answers["SetView"] = views.take
        await shard.set_view(make_view(2, 7, 9))
        assert len(views.num_bytes) == 2
        assert min(views.num_bytes) > 4 * 4096 * 4

    asyncio.run(main())
