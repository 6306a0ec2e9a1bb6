"""The launcher's bookkeeping of starts and restarts, with actors that are plain objects."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from mempool.config import ClusterConfig, PoolConfig, ShardConfig, StorageConfig, load
from mempool.errors import ConfigError, DataLoss, MempoolError, ShardUnavailable
from mempool.rayhost import launcher as launcher_module
from mempool.rayhost.actors import NAMESPACE, shard_variables
from mempool.rayhost.keys import PoolKeys
from mempool.rayhost.launcher import RayLauncher
from mempool.rayhost.nodes import placing
from mempool.rayhost.nodes.choice import Node
from mempool.rayhost.resources import PROCESS_BYTES
from mempool.rayhost.shard_actor import Description, ShardProcess
from mempool.rayhost.state.kept import KeptFolder, Wanted
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run

HERE = "c" * 56  # an id of Ray's
KEYS = PoolKeys(token="a-token", controller_key="a-key")


class FakeMethod:
    """``actor.method``: ``remote(...)`` gives what Ray's references give, a future."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> "FakeMethod":
        self._future: Future[Any] = Future()
        try:
            self._future.set_result(self._call(*arguments))
        except Exception as error:
            self._future.set_exception(error)
        return self

    def future(self) -> Future[Any]:
        return self._future


