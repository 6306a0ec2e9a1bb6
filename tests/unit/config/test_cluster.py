"""A pool's configuration: defaults, what is refused, and the token."""

from pathlib import Path

import pytest

from mempool.config import ClusterConfig, PoolConfig, RayConfig, ShardConfig, TableConfig, is_loopback
from mempool.errors import ConfigError

TABLE = TableConfig(name="facts", num_slots=4, value_dim=2)


@pytest.fixture(autouse=True)
def _no_token_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMPOOL_TOKEN", raising=False)


def pool(**fields: object) -> PoolConfig:
    return PoolConfig.model_validate({"name": "p", "shards": 2, **fields})


def test_little_need_be_said() -> None:
    config = ClusterConfig.model_validate({"pool": {"name": "p", "shards": 2}})
    assert config == ClusterConfig(pool=pool(), shard=ShardConfig(), ray=RayConfig(), tables=())
    assert (config.pool.bind, config.pool.port, config.pool.advertise, config.pool.shard_ports) == (
        "127.0.0.1",
        7077,
        None,
        None,
    )
    assert (config.shard.device, config.shard.num_gpus, config.shard.num_cpus) == ("auto", 0, 0)
    shard = config.shard
    assert (shard.threads, shard.memory) == (1, 2**31)
    assert (shard.client_bytes, shard.commit_bytes, shard.page_bytes) == (2**29, 2**28, 2**31 - 2**29 - 2**28)
    assert (config.shard.max_restarts, config.ray.address) == (-1, "auto")
    assert config.shard.trainer_lease == 10.0


def test_sections_with_all_lines_commented_out_mean_the_defaults() -> None:
    said = {"pool": {"name": "p", "shards": 2}, "shard": None, "ray": None, "tables": None}
    assert ClusterConfig.model_validate(said) == ClusterConfig(pool=pool())
    with pytest.raises(ConfigError, match=r"pool = None must be a mapping"):
        ClusterConfig.model_validate({"pool": None})


def test_tables_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tables\[2\]\.name = 'facts' is the name of tables\[0\] too"):
        ClusterConfig(pool=pool(), tables=(TABLE, TABLE.model_copy(update={"name": "b"}), TABLE))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LocalHost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    assert pool(bind=host).token() is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.3", "fe80::1", "node-7.example.org", "localhost.evil.org"])
def test_anything_else_needs_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"PoolConfig\.bind = .* there is no token.*token_file.*MEMPOOL_TOKEN"):
        pool(bind=host)
    assert pool(bind=host, token_file="t").bind == host
    monkeypatch.setenv("MEMPOOL_TOKEN", "")
    with pytest.raises(ConfigError, match="there is no token"):
        pool(bind=host)
    monkeypatch.setenv("MEMPOOL_TOKEN", "s3cret")
    assert pool(bind=host).token() == "s3cret"


def test_the_token_file_comes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPOOL_TOKEN", "of-the-variable")
    (tmp_path / "token").write_text("of-the-file\n")
    assert pool(token_file=tmp_path / "token").token() == "of-the-file"


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"two words", b"two\nlines", "gehe\u00efm".encode(), b"a\x00b", b"\xff"]
)
def test_what_is_no_token_is_refused_and_never_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError, match=r"pool\.token_file '.*token'") as caught:
        pool(token_file=tmp_path / "token").token()
    assert not content.strip() or content.decode("latin-1") not in str(caught.value)


def test_a_missing_token_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        pool(token_file=tmp_path / "none").token()


def test_the_token_file_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pool(token_file="t").token_file == tmp_path / "t"
    assert pool(token_file="/etc/t").token_file == Path("/etc/t")
    monkeypatch.setenv("HOME", "/home/me")
    assert pool(token_file="~/t").token_file == Path("/home/me/t")


