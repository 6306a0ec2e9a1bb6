"""Commands about checkpoints: of a pool behind its address, and of a place alone."""

import json
from pathlib import Path

import pytest
import torch

import mempool
from tests.support.serving import ServedPool

from .conftest import Command
from .test_light import loaded


@pytest.fixture
def place(served: ServedPool, tmp_path: Path) -> Path:
    with mempool.connect(served.address) as pool:
        table = pool.create_table(mempool.TableConfig(name="remembered", num_slots=64, value_dim=8))
        table.write(torch.arange(64), torch.ones(64, 8))
    return tmp_path / "place"


def test_a_checkpoint_is_taken_looked_at_restored_and_removed(
    command: Command, served: ServedPool, place: Path
) -> None:
    def said(*arguments: object, expect: int = 0) -> str:
        output: str = command(*arguments, expect=expect).output
        return output

    at = ("--address", served.address)
    taken = [
        json.loads(said("checkpoint", str(place), *at, "--table", "remembered", "--json", "--extra", '{"epoch": 3}'))
        for _ in range(2)
    ]
    assert [each["tables"] for each in taken] == [{"remembered": 0}] * 2
    assert taken[1]["bytes"] == 0 < taken[0]["bytes"]
    listed = json.loads(said("checkpoints", str(place), "--json"))
    assert [each["name"] for each in listed["checkpoints"]] == [each["name"] for each in taken]
    assert json.loads(said("inspect", str(place), "--json"))["extra"] == {"epoch": 3}
    assert "remembered: 64 x 8 float32" in said("inspect", str(place), "--checkpoint", taken[0]["name"])
    assert json.loads(said("verify", str(place), "--json"))["damages"] == []
    assert "restored" in said("restore", str(place), *at, "--table", "remembered", "--as", "again")
    with mempool.connect(served.address) as pool:
        assert torch.equal(pool.table("again").rows(torch.arange(64)), torch.ones(64, 8))
    assert "say replace=True (--replace)" in said("restore", str(place), *at, expect=1)
    assert taken[0]["name"] in said("checkpoints", str(place), "--remove", taken[0]["name"])
    assert said("verify", str(place)).count("whole") == 1
    file = next(place.glob("*/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert file.name in said("verify", str(place), expect=1)


def test_what_only_looks_loads_nothing_heavy_and_says_what_is_wrong(
    command: Command, served: ServedPool, place: Path, tmp_path: Path
) -> None:
    command("checkpoint", str(place), "--address", served.address)
    loaded(["checkpoints", place], ["inspect", place], ["verify", place], ["checkpoints", place, "--keep", "1"])
    loaded(["checkpoint", "--help"], ["restore", "--help"])
    for said in loaded(["inspect", tmp_path / "nothing"], ["verify", tmp_path / "nothing"], expect=1):
        assert "has no checkpoint" in said
    for said in loaded(["checkpoints", "s3://a::b"], ["inspect", ""], expect=1):
        assert "Nothing was changed" in said
    loaded(["checkpoints", place, "--keep", "1", "--remove", "x"], ["checkpoint", place, "--extra", "{"], expect=2)