class FakeShard:
    """An actor around one shard. ``boot`` is another start of its process; ``dead`` makes every call fail."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.dead = False
        self.stopped = self.killed = False
        self.refuses: Exception | None = None
        self.damage: MempoolError | None = None
        self.node_id = HERE
        self.bound: tuple[str | None, bool, Any] = (None, False, "")
        self.boot(1)

    def boot(self, number: int) -> None:
        self.boot_id = f"{self.shard}.{number}"
        self.info: ShardInfo | None = None
        self.wanted: Wanted | None = None
        self.refusal = ""
        self.strayed = False

    @property
    def describe(self) -> FakeMethod:
        return self._method(self._described)

    @property
    def keep(self) -> FakeMethod:
        return self._method(lambda wanted: setattr(self, "wanted", wanted))

    @property
    def admit(self) -> FakeMethod:
        def admit(incarnation: int, _fresh: bool = False) -> ShardInfo:
            if self.refuses is not None:
                raise self.refuses
            if self.damage is not None:
                self.refusal = self.damage.message
                raise RayTaskError("admit", "", self.damage)
            self.info = self.info or ShardInfo(shard=self.shard, address="127.0.0.1:1", incarnation=incarnation)
            return self.info

        return self._method(admit)

    @property
    def stop(self) -> FakeMethod:
        return self._method(lambda _drop=False: setattr(self, "stopped", True))

    def _described(self) -> Description:
        return Description(
            boot_id=self.boot_id,
            info=self.info,
            wanted=self.wanted,
            refusal=self.refusal,
            node_id=self.node_id,
            strayed=self.strayed,
        )

    def _method(self, call: Callable[..., Any]) -> FakeMethod:
        def checked(*arguments: Any) -> Any:
            if self.dead:
                raise ActorDiedError
            return call(*arguments)

        return FakeMethod(checked)


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeShard]:
    """The actors there are, by name."""
    actors: dict[str, FakeShard] = {}

    def make_actor(
        _process: type, _config: object, shard: int, _token: object, home: str | None, stands_in: bool, **options: Any
    ) -> FakeShard:
        assert options["max_task_retries"] == 0
        made = actors.setdefault(options["name"], FakeShard(shard))
        made.bound = (home, stands_in, options["scheduling_strategy"])
        made.node_id, made.strayed = home or HERE, home == ""
        return made

    def get_actor(name: str, **_: object) -> FakeShard:
        return actors[name]

    def list_named_actors(**_: object) -> list[dict[str, str]]:
        ours = [{"name": name, "namespace": NAMESPACE} for name in actors]
        others = [("local/shard-9", "another"), ("other/shard-0", NAMESPACE)]
        return ours + [{"name": name, "namespace": namespace} for name, namespace in others]

    monkeypatch.setattr(launcher_module, "make_actor", make_actor)
    monkeypatch.setattr(launcher_module, "free_resources", lambda: {"CPU": 2.0, "memory": 8.0 * 2**30})
    monkeypatch.setattr(launcher_module.ray, "kill", lambda actor, no_restart: setattr(actor, "killed", no_restart))
    monkeypatch.setattr(launcher_module.ray, "get_actor", get_actor)
    monkeypatch.setattr(launcher_module.ray.util, "list_named_actors", list_named_actors)
    return actors


def make() -> RayLauncher:
    return RayLauncher(ClusterConfig(pool=PoolConfig(name="local", shards=2)), keys=KEYS)


def bounded(coro: Any) -> Any:
    return run(coro, timeout_s=20)


def test_every_start_has_a_higher_incarnation(shards: dict[str, FakeShard]) -> None:
    launcher = make()
    first, second = bounded(launcher.start(0)), bounded(launcher.start(1))
    assert first.incarnation < second.incarnation
    assert bounded(launcher.changed()) == []
    shards["local/shard-0"].boot(2)
    (start,) = bounded(launcher.changed())
    assert start.info.shard == 0
    assert start.info.incarnation > second.incarnation
    assert bounded(launcher.changed()) == [start], "told again until the pool knows"
    launcher.acknowledge(start)
    assert bounded(launcher.changed()) == []


def test_how_many_shards_are_wanted_is_found_by_the_next_controller(shards: dict[str, FakeShard]) -> None:
    launcher = make()
    for shard in range(2):
        bounded(launcher.start(shard))
    assert launcher.wanted == 0
    bounded(launcher.keep_wanted(4))
    shards["local/shard-1"].dead = True
    bounded(launcher.keep_wanted(3))
    shards["local/shard-1"].dead = False
    assert shards["local/shard-1"].wanted is not None
    assert shards["local/shard-1"].wanted.shards == 4, "it missed the last word"
    heir = make()
    bounded(heir.find())
    assert heir.wanted == 3
    shards["local/shard-0"].boot(2)  # it has forgotten, and is told when it is admitted
    bounded(heir.changed())
    bounded(heir.start(2))
    assert {shard.wanted.shards for shard in shards.values() if shard.wanted is not None} == {3, 4}
    assert shards["local/shard-2"].wanted is not None


def test_a_rescale_that_nobody_could_remember_does_not_begin(shards: dict[str, FakeShard]) -> None:
    launcher = make()
    bounded(launcher.start(0))
    shards["local/shard-0"].dead = True
    with pytest.raises(ShardUnavailable, match="none of the 1 shards of pool 'local' answers, so nothing was begun"):
        bounded(launcher.keep_wanted(2))
    assert launcher.wanted == 0


def test_a_shard_on_its_way_is_not_told(shards: dict[str, FakeShard]) -> None:
    launcher = make()
    bounded(launcher.start(0))
    shards["local/shard-0"].dead = True
    shards["local/shard-0"].boot(2)
    assert bounded(launcher.changed()) == []
    shards["local/shard-0"].dead = False
    assert len(bounded(launcher.changed())) == 1


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """Ray's nodes, as a look finds them."""
    living: list[Node] = []

    async def look(_path: str, _pool: str) -> tuple[Node, ...]:
        return tuple(living)

    monkeypatch.setattr(placing, "look", look)
    return living


def keeping() -> RayLauncher:
    shard = ShardConfig(storage=StorageConfig(path="/disk"))
    return RayLauncher(ClusterConfig(pool=PoolConfig(name="local", shards=2), shard=shard), keys=KEYS)


