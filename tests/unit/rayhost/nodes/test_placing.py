"""Shards that are started together are spread, by one look at the nodes."""

import asyncio
from collections.abc import Sequence

import pytest

from mempool.config import ClusterConfig
from mempool.rayhost.nodes import placing as placing_module
from mempool.rayhost.nodes.choice import Node
from mempool.rayhost.nodes.placing import Placing
from mempool.rayhost.state.kept import KeptFolder, Wanted

ROOM = {"CPU": 2.0, "memory": 2.0**36}


def config(path: str | None = "/disk") -> ClusterConfig:
    shard = {"num_cpus": 1} | ({} if path is None else {"storage": {"path": path}})
    return ClusterConfig.model_validate({"pool": {"name": "local", "shards": 2}, "shard": shard})


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """Those that live; how often they were looked at is in ``looks``."""
    living: list[Node] = []

    async def look(path: str, pool: str) -> tuple[Node, ...]:
        assert (path, pool) == ("/disk", "local")
        await asyncio.sleep(0)
        living_now = tuple(living)
        looks.append(living_now)
        return living_now

    monkeypatch.setattr(placing_module, "look", look)
    looks.clear()
    return living


looks: list[Sequence[Node]] = []


def placed(placing: Placing, *shards: int) -> list[str | None]:
    async def together() -> list[str | None]:
        return await asyncio.gather(*(placing.place(shard) for shard in shards))

    return asyncio.run(together())


def test_together_they_have_one_look_and_as_much_as_is_free(nodes: list[Node]) -> None:
    nodes += [Node(node_id=name, has=ROOM, free=ROOM) for name in "ab"]
    placing = Placing(config())
    assert placed(placing, 0, 1, 2) == ["a", "b", "a"]
    assert len(looks) == 1
    assert placed(placing, 3) == ["b"], "those before it count, whatever Ray has heard"
    nodes[1] = Node(node_id="b", has=ROOM, free=ROOM | {"CPU": 1.0})
    placing.forget(3), placing.forget(0), placing.found(2, "b")
    assert placed(placing, 0, 3) == ["a", "a"], "one of two has room on b, and it has one"


def test_room_that_was_given_is_given_once(nodes: list[Node]) -> None:
    nodes += [Node(node_id="a", has=ROOM, free=ROOM | {"CPU": 1.0}), Node(node_id="b", has=ROOM, free=ROOM)]
    placing = Placing(config())
    placing.found(7, "b")
    assert placed(placing, 0, 1, 2) == ["a", "b", "b"]


def test_one_that_keeps_nothing_is_bound_to_no_node(nodes: list[Node]) -> None:
    nodes.append(Node(node_id="a", has=ROOM, free=ROOM))
    assert placed(Placing(config(None)), 0) == [None]
    assert looks == []


def test_what_the_folders_say_is_wanted_is_known(nodes: list[Node]) -> None:
    placing = Placing(config())
    for name, wanted in (("a", None), ("b", Wanted(2, 5)), ("c", Wanted(1, 3))):
        kept = {4: KeptFolder(mark=name, changed_ns=1, wanted=wanted)}
        nodes.append(Node(node_id=name, has=ROOM, free=ROOM, folders=kept))
    assert placed(placing, 0) == ["a"]
    assert placing.wanted == Wanted(2, 5)
