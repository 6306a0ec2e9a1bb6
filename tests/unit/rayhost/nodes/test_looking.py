"""A look at the nodes of Ray: what each says, and who does not."""

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from mempool.rayhost.nodes import looking
from mempool.rayhost.nodes.choice import Node
from mempool.rayhost.state.kept import KeptFolder

KEPT = {3: KeptFolder(mark="m", changed_ns=1)}


class Reference:
    """A task on a node."""

    def __init__(self, answer: object) -> None:
        self.cancelled = False
        self._future: Future[Any] = Future()
        if isinstance(answer, Exception):
            self._future.set_exception(answer)
        elif answer is not None:
            self._future.set_result(answer)

    def future(self) -> Future[Any]:
        return self._future


def test_a_node_that_fails_or_does_not_answer_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"answers": Reference(KEPT), "fails": Reference(RayError("gone")), "silent": Reference(None)}
    entries = [
        {"NodeID": name, "Alive": name != "dead", "NodeManagerAddress": f"host-{name}", "Resources": {"CPU": 2.0}}
        for name in ("here", "dead", *asked)
    ]
    own = tmp_path / "facts" / "shard-1"
    own.mkdir(parents=True)
    (own / "format.json").write_text("{}")
    monkeypatch.setattr(looking, "_LOOK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(looking, "node_id", lambda: "here")
    monkeypatch.setattr(looking, "_free_by_node", lambda: {"answers": {"CPU": 1.0}})
    monkeypatch.setattr(looking, "_ask", lambda node, *_: asked[node])
    monkeypatch.setattr(looking.ray, "nodes", lambda: entries)
    monkeypatch.setattr(looking.ray, "cancel", lambda reference, force: setattr(reference, "cancelled", force))

    here, *others = asyncio.run(looking.look(str(tmp_path), "facts"))
    assert (here.node_id, list(here.folders)) == ("here", [1])
    assert others == [
        Node(node_id="answers", host="host-answers", has={"CPU": 2.0}, free={"CPU": 1.0}, folders=KEPT),
        Node(node_id="fails", host="host-fails", has={"CPU": 2.0}, silent=True),
        Node(node_id="silent", host="host-silent", has={"CPU": 2.0}, silent=True),
    ]
    assert asked["silent"].cancelled
    assert not asked["answers"].cancelled
