"""Simulated links do to calls what networks do, and a call ends as it would over gRPC."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from mempool.errors import DeadlineExceeded, Internal, MempoolError, NotFound, PoolUnreachable
from mempool.types import DropTable, RescaleProgress
from mempool.types.caller import current_caller
from mempool.wire import methods
from tests.simulation.loop import ProcessLoop, Scheduler
from tests.simulation.network import KEEPALIVE_S, Network, SimulatedChannel

ADDRESS = "controller:7077"


class Dropper:
    """A pool whose tables are dropped, and that remembers it."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self.ended: list[str] = []
        self.takes_s = 0.0
        self.pause_s = 0.5

    async def drop_table(self, name: str, *, table_id: int = 0) -> None:  # noqa: ARG002
        assert current_caller().name == "trainer"
        try:
            await asyncio.sleep(self.takes_s)
        except asyncio.CancelledError:
            self.ended.append(name)
            raise
        if name == "unknown":
            raise NotFound("no table 'unknown'")
        if name == "bug":
            raise KeyError("bug")
        self.dropped.append(name)

    async def rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        for moved in range(3):
            yield RescaleProgress(
                shards_before=1,
                shards_after=shards,
                pages_moved=moved,
                pages_total=3,
                bytes_moved=0,
                bytes_total=0,
                table="",
                done=moved == 2,
            )
            await asyncio.sleep(self.pause_s)

    create_table = table = tables = status = close = restore = checkpoint = fork = None


class Scene:
    """A trainer and a controller."""

    def __init__(self, seed: int = 1, *, encode: bool = False) -> None:
        self.scheduler = Scheduler(seed)
        self.network = Network(self.scheduler, encode=encode)
        self.pool: Any = Dropper()
        self.server = self.scheduler.loop("controller")
        self.client: ProcessLoop = self.scheduler.loop("trainer")
        self.network.listen(ADDRESS, self.server, shard=None, pool=self.pool)
        self.channel: SimulatedChannel = self.network.channels(self.client)(ADDRESS)

    def drop(self, name: str, *, timeout_s: float | None = None, wait_s: float = 1000.0) -> None:
        call = self.channel.call(methods.DROP_TABLE, DropTable(name=name, table_id=0), timeout_s=timeout_s)
        self.scheduler.run(call, loop=self.client, limit_s=self.scheduler.now_s + wait_s)

    def later(self, after_s: float, do: Any, *args: Any) -> None:
        self.scheduler.world.call_later(after_s, do, *args)

    def settle(self, for_s: float = 100.0) -> None:
        self.scheduler.run(asyncio.sleep(for_s))