def node(name: str, *kept: int, wanted: Wanted | None = None) -> Node:
    room = {"memory": 2.0**36}
    folders = {shard: KeptFolder(mark=f"{name} {shard}", changed_ns=1, wanted=wanted) for shard in kept}
    return Node(node_id=name * 56, has=room, free=room, folders=folders)


def test_a_shard_that_keeps_what_it_has_is_bound_to_its_node(shards: dict[str, FakeShard], nodes: list[Node]) -> None:
    nodes += [node("a", 1, 2), node("b", 0, wanted=Wanted(1, 3))]
    launcher = keeping()
    for shard in range(3):
        bounded(launcher.start(shard))
    for shard, home in enumerate("baa"):
        bound, stands_in, strategy = shards[f"local/shard-{shard}"].bound
        assert (bound, stands_in) == (home * 56, False)
        assert (strategy.node_id, strategy.soft, strategy._spill_on_unavailable) == (bound, True, False)
    assert launcher.wanted == 3, "as the folders say"
    bounded(launcher.start(3, fresh=True))
    assert shards["local/shard-3"].bound[0] == "b" * 56, "where fewest are"


def test_where_the_path_is_shared_shards_start_anywhere(shards: dict[str, FakeShard], nodes: list[Node]) -> None:
    nodes += [node("a", 0), node("b", 0)]
    nodes[1] = replace(nodes[1], folders=nodes[0].folders)
    bounded(keeping().start(0))
    assert shards["local/shard-0"].bound == (None, False, "SPREAD")


def test_a_shard_whose_node_is_gone_is_bound_to_the_one_it_came_to(
    shards: dict[str, FakeShard], nodes: list[Node]
) -> None:
    nodes.append(node("a"))
    launcher = keeping()
    known = bounded(launcher.start(0))
    strayed = shards["local/shard-0"]
    strayed.boot(2)
    strayed.node_id, strayed.strayed = HERE, True
    (start,) = bounded(launcher.changed())
    assert strayed.killed
    assert strayed.info is None, "it was given something to serve"
    other = shards["local/shard-0.1"]
    assert other.bound[:2] == (HERE, True)
    assert start.info == other.info
    assert start.info.incarnation > known.incarnation
    launcher.acknowledge(start)
    assert bounded(launcher.changed()) == []
    other.strayed = True  # it has begun there, wherever that is
    assert bounded(launcher.changed()) == []


def test_a_shard_that_no_node_could_run_at_first_is_bound_where_it_starts(
    shards: dict[str, FakeShard], nodes: list[Node]
) -> None:
    assert nodes == []
    launcher = keeping()
    bounded(launcher.start(0))
    assert shards["local/shard-0"].bound == ("", False, "SPREAD")
    assert shards["local/shard-0"].killed
    assert shards["local/shard-0.1"].bound[:2] == (HERE, True)
    shards["local/shard-0.1"].refuses = ConfigError("no port")
    bounded(launcher.stop(ShardInfo(shard=0, address="", incarnation=1)))
    assert shards["local/shard-0.1"].stopped


def test_of_two_actors_of_one_shard_the_next_controller_takes_the_later(shards: dict[str, FakeShard]) -> None:
    for name in ("local/shard-0", "local/shard-0.9", "local/shard-0.10", "local/shard-1"):
        shards[name] = FakeShard(int(name[12]))
    launcher = make()
    for _ in range(2):  # one that fails half way is tried again
        assert [info.shard for info in bounded(launcher.find())] == [0, 1]
    assert {name for name, shard in shards.items() if shard.killed} == {"local/shard-0", "local/shard-0.9"}
    shards["local/shard-0.10"].boot(2)
    shards["local/shard-0.10"].strayed = True
    bounded(launcher.changed())
    assert shards["local/shard-0.11"].info is not None


