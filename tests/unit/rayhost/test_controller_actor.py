"""When the controller's process looks after its shards: when one says that it is back, not at every tick."""

import asyncio
from typing import Any

import pytest

from mempool.config import ClusterConfig, PoolConfig, ShardConfig
from mempool.controller import Controller
from mempool.errors import ShardUnavailable
from mempool.rayhost import controller_actor
from mempool.rayhost.controller_actor import ControllerProcess
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.shard_actor import Description
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run

CONFIG = ClusterConfig(pool=PoolConfig(name="watched", shards=1, port=0))


class ActedLauncher:
    """Shards that start at once; ``back`` are those that Ray has restarted."""

    def __init__(self) -> None:
        self.looks = 0
        self.back: list[Description] = []
        self.failures = 0
        self.known: list[Description] = []
        self.refusals: dict[int, str] = {}

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:  # noqa: ARG002
        return ShardInfo(shard=shard, address="", incarnation=1)

    async def stop(self, info: ShardInfo) -> None:
        pass

    def heard(self, incarnation: int) -> None:
        self.highest = incarnation

    async def changed(self) -> list[Description]:
        self.looks += 1
        if self.failures:
            self.failures -= 1
            raise RuntimeError("Ray is away")
        back, self.back = self.back, []
        return back

    def acknowledge(self, start: Description) -> None:
        self.known.append(start)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> ActedLauncher:
    acted = ActedLauncher()

    class Context:
        was_current_actor_reconstructed = False

    monkeypatch.setattr(controller_actor, "RayLauncher", lambda *_, **__: acted)
    monkeypatch.setattr(controller_actor, "node_ip", lambda: "127.0.0.1")
    monkeypatch.setattr(controller_actor.ray, "get_runtime_context", Context)
    return acted


async def until(check: Any) -> None:
    async with asyncio.timeout(20):
        while not check():
            await asyncio.sleep(0.01)


def test_a_shard_that_is_back_is_looked_after_when_it_says_so(
    launcher: ActedLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_actor, "_LOOK_S", 3600.0)
    monkeypatch.setattr(controller_actor, "_RETRY_S", 0.01)
    told: list[ShardInfo] = []
    process = ControllerProcess(CONFIG, PoolKeys(token=None, controller_key="k"), 30.0)

    async def restarted(info: ShardInfo) -> None:
        told.append(info)

    monkeypatch.setattr(process._controller, "shard_restarted", restarted)
    process.start()
    try:
        info = ShardInfo(shard=0, address="", incarnation=2)
        launcher.back = [Description(boot_id="second", info=info)]
        launcher.failures = 2  # tried again, though nobody says anything more
        process.shard_is_back()
        run(until(lambda: launcher.known), timeout_s=30)
        assert told == [info]
        assert launcher.looks == 3
    finally:
        process.stop()


def test_a_shard_that_hangs_keeps_no_other_one_away(launcher: ActedLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_actor, "_RETRY_S", 0.01)
    hanging, back = (
        Description(boot_id="second", info=ShardInfo(shard=shard, address="", incarnation=2)) for shard in (0, 1)
    )
    process = ControllerProcess(CONFIG, PoolKeys(token=None, controller_key="k"), 30.0)

    async def restarted(info: ShardInfo) -> None:
        if info.shard == 0:
            raise ShardUnavailable("no answer")

    monkeypatch.setattr(process._controller, "shard_restarted", restarted)
    process.start()
    try:
        launcher.back = [hanging, back]
        process.shard_is_back()
        run(until(lambda: launcher.known == [back]), timeout_s=30)
    finally:
        process.stop()


@pytest.mark.usefixtures("launcher")
def test_a_freeze_allows_for_the_trainers_lease_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Heard(Controller):
        def __init__(self, *args: Any, **options: Any) -> None:
            given.update(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(controller_actor, "Controller", Heard)
    config = CONFIG.model_copy(update={"shard": ShardConfig(trainer_lease=3)})
    ControllerProcess(config, PoolKeys(token=None, controller_key="k"), 30.0).stop()
    assert given["trainer_lease_s"] == 3.0


def test_what_was_not_heard_is_found_by_looking(launcher: ActedLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_actor, "_LOOK_S", 0.01)
    process = ControllerProcess(CONFIG, PoolKeys(token=None, controller_key="k"), 30.0)
    process.start()
    try:
        run(until(lambda: launcher.looks > 2), timeout_s=30)
    finally:
        process.stop()


def test_a_process_that_came_back_goes_on_trying_whatever_fails(
    launcher: ActedLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor that is gone between being listed and being asked for is a ValueError of Ray's."""
    tries: list[int] = []

    async def find() -> list[ShardInfo]:
        tries.append(1)
        raise ValueError("Failed to look up actor")

    class Context:
        was_current_actor_reconstructed = True

    monkeypatch.setattr(controller_actor, "_RETRY_S", 0.01)
    monkeypatch.setattr(controller_actor.ray, "get_runtime_context", Context)
    monkeypatch.setattr(launcher, "find", find, raising=False)
    process = ControllerProcess(CONFIG, PoolKeys(token=None, controller_key="k"), 30.0)
    try:
        run(until(lambda: len(tries) > 2), timeout_s=30)
    finally:
        process.stop()
