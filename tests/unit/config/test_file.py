"""Cluster files: the shipped ones, errors by line, edits that keep every other character, and a base without PyYAML."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.config import Adagrad, ClusterConfig, ProductKeys, load, resolve, set_shards
from mempool.errors import ConfigError

SHIPPED = Path(__file__).parents[3] / "cluster"

GOOD = """\
# my pool
pool: {name: local, shards: 2}   # as many as I like
tables:
  - name: facts
    num_slots: 1_500_625
    value_dim: 256
    keys: {type: product, heads: 4, key_dim: 128}
    optimizer: {type: Adagrad, lr: 1e-1}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text.encode())
    return path


@pytest.fixture(autouse=True)
def _no_token_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMPOOL_TOKEN", raising=False)


def test_load(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD))
    assert (config.pool.name, config.pool.shards) == ("local", 2)
    (table,) = config.tables
    assert table.optimizer == Adagrad(0.1)
    assert table.keys == ProductKeys(heads=4, key_dim=128)
    assert resolve(table).stride == 1225


def test_the_shipped_local_file() -> None:
    config = load(SHIPPED / "local.yaml")
    assert (config.pool.name, config.pool.bind, config.pool.port, config.pool.shards) == ("local", "127.0.0.1", 7077, 2)
    assert (config.shard.num_gpus, config.shard.num_cpus, config.shard.threads) == (0, 0, 1)
    schema = resolve(config.tables[0])
    assert (schema.name, schema.num_slots, schema.value_dim, schema.dtype) == ("facts", 512**2, 256, "float32")
    assert (schema.optimizer.algorithm, schema.optimizer.lr, schema.stride) == ("adagrad", 0.1, 512)


def test_the_shipped_multi_host_file() -> None:
    config = load(SHIPPED / "multi-host-8gpu.yaml")
    assert config.pool.shards % 8 == 0
    assert config.pool.token_file == SHIPPED / "token"
    assert config.pool.shard_ports is not None
    assert config.pool.shard_ports[1] - config.pool.shard_ports[0] + 1 >= 8
    assert (config.shard.device, config.shard.num_gpus) == ("cuda", 1)
    assert {table.dtype for table in config.tables} == {"bfloat16"}
    # What the comments promise: the first table's values and Adagrad sums are 6 GiB a shard, and all fits.
    memory = config.tables[0]
    assert memory.num_slots * memory.value_dim * (2 + 4) == 6 * 2**30 * config.pool.shards
    ngrams = config.tables[1]
    assert ngrams.num_slots * ngrams.value_dim * 2 / config.pool.shards + 6 * 2**30 < config.shard.memory


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "1_500_625",
            "1_500_000",
            "5: tables[0].num_slots = 1_500_000 is not a square; product keys need n * n. "
            "Nearest: 1_498_176 (1224^2) or 1_500_625 (1225^2).",
        ),
        ("shards: 2", "shrads: 2", "2: pool.shards is missing"),
        ("shards: 2", "shards: two", "2: pool.shards = 'two' is not a whole number"),
        ("    value_dim: 256\n", "", "4: tables[0].value_dim is missing"),
        ("lr: 1e-1", "lr: fast", "8: tables[0].optimizer.lr = 'fast' is not a number"),
        ("Adagrad, lr", "Adagrad, momentum: 1, lr", "8: tables[0].optimizer.momentum = 1 is not a known field; known"),
        ("type: Adagrad", "type: Ada", "8: tables[0].optimizer.type = 'Ada' must be one of 'sgd', 'adagrad'"),
        ("type: product, ", "", "7: tables[0].keys.type is missing; give one of: product, flat"),
        ("key_dim: 128", "key_dim: 127", "7: tables[0].keys.key_dim = 127 is odd; a query is cut into two halves."),
        ("tables:", "table:", "3: table is not a known field; did you mean tables?"),
        ("    value_dim: 256", "    value_dim: 256\n    name: x", "7: tables[0].name is given twice (first in line 4)"),
        ("{name: local,", "{name: local, bind: 0.0.0.0,", "2: pool.bind = '0.0.0.0' lets other machines in"),
        (
            "tables:\n",
            "tables:\n  - {name: facts, num_slots: 1, value_dim: 1}\n",
            "5: tables[1].name = 'facts' is the name of tables[0] too; give each its own.",
        ),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert f"{path}:{message}" in str(caught.value)


