"""A shard's process tells the controller that Ray has started it again."""

from pathlib import Path
from typing import Any

import pytest

from mempool.config import ClusterConfig, PoolConfig, ShardConfig, StorageConfig
from mempool.errors import DataLoss, StorageFailed
from mempool.rayhost import shard_actor, shard_serving
from mempool.rayhost.shard_actor import ShardProcess
from mempool.rayhost.state.kept import Wanted
from mempool.types import ShardInfo

CONFIG = ClusterConfig(pool=PoolConfig(name="told", shards=1))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("controller", [False, True])
def test_the_controller_hears_of_a_start_that_is_not_the_first(
    again: bool, controller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Context:
        was_current_actor_reconstructed = again

        def get_node_id(self) -> str:
            return "a-node"

    class Actor:
        def __init__(self, name: str) -> None:
            self._name = name
            self.shard_is_back = self

        def remote(self) -> None:
            told.append(self._name)

    def get_actor(name: str, *, namespace: str) -> Actor:
        if not controller:
            raise ValueError(f"no actor {name!r} in {namespace!r}")
        return Actor(name)

    monkeypatch.setattr(shard_actor.ray, "get_runtime_context", Context)
    monkeypatch.setattr(shard_actor.ray, "get_actor", get_actor)
    process = ShardProcess(CONFIG, 0, None)
    assert process.describe().info is None
    assert told == (["told/controller"] if again and controller else [])


def test_a_start_that_is_refused_says_why_to_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        was_current_actor_reconstructed = False

        def get_node_id(self) -> str:
            return "a-node"

    damage: list[Exception] = [DataLoss("file: damaged")]

    async def serve(incarnation: int, _node: str) -> ShardInfo:
        if damage:
            raise damage.pop()
        return ShardInfo(shard=0, address="", incarnation=incarnation)

    monkeypatch.setattr(shard_actor.ray, "get_runtime_context", Context)
    monkeypatch.setattr(shard_actor, "node_ip", lambda: "")
    process = ShardProcess(CONFIG, 0, None)
    monkeypatch.setattr(process, "_serve", serve)
    with pytest.raises(DataLoss):
        process.admit(7)
    assert process.describe().refusal == "file: damaged"
    assert process.admit(7).incarnation == 7
    assert process.describe().info is not None


def test_a_start_that_fails_behind_its_serving_ends_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every later try found the folder locked by this very process."""
    serves: list[Any] = []

    class Context:
        was_current_actor_reconstructed = False

        def get_node_id(self) -> str:
            return "a-node"

    class Serving:
        def __init__(self, *_: object, incarnation: int, **__: object) -> None:
            self.info = ShardInfo(shard=0, address="", incarnation=incarnation)

        async def start(self) -> ShardInfo:
            assert not serves, "the one before has the folder"
            serves.append(self)
            return self.info

        async def stop(self) -> None:
            serves.remove(self)

    monkeypatch.setattr(shard_actor.ray, "get_runtime_context", Context)
    monkeypatch.setattr(shard_actor, "node_ip", lambda: "")
    monkeypatch.setattr(shard_serving, "ShardServing", Serving)
    config = CONFIG.model_copy(update={"shard": ShardConfig(storage=StorageConfig(path=str(tmp_path)))})
    process = ShardProcess(config, 0, None)
    process.keep(Wanted(1, 1))
    with pytest.raises(StorageFailed):  # there is no folder of that shard
        process.admit(7)
    assert not serves
    assert process.describe().info is None
    (tmp_path / "told" / "shard-0").mkdir(parents=True)
    assert process.admit(8).incarnation == 8
    assert process.describe().wanted == Wanted(1, 1)