def test_why_a_shard_that_came_back_cannot_start_is_known_until_it_does(shards: dict[str, FakeShard]) -> None:
    launcher = make()
    for number in range(2):
        bounded(launcher.start(number))
    shard = shards["local/shard-1"]
    shard.boot(2)
    shard.damage = DataLoss("file, offset 7: damaged")
    assert bounded(launcher.changed()) == []
    assert launcher.refusals == {1: "file, offset 7: damaged"}
    shard.damage = None  # it has been put right
    (start,) = bounded(launcher.changed())
    assert launcher.refusals == {}
    launcher.acknowledge(start)
    shard.boot(3)
    shard.damage = DataLoss("again")
    bounded(launcher.changed())
    assert launcher.refusals == {1: "again"}
    bounded(launcher.stop(start.info))
    assert launcher.refusals == {}


def test_a_stopped_shard_is_watched_no_more(shards: dict[str, FakeShard]) -> None:
    launcher = make()
    info = bounded(launcher.start(0))
    shard = shards["local/shard-0"]
    bounded(launcher.stop(info))
    assert (shard.stopped, shard.killed) == (True, True)
    shard.boot(2)
    assert bounded(launcher.changed()) == []
    bounded(launcher.stop(info))


def test_a_shard_that_does_not_stop_is_killed(shards: dict[str, FakeShard]) -> None:
    launcher = make()
    info = bounded(launcher.start(0))
    shards["local/shard-0"].dead = True
    bounded(launcher.stop(info))
    assert shards["local/shard-0"].killed


def test_a_restarted_controller_finds_its_shards(shards: dict[str, FakeShard]) -> None:
    before = make()
    known = bounded(before.start(0))
    bounded(before.start(1))
    bounded(before.start(2))
    shards["local/shard-1"].boot(2)  # came back while no controller was there
    shards["local/shard-2"].dead = True  # and this one has not yet
    after = make()
    found = bounded(after.find())
    assert found[0] == known
    for unknown in found[1:]:
        assert (unknown.address, unknown.incarnation) == ("", 0)
    assert len(found) == 3, "another pool's shard was adopted"
    (start,) = bounded(after.changed())
    assert start.info.shard == 1
    assert start.info.incarnation > known.incarnation
    after.acknowledge(start)
    assert bounded(after.changed()) == []
    shards["local/shard-2"].dead = False
    shards["local/shard-2"].boot(2)
    (start,) = bounded(after.changed())
    assert start.info.shard == 2