def test_all_errors_come_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace("shards: 2", "shrads: 0").replace("value_dim: 256", "value_dim: 0"))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines() == [
        f"{path}:2: pool.shards is missing",
        f"{path}:2: pool.shrads = 0 is not a known field; did you mean shards?",
        f"{path}:6: tables[0].value_dim = 0 must be at least 1",
    ]


def test_files_that_cannot_be_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    for text, message in [("", "is empty; it must have"), ("- a", "is not a mapping"), ("a: [", "is not valid YAML")]:
        with pytest.raises(ConfigError, match=message):
            load(written(tmp_path, text))
    (tmp_path / "c.yaml").write_bytes(b"pool: \xff\xfe")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 6\)"):
        load(tmp_path / "c.yaml")


def test_a_relative_token_file_lies_beside_the_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    path = written(tmp_path / "sub", GOOD.replace("shards: 2", "shards: 2, bind: 0.0.0.0, token_file: token"))
    (tmp_path / "sub" / "token").write_text("s3cret")
    monkeypatch.chdir(tmp_path)
    config = load(path.relative_to(tmp_path))
    monkeypatch.chdir("/")
    assert config.pool.token() == "s3cret"


@settings(deadline=None, max_examples=40)
@given(
    before=st.sampled_from(["2", "1_000", "0x10", " 3", "2   "]),
    after=st.integers(1, 4096),
    newline=st.sampled_from(["\n", "\r\n"]),
    block=st.booleans(),
    start=st.sampled_from(["", "\ufeff", "# Größe 🧠\n"]),
)
def test_set_shards_changes_one_number_only(
    tmp_path_factory: pytest.TempPathFactory, before: str, after: int, newline: str, block: bool, start: str
) -> None:
    template = start + (
        "pool:\n  name: p\n  shards: {}   # é: shards: 2\n  port: 1\n"
        if block
        else "pool: {{name: p, shards: {}, port: 1}}\n"
    ).replace("\n", newline)
    template += f"tables: []  # nothing{newline}"
    path = written(tmp_path_factory.mktemp("edit"), template.format(before))
    config = set_shards(path, after)
    assert path.read_bytes().decode() == template.format(before.replace(before.strip(), str(after)))
    assert config == load(path)
    assert config.pool.shards == after


def test_set_shards_keeps_mode_and_links_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    set_shards(link, 9)
    assert path.read_text() == GOOD.replace("shards: 2", "shards: 9")
    assert path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.yaml", "link.yaml"]


@pytest.mark.parametrize(
    ("text", "shards", "message"),
    [
        (GOOD, 0, "pool.shards = 0 must be greater than 0"),
        (GOOD.replace("name: local", "nam: local"), 3, "pool.nam = 'local' is not a known field"),
        ("pool: {name: p, port: &n 2, shards: *n}\n", 3, "pool.shards is not written as a plain number of its own"),
    ],
)
def test_set_shards_leaves_the_file_alone_when_it_cannot(tmp_path: Path, text: str, shards: int, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        set_shards(path, shards)
    assert message in str(caught.value)
    assert path.read_text() == text


def test_without_pyyaml_only_files_are_out_of_reach(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    script = (
        "import sys; sys.modules['yaml'] = None\n"
        "from mempool.config import TableConfig, load\n"
        "from mempool.errors import ConfigError\n"
        "assert TableConfig(name='a', num_slots=1, value_dim=1).num_slots == 1\n"
        "try: load(sys.argv[1])\n"
        "except ConfigError as error: print(error)\n"
        "print(sorted({'ray', 'triton', 'numba', 'starlette'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=SHIPPED.parent,
    )
    said, loaded = done.stdout.splitlines()
    assert said == f"{path}: reading a cluster file needs PyYAML, which is not installed: pip install 'mempool[server]'"
    assert loaded == "[]"


def test_a_file_and_python_say_the_same(tmp_path: Path) -> None:
    text = "pool: {name: p, shards: 1}\nshard: {memory: 3GiB}\n"
    said = {"pool": {"name": "p", "shards": 1}, "shard": {"memory": "3GiB"}}
    assert load(written(tmp_path, text)) == ClusterConfig.model_validate(said)
