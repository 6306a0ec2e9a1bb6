"""Which pool a command means, from options, files, records and the environment."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mempool.cli import target as target_module
from mempool.cli.outcome import UsageError
from mempool.cli.target import Target, find_target, named, parts
from mempool.config import ClusterConfig, PoolConfig
from mempool.errors import ConfigError, NotFound, PoolUnreachable
from mempool.rayhost.state.records import PoolRecord, write_record
from tests.support.serving import ServedPool

from .conftest import Command


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMPOOL_STATE", str(tmp_path / "state"))
    for variable in ("MEMPOOL_TOKEN", "MEMPOOL_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def listening() -> Iterator[str]:
    """An address where somebody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def started(name: str, address: str = "127.0.0.1:1") -> None:
    """`up` wrote down such a pool."""
    config = ClusterConfig(pool=PoolConfig(name=name, shards=1))
    write_record(PoolRecord(name=name, address=address, ray_address="127.0.0.1:2", ray_pid=None, config=config))


def written(path: Path, name: str, port: int = 7077) -> Path:
    path.write_text(f"pool: {{name: {name}, shards: 1, port: {port}}}\n")
    return path


def test_the_first_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", "a", 7001)
    found = find_target()
    assert (found.address, found.guessed) == ("localhost:7077", True)
    started("b", "127.0.0.1:7002")
    assert find_target() == Target(address="127.0.0.1:7002", name="b")
    monkeypatch.setenv("MEMPOOL_ADDRESS", "127.0.0.1:7003")
    assert find_target() == Target(address="127.0.0.1:7003")
    assert find_target(pool="b").address == "127.0.0.1:7002"
    assert find_target(file).address == "127.0.0.1:7001"
    assert find_target(file, "a").name == "a"
    started("a", "127.0.0.1:7004")  # with port 0, or on another host's file: where `up` put it
    assert find_target(file).address == "127.0.0.1:7004"
    assert find_target(file, address="127.0.0.1:7005").address == "127.0.0.1:7005"


def test_the_only_one_that_runs(listening: str) -> None:
    started("gone")
    started("running", listening)
    assert find_target().name == "running"
    started("too", listening)
    with pytest.raises(UsageError, match=rf"several pools run.*--pool: running \({listening}\), too \({listening}\)"):
        find_target()
    started("running")
    started("too")
    with pytest.raises(PoolUnreachable, match=r"gone .*running .*too "):
        find_target()


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", "a")
    with pytest.raises(UsageError, match=r"--pool b is not the pool of .*a.yaml, which is 'a'"):
        find_target(file, "b")
    with pytest.raises(UsageError, match="--pool and --address"):
        find_target(pool="a", address="localhost:1")
    started("b")
    with pytest.raises(NotFound, match=r"no pool 'c' .*started here: b"):
        find_target(pool="c")
    with pytest.raises(UsageError, match="port of 'd' is 0"):
        find_target(written(tmp_path / "d.yaml", "d", 0))
    with pytest.raises(ConfigError, match="no such file"):
        find_target(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:0", "host:65536", "http://host:1", "::1:7077", "a:1,b", "[]:1", "h:²"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="is not host:port"):
        parts(address)


def test_addresses() -> None:
    assert parts("a:1, [::1]:2,10.0.0.1:65535") == ["a:1", "[::1]:2", "10.0.0.1:65535"]


def test_the_name_of_a_pool_by_its_address(served: ServedPool) -> None:
    started("b", "127.0.0.1:7002")
    assert named(Target(address="localhost:7002")) == "b"
    assert named(Target(address=served.address)) == "served", "asked"
    with pytest.raises(NotFound, match="no pool that `mempool up` started runs"):
        named(Target(address="localhost:7077", guessed=True))


def test_nobody_there_is_said_once_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "_ANSWER_TIMEOUT_S", 0.0)
    address = "127.0.0.1:1"
    started("mine", address)
    for target, advice in (
        (Target(address=address, guessed=True), r"No pool was started on this machine: .*`mempool up -f FILE`"),
        (Target(address=address, name="mine"), r"`mempool down --pool mine`"),
        (Target(address=address), r"the address right\?"),
        (Target(address=address, name="of a file"), r"the address right\?"),
    ):
        with pytest.raises(PoolUnreachable, match=advice) as caught:
            target.status()
        assert caught.value.message.count(address) == 1
        assert "connection refused" in caught.value.message


def test_status_finds_the_only_pool(served: ServedPool, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMPOOL_STATE")  # as `command` has it
    started("served", served.address)
    started("gone")
    for options in ([], ["--pool", "served"], ["--address", served.address]):
        assert command("status", *options).stdout.startswith(f"pool served at {served.address}: 2 shards, 0 tables")
    assert command("scale", "--shards", 1, "--pool", "served").stdout.splitlines()[-1].startswith("1 shard.")
    assert "started here: gone, served" in command("status", "--pool", "nope", expect=1).stderr