def test_incarnations_ascend_when_the_clock_goes_back(
    shards: dict[str, FakeShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make()
    known = [bounded(before.start(shard)) for shard in range(2)]
    monkeypatch.setattr(launcher_module.time, "time_ns", lambda: 10**15)  # years ago
    shards["local/shard-1"].boot(2)
    after = make()
    bounded(after.find())
    views_say = known[1].incarnation + 5_000  # of a shard that is away for good
    after.heard(views_say)
    (start,) = bounded(after.changed())
    assert start.info.incarnation == views_say + 1
    assert bounded(after.start(2)).incarnation == views_say + 2
    after.heard(1)
    assert bounded(after.start(3)).incarnation == views_say + 3


def test_a_controller_that_finds_only_new_processes_admits_them(shards: dict[str, FakeShard]) -> None:
    """Nobody could tell of other incarnations: there is nobody to wait for."""
    before = make()
    for shard in range(2):
        bounded(before.start(shard))
        shards[f"local/shard-{shard}"].boot(2)
    found = bounded(make().find())
    assert [info.address for info in found] == ["127.0.0.1:1"] * 2
    assert all(info.incarnation > 0 for info in found)


def config_asking(cpus: float, **ray: object) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {"pool": {"name": "local", "shards": 2}, "shard": {"num_cpus": cpus}, "ray": ray}
    )


def test_room_is_asked_for_at_once_and_told_in_numbers(
    shards: dict[str, FakeShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_module, "_FREE_PAUSE_S", 0.001)
    looks = []

    def free() -> dict[str, float]:
        looks.append(1)
        return {"CPU": 2.0, "memory": 8.0 * 2**30} if len(looks) > 3 else {}

    monkeypatch.setattr(launcher_module, "free_resources", free)
    bounded(RayLauncher(config_asking(1), keys=KEYS).require_room(2))
    assert len(looks) == 4, "what was given back a moment ago is waited for"
    with pytest.raises(ShardUnavailable, match=r"no room for 3 more shard\(s\).* they need CPU 3, free 2\."):
        bounded(RayLauncher(config_asking(1), keys=KEYS).require_room(3))
    bounded(RayLauncher(config_asking(1, autoscaling=True), keys=KEYS).require_room(3))
    with pytest.raises(ShardUnavailable, match=r"they need memory 1562\.5 GiB, free 8\.0 GiB\. Nothing was started"):
        bounded(RayLauncher(config_asking(0), keys=KEYS).require_room(4000))
    assert shards == {}


@pytest.mark.usefixtures("shards")
def test_what_a_start_waits_for_is_said_while_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = RayLauncher(config_asking(1), keys=KEYS)

    async def watched() -> tuple[str, str, str]:
        before = await launcher.starting()
        go_on = asyncio.Event()

        async def placed(_: object) -> Description:
            await go_on.wait()
            return Description(boot_id="a", info=None)

        monkeypatch.setattr(launcher_module, "_describe", placed)
        starting = asyncio.create_task(launcher.start(1))
        while not launcher._starting:
            await asyncio.sleep(0)
        ready = await launcher.starting()
        monkeypatch.setattr(launcher_module, "free_resources", dict)
        lacking = await launcher.starting()
        go_on.set()
        await starting
        assert await launcher.starting() == ""
        return before, ready, lacking

    assert bounded(watched()) == (
        "",
        "shard 1 to start",
        "Ray to place shard 1: needs CPU 1, free 0, memory 0.4 GiB, free 0.0 GiB",
    )


def test_a_start_that_fails_leaves_no_actor(shards: dict[str, FakeShard]) -> None:
    launcher = make()
    shards["local/shard-0"] = FakeShard(0)
    shards["local/shard-0"].dead = True
    with pytest.raises(ShardUnavailable, match=r"num_cpus=0, num_gpus=0; free now: CPU=2, GPU=0"):
        bounded(launcher.start(0))
    assert shards["local/shard-0"].killed
    shards["local/shard-1"] = FakeShard(1)
    shards["local/shard-1"].refuses = ConfigError("no port")
    with pytest.raises(ConfigError, match="no port"):
        bounded(launcher.start(1))
    assert shards["local/shard-1"].killed
    assert bounded(launcher.changed()) == []


def test_a_shard_gets_what_the_8_gpu_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPOOL_TOKEN", "a-token")
    config = load(Path(__file__).parents[3] / "cluster" / "multi-host-8gpu.yaml")
    config = config.model_copy(
        update={"shard": config.shard.model_copy(update={"resources": {"pool_node": 1}, "max_restarts": 7})}
    )
    made: dict[str, Any] = {}

    def make(process: type, *arguments: object, **options: Any) -> FakeShard:
        made.update(options, process=process, arguments=arguments)
        return FakeShard(3)

    monkeypatch.setattr(launcher_module, "make_actor", make)
    info = run(RayLauncher(config, keys=KEYS).start(3), timeout_s=10)
    assert info.shard == 3
    assert info.incarnation > 1_600_000_000_000  # of the clock: above those a controller before this one gave
    assert made == {
        "process": ShardProcess,
        "arguments": (config, 3, KEYS, None, False),
        "name": "memory/shard-3",
        "num_cpus": 2,
        "num_gpus": 1,
        "memory": PROCESS_BYTES,
        "resources": {"pool_node": 1},
        "max_restarts": 7,
        "max_task_retries": 0,
        "scheduling_strategy": "SPREAD",
        "variables": shard_variables(2),
    }
