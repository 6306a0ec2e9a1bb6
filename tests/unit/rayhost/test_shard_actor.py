"""A shard's process tells the controller that Ray has started it again."""

import pytest

from mempool.config import ClusterConfig, PoolConfig
from mempool.errors import DataLoss
from mempool.rayhost import shard_actor
from mempool.rayhost.shard_actor import ShardProcess
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