@pytest.fixture(params=[False, True], ids=["values", "bytes"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    scene = Scene(encode=request.param)
    yield scene
    scene.scheduler.close()
    assert not scene.scheduler.errors


def test_a_call_is_answered_or_fails_as_its_server_says(scene: Scene) -> None:
    scene.drop("facts")
    assert scene.pool.dropped == ["facts"]
    assert 0.0 < scene.scheduler.now_s < 0.01
    with pytest.raises(NotFound, match="no table 'unknown'"):
        scene.drop("unknown")
    with pytest.raises(Internal, match="KeyError"):
        scene.drop("bug")


def test_it_is_known_when_the_last_message_is_due(scene: Scene) -> None:
    scene.network.late[1] = 30.0
    with pytest.raises(DeadlineExceeded):
        scene.drop("facts", timeout_s=1.0)
    scene.drop("others")
    assert scene.pool.dropped == ["others"]
    assert scene.scheduler.now_s < 2.0
    assert scene.network.due_s == pytest.approx(30.0, abs=0.01)
    scene.settle(scene.network.due_s - scene.scheduler.now_s + 0.001)
    assert scene.pool.dropped == ["others", "facts"]


def test_a_stream_comes_whole_and_in_order(scene: Scene) -> None:
    async def watch() -> list[int]:
        return [report.pages_moved async for report in scene.channel.stream(methods.RESCALE, 2)]

    scene.network.weather.slow = 0.5
    for _ in range(5):
        assert scene.scheduler.run(watch(), loop=scene.client) == [0, 1, 2]


def test_a_stream_that_ends_with_its_last_report_is_told_of_it_first(scene: Scene) -> None:
    async def watch() -> list[int]:
        return [report.pages_moved async for report in scene.channel.stream(methods.RESCALE, 2)]

    scene.pool.pause_s = 0.0
    for _ in range(40):
        assert scene.scheduler.run(watch(), loop=scene.client) == [0, 1, 2]


def test_nobody_there_refuses_at_once_and_a_death_breaks_the_call(scene: Scene) -> None:
    scene.pool.takes_s = 50.0
    scene.later(1.0, scene.network.died, scene.server)
    with pytest.raises(PoolUnreachable, match="died"):
        scene.drop("facts")
    assert scene.scheduler.now_s < 1.1
    with pytest.raises(PoolUnreachable, match="refused") as refused:
        scene.drop("facts")
    assert refused.value.refused
    assert scene.scheduler.now_s < 1.2


def test_a_deadline_ends_the_call_on_both_sides(scene: Scene) -> None:
    scene.pool.takes_s = 50.0
    with pytest.raises(DeadlineExceeded):
        scene.drop("facts", timeout_s=2.0)
    scene.settle()
    assert scene.pool.ended == ["facts"]
    assert not scene.pool.dropped


def test_a_caller_that_goes_away_ends_the_call_at_the_server(scene: Scene) -> None:
    async def leave() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await scene.channel.call(methods.DROP_TABLE, DropTable(name="facts", table_id=0))

    scene.pool.takes_s = 50.0
    scene.scheduler.run(leave(), loop=scene.client)
    scene.settle()
    assert scene.pool.ended == ["facts"]


@pytest.mark.parametrize("way", [("trainer", "controller"), ("controller", "trainer")])
def test_who_is_cut_off_is_silent_until_the_connection_is_given_up(scene: Scene, way: tuple[str, str]) -> None:
    scene.network.cut.add(way)
    with pytest.raises(PoolUnreachable, match="keepalive"):
        scene.drop("facts")
    assert scene.scheduler.now_s == pytest.approx(KEEPALIVE_S, abs=1.0)
    assert scene.pool.dropped == (["facts"] if way[0] == "controller" else [])
    scene.network.cut.clear()
    scene.drop("facts")


def test_what_was_sent_while_cut_off_arrives_late(scene: Scene) -> None:
    scene.network.cut.add(("trainer", "controller"))
    scene.later(10.0, scene.network.cut.clear)
    scene.drop("facts")
    assert 10.0 < scene.scheduler.now_s < 30.0
    assert scene.pool.dropped == ["facts"]


@pytest.mark.parametrize("way", ["request", "reply"])
def test_a_lost_message_breaks_the_call_whether_or_not_it_was_done(scene: Scene, way: str) -> None:
    if way == "request":
        scene.network.weather.loss = 1.0
    else:
        scene.pool.takes_s = 1.0
        scene.later(0.5, setattr, scene.network.weather, "loss", 1.0)
    with pytest.raises(PoolUnreachable, match="reset"):
        scene.drop("facts")
    assert scene.pool.dropped == ([] if way == "request" else ["facts"])


def test_a_request_may_come_twice_the_second_time_late(scene: Scene) -> None:
    scene.network.weather.repeat = 1.0
    scene.drop("facts")
    assert scene.pool.dropped == ["facts"]
    scene.settle()
    assert scene.pool.dropped == ["facts", "facts"]


def test_a_server_that_stands_still_answers_late(scene: Scene) -> None:
    scene.server.stop()
    scene.later(30.0, scene.server.resume)
    scene.drop("facts")
    assert 30.0 < scene.scheduler.now_s < 31.0


def test_messages_overtake_each_other_and_a_seed_says_how() -> None:
    def order(seed: int) -> list[str]:
        scene = Scene(seed)
        calls = [scene.channel.call(methods.DROP_TABLE, DropTable(name=name, table_id=0)) for name in "abcdef"]

        async def together() -> None:
            await asyncio.gather(*calls, return_exceptions=True)

        scene.scheduler.run(together(), loop=scene.client)
        scene.scheduler.close()
        return scene.pool.dropped

    orders = [order(seed) for seed in range(8)]
    assert len({tuple(found) for found in orders}) > 4
    assert orders == [order(seed) for seed in range(8)]


def test_a_closed_channel_ends_its_calls(scene: Scene) -> None:
    scene.pool.takes_s = 50.0
    scene.client.call_later(1.0, lambda: scene.client.create_task(scene.channel.close()))
    with pytest.raises(MempoolError, match="closed on this side"):
        scene.drop("facts")
    with pytest.raises(MempoolError, match="closed on this side"):
        scene.drop("facts")
