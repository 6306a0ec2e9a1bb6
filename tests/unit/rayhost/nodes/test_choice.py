"""The node that a shard is bound to, by table."""

from dataclasses import replace

import pytest

from mempool.errors import ShardUnavailable
from mempool.rayhost.nodes.choice import Node, are_shared, choose
from mempool.rayhost.state.kept import KeptFolder

ASKED = {"CPU": 1.0, "worker": 1.0, "GPU": 0.0}


def node(name: str, shards: int = 0, *, free: float = 4.0, has: float = 4.0, **folders: tuple[str, int]) -> Node:
    """folders: shard_2=("mark", when)."""
    kept = {
        int(shard.removeprefix("shard_")): KeptFolder(mark=mark, changed_ns=changed_ns)
        for shard, (mark, changed_ns) in folders.items()
    }
    return Node(
        node_id=name,
        host=f"host-{name}",
        has={"CPU": has, "worker": 8.0},
        free={"CPU": free, "worker": 8.0},
        shards=shards,
        folders=kept,
    )


CASES: dict[str, tuple[list[Node], str | None]] = {
    "nothing kept: the fewest shards": ([node("a", 2), node("b", 1), node("c", 1)], "b"),
    "nothing kept: room before few": ([node("a", 2), node("b", 0, free=0.5)], "a"),
    "nobody has room now: it waits where few are": ([node("a", 2, free=0), node("b", 1, free=0)], "b"),
    "one that never has room is none": ([node("a", 2, free=0), node("b", 0, has=0)], "a"),
    "none that could run it": ([node("a", has=0)], ""),
    "no nodes": ([], ""),
    "its folder, whoever has fewer": ([node("a", 0), node("b", 5, shard_2=("x", 1))], "b"),
    "its folder, though it is full": ([node("a", 0), node("b", 5, free=0, shard_2=("x", 1))], "b"),
    "another shard's folder says nothing": ([node("a", 0), node("b", 1, shard_3=("x", 1))], "a"),
    "the folder that was changed last": ([node("a", shard_2=("old", 1)), node("b", 3, shard_2=("new", 2))], "b"),
    "some share it: of those the fewest": (
        [node("a", 0), node("b", 2, shard_2=("x", 1)), node("c", 1, shard_2=("x", 1))],
        "c",
    ),
    "whoever sees the newest late is told it by its mark": (
        [node("a"), node("b", 2, shard_2=("x", 9)), node("c", 1, shard_2=("x", 1))],
        "c",
    ),
    "all share it": ([node("a", 0, shard_2=("x", 1)), node("b", 3, shard_2=("x", 1))], None),
    "all share another shard's": ([node("a", shard_2=("x", 1), shard_3=("y", 1)), node("b", shard_3=("y", 1))], None),
    "all that could run it share it": (
        [node("a", shard_2=("x", 1)), node("b", shard_2=("x", 1)), node("head", has=0)],
        None,
    ),
    "one node shares with nobody": ([node("a", shard_2=("x", 1)), node("head", has=0)], "a"),
    "each its own": ([node("a", 1, shard_2=("x", 1)), node("b", 0, shard_3=("y", 1))], "a"),
    "ten-thousandths are Ray's": ([node("a", 0, free=1 - 1e-7), node("b", 1)], "a"),
}


@pytest.mark.parametrize("case", CASES)
def test_where_a_shard_starts(case: str) -> None:
    nodes, expected = CASES[case]
    assert choose(2, nodes, ASKED) == expected
    assert choose(2, nodes[::-1], ASKED) == expected


def test_one_that_begins_with_nothing_spreads_whatever_lies_there() -> None:
    nodes = [node("a", 0), node("b", 1, shard_2=("x", 1))]
    assert choose(2, nodes, ASKED, fresh=True) == "a"
    shared = [node("a", 0, shard_0=("x", 1)), node("b", 1, shard_0=("x", 1))]
    assert choose(2, shared, ASKED, fresh=True) is None


def test_a_folder_on_a_node_that_cannot_run_it_is_not_left_behind() -> None:
    nodes = [node("a"), node("b", has=0, shard_2=("x", 1))]
    with pytest.raises(ShardUnavailable, match=r"shard 2 has its folder on host-b, .* less CPU than"):
        choose(2, nodes, ASKED)
    assert choose(2, nodes, ASKED, fresh=True) == "a"


def test_a_folder_is_not_left_behind_on_a_node_that_does_not_say_what_it_has() -> None:
    silent = replace(node("b"), silent=True)
    assert choose(2, [node("a"), silent], ASKED) == "a", "a new pool waits for nobody"
    assert choose(2, [node("a", shard_2=("x", 1)), silent], ASKED) == "a", "it is found"
    others = [node("a", shard_0=("x", 1)), silent]
    with pytest.raises(ShardUnavailable, match=r"folder of shard 2, and host-b did not say in time"):
        choose(2, others, ASKED)
    assert choose(2, others, ASKED, fresh=True) == "a"
    assert choose(2, [others[0], replace(silent, has={})], ASKED) == "a", "it runs no shard"


@pytest.mark.parametrize(
    ("nodes", "shared"),
    [
        ([], False),
        ([node("a", shard_0=("x", 1))], False),
        ([node("a", shard_0=("x", 1)), node("b")], False),
        ([node("a", shard_0=("x", 1)), node("b", shard_0=("y", 1))], False),
        ([node("a", shard_0=("x", 1)), node("b", shard_0=("x", 2), shard_1=("z", 1))], True),
    ],
)
def test_a_path_is_shared_where_all_see_one_folder(nodes: list[Node], shared: bool) -> None:
    assert are_shared(nodes) == shared
