"""`mempool plan`: what it prints, its JSON, what it refuses; it loads nothing heavy."""

import json
from pathlib import Path

import pytest

from tests.unit.sizing.machines import MACHINE

from .conftest import Command
from .test_light import loaded

PAPER = (
    *("plan", "--width", 2048, "--slots", 8192**2, "--dtype", "bfloat16", "--optimizer", "rowwise_adagrad"),
    *("--layers", 3, "--tokens", 4096, "--trainers", 64, "--shards", 1024, "--block-dim", 16),
)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    path = tmp_path / "a-machine-plan.json"
    path.write_text(json.dumps({"format": 1, "constants": MACHINE.document()}))
    return path


def test_json(command: Command, machine: Path) -> None:
    found = json.loads(command(*PAPER, "--machine", machine, "--json").stdout)
    assert list(found) == [
        "table", "keys", "memory", "shards_needed", "shards", "hosts", "splits", "growth", "client", "host", "machine",
        "path", "warnings",
    ]  # fmt: skip
    assert list(found["table"]) == [
        "num_slots", "value_dim", "dtype", "optimizer", "layout", "block_dim", "page_slots", "tables", "parameters",
    ]  # fmt: skip
    assert found["table"]["parameters"] == 137_438_953_472
    assert list(found["memory"]) == ["total_bytes", "largest_shard_bytes", "shard_memory", "shard_page_bytes"]
    assert (found["shards"], found["hosts"], found["machine"], found["path"]) == (1024, 128, "a-machine", "gRPC")
    for split in found["splits"]:
        assert list(split) == [
            "kind", "layout", "block_dim", "shards_asked", "largest_shard_bytes", "bytes_a_token", "step",
            "tokens_per_s",
        ]  # fmt: skip
        assert list(split["bytes_a_token"]) == ["to_shards", "from_shards", "to_a_shard", "from_a_shard"]
        assert list(split["step"]) == [
            "client", "waits", "wire", "calls", "gather", "update", "total", "limit",
        ]  # fmt: skip
        parts = [split["step"][part] for part in ("client", "waits", "wire", "calls", "gather", "update")]
        assert split["step"]["total"] == pytest.approx(sum(parts))
        assert split["tokens_per_s"] == pytest.approx(64 * 4096 / split["step"]["total"])
    assert list(found["client"]) == ["view_bytes", "bytes_a_step", "cpu_a_step", "calls_a_step"]
    assert list(found["host"]) == ["page_bytes", "bytes_a_step", "cpu_a_step", "calls_a_step"]
    assert found["client"]["cpu_a_step"] == found["splits"][0]["step"]["client"]
    untimed = json.loads(command(*PAPER, "--json").stdout)
    assert (untimed["machine"], untimed["splits"][0]["step"], untimed["client"]["cpu_a_step"]) == (None, None, None)


def test_for_people(command: Command, machine: Path) -> None:
    said = command(*PAPER, "--machine", machine).stdout.splitlines()
    assert said[0].startswith("67,108,864 slots x 2,048 bfloat16, rowwise_adagrad: 137.4 billion parameters in 2")
    assert "planned: 1,024 on 128 hosts of 64 cores" in said[1]
    assert said[2].startswith(f"best: layout {said[5].split()[0]}, block_dim ")
    assert said[4].split()[0] == "split"
    assert said[4].endswith("limit   tokens/s") or "tokens/s" in said[4]
    assert {line.split()[0] for line in said[5:7]} == {"grid", "rows"}
    trainer = next(line for line in said if line.startswith("a trainer, a step: "))
    assert "in 8,192 calls, " in trainer
    assert "ms of CPU" in trainer
    assert any(line.startswith("a host of shards: ") for line in said)
    assert any(line == "times by the constants of a-machine over gRPC; nothing overlaps in them" for line in said)


def test_more_and_more_shards(command: Command, machine: Path) -> None:
    line = ("plan", "--width", 64, "--slots", 4096, "--page-slots", 64, "--machine", machine, "--trainers", 4)
    growth = json.loads(command(*line, "--json").stdout)["growth"]
    assert [option["shards"] for option in growth[:5]] == [1, 2, 4, 8, 16]
    assert growth[4]["hosts"] == 2
    said = command(*line).stdout.splitlines()
    first = next(number for number, text in enumerate(said) if text.startswith("shards  hosts"))
    assert said[first + 5].split()[:2] == ["16", "2"]
    assert json.loads(command("plan", "--width", 64, "--slots", 4096, "--json").stdout)["growth"] == []


