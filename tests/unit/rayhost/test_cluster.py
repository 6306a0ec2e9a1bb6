"""What `up` and `down` end, and above all what they leave alone, beside a Ray that is only acted."""

import socket
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError

from mempool.config import ClusterConfig, PoolConfig
from mempool.controller import Controller
from mempool.errors import AlreadyExists, ConfigError, NotFound, PoolUnreachable, ShardUnavailable
from mempool.rayhost import cluster, launcher, ray_process
from mempool.rayhost.cluster import down, up
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.launcher import RayLauncher
from mempool.rayhost.serving import ControllerServing
from mempool.rayhost.state.records import PoolRecord, read_record, write_record
from mempool.wire.channels import loop

ADDRESS = "10.0.0.9:6379"
KEYS = PoolKeys(token=None, controller_key="a-key")
PORT_PROBLEM = ray_process.port_problem


class Actor:
    """A controller that answers its address, or fails."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.start = self.stop = self.waiting_for = self

    def remote(self, _drop: bool = False) -> "Actor":
        return self


class ActedRay:
    """Actors by name, and what was ended."""

    def __init__(self) -> None:
        self.actors: dict[str, Actor] = {}
        self.hidden: set[str] = set()
        self.killed: list[str] = []
        self.ended: list[int] = []
        self.start_failure: Exception | None = None
        self.unreachable = False
        self.free = {"CPU": 2.0, "memory": 2.0 * 2**30}

    def attach(self, address: str) -> str:
        if self.unreachable:
            raise PoolUnreachable(f"no Ray at {address}")
        return ADDRESS

    def end(self, pid: int, _address: str, *, say: object) -> None:  # noqa: ARG002
        self.ended.append(pid)

    def names(self, **_: object) -> list[dict[str, str]]:
        shown = [{"name": name, "namespace": "mempool"} for name in self.actors if name not in self.hidden]
        self.hidden.clear()
        return shown

    def make(self, *_: object, name: str, **__: object) -> Actor:
        if name in self.actors:
            raise ValueError(f"The name {name} (namespace=mempool) is already taken.")
        self.actors[name] = Actor(self.start_failure)
        return self.actors[name]

    def get(self, actor: Actor, **_: object) -> str:
        if actor.failure is not None:
            raise actor.failure
        return "127.0.0.1:7077"

    def kill(self, actor: Actor, **_: object) -> None:
        (name,) = (name for name, known in self.actors.items() if known is actor)
        self.killed.append(name)
        del self.actors[name]


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ActedRay:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = ActedRay()

    class Context:
        gcs_address = ADDRESS

        def get_node_id(self) -> str:
            return "0" * 56

    replaced: dict[tuple[Any, str], Any] = {
        (ray_process, "attach"): found.attach,
        (ray_process, "end"): found.end,
        (ray_process, "port_problem"): lambda *_: None,
        (ray_process, "runs"): lambda pid, address: pid > 0 and bool(address),
        (cluster, "make_actor"): found.make,
        (cluster, "cluster_resources"): dict,
        (launcher, "free_resources"): lambda: found.free,
        (launcher, "_FREE_PAUSE_S"): 0.0,
        (cluster, "node_ip"): lambda: "127.0.0.1",
        (ray, "get"): found.get,
        (ray, "kill"): found.kill,
        (ray, "get_actor"): lambda name, **_: found.actors[name],
        (ray, "get_runtime_context"): Context,
        (ray, "shutdown"): lambda: None,
        (ray.util, "list_named_actors"): found.names,
    }
    for (owner, name), value in replaced.items():
        monkeypatch.setattr(owner, name, value)
    return found


def config(name: str = "mine") -> ClusterConfig:
    return ClusterConfig(pool=PoolConfig(name=name, shards=1, port=7077))


def record(name: str, ray_pid: int | None = None, ray_address: str = ADDRESS) -> PoolRecord:
    return PoolRecord(
        name=name, address="127.0.0.1:7077", ray_address=ray_address, ray_pid=ray_pid, config=config(name)
    )


def test_the_later_of_two_ups_leaves_the_earlier_ones_actors_alone(acted: ActedRay) -> None:
    acted.actors["mine/controller"] = earlier = Actor()
    acted.hidden = {"mine/controller"}  # made after the later one had looked
    with pytest.raises(AlreadyExists, match="mempool down --pool mine"):
        up(config(), say=lambda _: None)
    assert acted.killed == []
    assert acted.actors == {"mine/controller": earlier}


def test_more_shards_than_ray_has_room_for_are_not_begun(acted: ActedRay) -> None:
    """A slip of the finger in the number of shards."""
    many = ClusterConfig(pool=PoolConfig(name="mine", shards=400, port=7077))
    with pytest.raises(ShardUnavailable, match=r"no room for 400 more shard\(s\) .*memory 156.2 GiB, free 2.0 GiB"):
        up(many, say=lambda _: None)
    assert (acted.actors, read_record("mine")) == ({}, None)
    joining = ClusterConfig.model_validate(many.model_dump() | {"ray": {"autoscaling": True}})
    up(joining, say=lambda _: None)
    assert list(acted.actors) == ["mine/controller"]


def test_an_up_that_fails_ends_what_it_started_and_puts_the_record_back(acted: ActedRay) -> None:
    elsewhere = record("mine", ray_address="10.9.9.9:6379")  # of a pool of that name on another Ray
    write_record(elsewhere)
    acted.start_failure = PoolUnreachable("does not start")
    with pytest.raises(PoolUnreachable, match="does not start"):
        up(config(), say=lambda _: None)
    assert acted.killed == ["mine/controller"]
    assert read_record("mine") == elsewhere


def test_ray_stays_where_a_pool_runs_on_it_that_has_no_record_here(acted: ActedRay) -> None:
    write_record(record("mine", ray_pid=4242))
    acted.actors = {"mine/controller": Actor(), "theirs/controller": Actor()}
    said: list[str] = []
    down("mine", say=said.append)
    assert acted.killed == ["mine/controller"]
    assert acted.ended == []
    assert any("'theirs'" in line and "4242" in line for line in said), said
    assert read_record("mine") is None


def test_ray_that_up_started_ends_with_its_last_pool(acted: ActedRay) -> None:
    write_record(record("mine", ray_pid=4242))
    acted.actors = {"mine/controller": Actor()}
    down("mine", say=lambda _: None)
    assert (acted.killed, acted.ended, read_record("mine")) == (["mine/controller"], [4242], None)


def test_a_pool_that_nobody_started_where_no_ray_runs_is_not_found(acted: ActedRay) -> None:
    acted.unreachable = True
    with pytest.raises(NotFound, match="no pool 'nope' was started here by `mempool up`, and no Ray of this machine"):
        down("nope", say=lambda _: None)


def test_a_ray_of_others_that_does_not_answer_is_not_taken_for_gone(acted: ActedRay) -> None:
    write_record(record("mine"))
    acted.unreachable = True
    with pytest.raises(PoolUnreachable, match=r"delete .*mine\.json"):
        down("mine", say=lambda _: None)
    assert read_record("mine") is not None


@pytest.mark.parametrize(
    ("pool", "warned"),
    [
        ({"bind": "0.0.0.0"}, True),
        ({"bind": "0.0.0.0", "advertise": "10.0.0.9"}, False),
        ({"bind": "127.0.0.1"}, False),
    ],
)
def test_up_says_where_clients_elsewhere_would_be_told_this_machines_loopback(
    acted: ActedRay, pool: dict[str, str], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMPOOL_TOKEN", "a-token")
    said: list[str] = []
    up(ClusterConfig(pool=PoolConfig(name="mine", shards=1, port=7077, **pool)), say=said.append)
    assert list(acted.actors) == ["mine/controller"]
    assert any("set pool.advertise" in line for line in said) == warned


def test_a_taken_port_is_known_before_ray_is_asked(acted: ActedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ray_process, "attach", asked.append)
    monkeypatch.setattr(ray_process, "port_problem", PORT_PROBLEM)
    monkeypatch.setattr(ray_process, "start", lambda *_, **__: asked.append("start"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"'mine' cannot listen on 127.0.0.1, port {port}: .*Set pool.port"):
            up(ClusterConfig(pool=PoolConfig(name="mine", shards=1, port=port)), say=lambda _: None)
    assert asked == []
    assert acted.actors == {}


def test_up_says_what_it_waits_for_until_its_time_is_over(acted: ActedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [GetTimeoutError(), "1 of 2 shards have started", "127.0.0.1:7077", "stopped"]

    def get(*_: object, **__: object) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(ray, "get", get)
    said: list[str] = []
    assert up(config(), say=said.append).address == "127.0.0.1:7077"
    assert any("still starting" in line and "1 of 2 shards have started" in line for line in said)
    down("mine", say=lambda _: None)

    monkeypatch.setattr(cluster, "_SAY_EVERY_S", 0.0)
    answers[:] = [GetTimeoutError(), GetTimeoutError()]
    with pytest.raises(PoolUnreachable, match=r"within 0 s \(the controller's process is not there yet\).*--timeout"):
        up(config(), say=said.append, timeout_s=0.0)
    assert acted.actors == {}


def test_a_pool_that_runs_already_is_known_by_who_has_its_port(
    acted: ActedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve() -> tuple[ControllerServing, str]:
        running = ClusterConfig(pool=PoolConfig(name="mine", shards=1, port=0))
        serving = ControllerServing(running, node_ip="127.0.0.1", keys=KEYS)
        controller = Controller("mine", launcher=RayLauncher(running, keys=KEYS), dial=serving.dial)
        return serving, await serving.start(controller)

    monkeypatch.setattr(ray_process, "port_problem", PORT_PROBLEM)
    serving, address = loop.run(serve(), timeout_s=30)
    port = int(address.rpartition(":")[2])
    try:
        with pytest.raises(AlreadyExists, match="'mine' runs already"):
            up(ClusterConfig(pool=PoolConfig(name="mine", shards=1, port=port)), say=lambda _: None)
        with pytest.raises(ConfigError, match=rf"'yours' cannot listen on 127.0.0.1, port {port}: pool 'mine' does"):
            up(ClusterConfig(pool=PoolConfig(name="yours", shards=1, port=port)), say=lambda _: None)
    finally:
        loop.run(serving.stop(), timeout_s=30)
    assert acted.actors == {}