@pytest.mark.parametrize("host", ["localhost:7077", "http://a", "", "a b", "10.0.0.1:80", "-a", "a."])
def test_hosts_are_hosts_alone(host: str) -> None:
    for field in ("bind", "advertise"):
        with pytest.raises(ConfigError, match=rf"PoolConfig\.{field} = .*give the host alone"):
            pool(**{field: host})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pool(shards=0), r"shards = 0 must be greater than 0"),
        (lambda: pool(port=65536), r"port = 65_536 must be at most 65_535"),
        (lambda: pool(shard_ports="7200-7100"), r"shard_ports = '7200-7100' is not a range of ports"),
        (lambda: pool(shard_ports="7000-7100"), r"port = 7_077 lies within shard_ports \(7000-7100\)"),
        (lambda: pool(line_ports="7077-7100"), r"port = 7_077 lies within line_ports \(7077-7100\)"),
        (
            lambda: pool(shard_ports="7100-7199", line_ports="7199-7299"),
            r"line_ports = .* overlaps shard_ports \(7100-7199\)",
        ),
        (lambda: ShardConfig(threads=0), r"threads = 0 must be greater than 0"),
        (lambda: ShardConfig(memory="2G"), r"memory = '2G' is not an amount of memory"),
        (lambda: ShardConfig(memory=0), r"memory = 0 must be at least 1_048_576"),
        (lambda: ShardConfig(num_gpus=1.5), r"num_gpus = 1\.5 is not whole"),
        (lambda: ShardConfig(device="cuda"), r"device = 'cuda' needs num_gpus above 0"),
        (lambda: ShardConfig(device="cpu", num_gpus=1), r"num_gpus = 1\.0 reserves a GPU that .* never uses"),
        (lambda: ShardConfig(resources={"GPU": 1}), r"resources = {'GPU': 1} names GPU.* shard\.num_gpus"),
        (lambda: ShardConfig(resources={"disk": 0}), r"resources\.disk = 0 must be greater than 0"),
        (lambda: ShardConfig(max_restarts=-2), r"max_restarts = -2 must be at least -1"),
        (lambda: ShardConfig(storage={"path": "pools"}), r"storage\.path = 'pools' is not an absolute path"),
        (lambda: ShardConfig(storage={"path": "/d", "sync": "never"}), r"storage\.sync = 'never' .*'commit' or 'off'"),
        (
            lambda: ShardConfig(storage={"path": "/d", "journal_limit": "1KiB"}),
            r"journal_limit = .* least 1_048_576",
        ),
        (lambda: ShardConfig(storage={}), r"storage\.path is missing"),
        (lambda: ShardConfig(trainer_lease=0.5), r"trainer_lease = 0.5 must be at least 1"),
        (lambda: ShardConfig(trainer_lease=601), r"trainer_lease = 601(\.0)? must be at most 600"),
        (lambda: RayConfig(address="ray"), r"address = 'ray' is not an address of Ray"),
        (lambda: RayConfig(address="ray://a:10001"), r'"local" or the head\'s "host:port"'),
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("address", ["auto", "local", "head:6379", "10.0.0.1:6379", "[::1]:6379"])
def test_addresses_of_ray(address: str) -> None:
    assert RayConfig(address=address).address == address


def test_a_whole_configuration_survives_json() -> None:
    config = ClusterConfig(
        pool=pool(shard_ports="7100-7199", token_file="/t", bind="0.0.0.0"),
        shard=ShardConfig(memory="3GiB", num_gpus=0.5, resources={"disk": 2}),
        tables=(TABLE,),
    )
    assert config.pool.shard_ports == (7100, 7199)
    assert config.shard.memory == 3 * 2**30
    assert ClusterConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("given", "clients", "commits"),
    [
        ({"memory": "64GiB"}, 16 * 2**30, 2**28),
        ({"memory": "160MiB"}, 64 * 2**20, 20 * 2**20),
        ({"memory": "1MiB"}, 2**19, 2**17),
        ({"memory": "1GiB", "client_memory": "100MiB", "commit_memory": "1MiB"}, 100 * 2**20, 2**20),
    ],
)
def test_memory_is_shared_out(given: dict[str, str], clients: int, commits: int) -> None:
    shard = ShardConfig.model_validate(given)
    assert (shard.client_bytes, shard.commit_bytes) == (clients, commits)
    assert shard.page_bytes + clients + commits == shard.memory


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"memory": "1GiB", "client_memory": "1GiB"},
            "memory = '1GiB' leaves nothing for pages: client_memory takes 1GiB",
        ),
        ({"memory": "1GiB", "commit_memory": "1GiB"}, "leaves nothing for pages.*commit_memory 1GiB"),
        ({"context_memory": "1GiB"}, "context_memory = '1GiB' is more than client_memory, 512MiB"),
        ({"client_memory": "1KiB"}, "client_memory = '1KiB' must be at least 1_?048_?576"),
    ],
)
def test_memory_that_does_not_add_up_is_refused(given: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ShardConfig.model_validate(given)