def test_keys_that_train_in_the_pool(command: Command) -> None:
    line = ("plan", "--width", 64, "--slots", 128**2, "--heads", 2, "--key-dim", 32, "--json")
    without, product = (json.loads(command(*line, *more).stdout) for more in ((), ("--keys", "product")))
    assert without["keys"] is None
    keys = product["keys"]
    assert list(keys) == [
        "keys", "width", "optimizer", "page_slots", "total_bytes", "largest_shard_bytes", "shards_asked",
    ]  # fmt: skip
    assert (keys["keys"], keys["width"], keys["optimizer"]) == (2 * 2 * 128, 16, "adamw")
    assert product["memory"]["total_bytes"] == without["memory"]["total_bytes"] + keys["total_bytes"]
    assert product["client"]["calls_a_step"] == without["client"]["calls_a_step"] + 3
    assert product["client"]["bytes_a_step"] > without["client"]["bytes_a_step"]
    grouped = json.loads(command(*line, "--keys", "hierarchical").stdout)
    assert grouped["keys"]["keys"] == 128**2 + 357  # groups of 46, of which sqrt(8 * slots) would be 362
    assert grouped["client"]["calls_a_step"] == without["client"]["calls_a_step"] + 4
    flat = ("--keys", "flat", "--key-dim", 32, "--key-optimizer", "adagrad", "--heads", 1)
    said = command(*line[:-1], *flat).stdout.splitlines()
    assert said[1].endswith("of keys that train in the pool: 16,384 x 32 float32, adagrad; 4.0 MiB of them on a shard "
                            "at most, 1 shard asked for scores")  # fmt: skip


def test_an_optimizer_with_fields(command: Command) -> None:
    def total(optimizer: str) -> int:
        line = ("plan", "--width", 64, "--slots", 4096, "--optimizer", optimizer, "--json")
        bytes_of: int = json.loads(command(*line).stdout)["memory"]["total_bytes"]
        return bytes_of

    values = 4096 * 64 * 4
    assert total("sgd,momentum=0.9") - total("sgd") == values
    assert total("adam") - total("sgd") == 2 * values
    assert total("AdamW,dense=true,lr=0.5") - total("adam") == 4 * 4096, "a slot's last step"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--slots", 0], 1, "TableConfig.num_slots = 0 must be at least 1"),
        (["--optimizer", "lion"], 1, "TableConfig.optimizer.type = 'lion' must be one of 'sgd'"),
        (["--optimizer", "sgd,momentum"], 2, "'momentum' is no FIELD=VALUE; write for example sgd,momentum=0.9"),
        (["--optimizer", "sgd,mass=1"], 1, "mass = 1.0 is not a known field"),
        (["--optimizer", "sgd,momentum=much"], 1, "momentum = 'much' is not a number"),
        (["--keys", "tree"], 1, "TableConfig.keys.type = 'tree' must be one of 'product', 'flat', 'hierarchical'"),
        (["--keys", "product", "--ways", 3], 1, "TableConfig.keys.key_dim = 128 is no multiple of 3"),
        (
            ["--keys", "product", "--ways", 8, "--key-dim", 96, "--slots", 255],
            1,
            "must be at least 256 (2^8): two half-keys in each codebook",
        ),
        (["--keys", "flat"], 1, "heads = 4, and the keys in the pool are of 1: give as many"),
        (["--keys", "product", "--key-optimizer", "adam,lr"], 2, "--key-optimizer 'adam,lr': 'lr' is no FIELD=VALUE"),
        (["--dtype", "float16"], 1, "TableConfig.dtype = 'float16' must be"),
        (["--layout", "columns", "--block-dim", 32, "--shards", 4], 1, "spreads 2 blocks of columns over 2 shards at"),
        (["--host-memory", "3MiB", "--layout", "rows"], 1, "give each of 8 shards less than 1MiB"),
        (["--host-memory", "lots"], 1, "Hosts.memory = 'lots' is not an amount of memory"),
        (["--gpu-gb-per-s", 3000], 1, "is of GPUs, and a host has none"),
        (["--machine", "/nowhere/x.json"], 1, "No such file or directory: /nowhere/x.json"),
        (["--path", "gRPC"], 1, "no machine's constants are given"),
        (["--shards", 5000], 1, "5000 shards: a pool has 1 to 4096"),
    ],
)
def test_what_is_refused(command: Command, arguments: list[object], code: int, message: str) -> None:
    line = ["plan", "--width", 64, "--slots", 4096, *arguments]
    said = command(*line, expect=code)
    assert message in said.stderr
    assert not said.stdout


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_file_without_constants_is_refused(command: Command, tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    said = command("plan", "--width", 64, "--slots", 4096, "--machine", path, expect=1)
    assert f"{path}" in said.stderr
    assert "mempool bench plan --out DIR" in said.stderr
    assert str(path) in command("bench", "plan", "--machine", path, expect=1).stderr


@pytest.mark.usefixtures("command")
def test_it_is_light(machine: Path) -> None:
    loaded(["plan", "--width", 64, "--slots", 4096, "--machine", machine], ["plan", "--help"])
