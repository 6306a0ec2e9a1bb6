"""Commands that write a table as one file and make one of a file."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mempool
from tests.support.serving import ServedPool

from .conftest import Command
from .test_light import loaded


def test_a_table_is_exported_and_imported(command: Command, served: ServedPool, tmp_path: Path) -> None:
    def said(*arguments: object, expect: int = 0) -> str:
        output: str = command(*arguments, expect=expect).output
        return output

    at = ("--address", served.address)
    file, other, place = tmp_path / "facts.safetensors", tmp_path / "model.safetensors", tmp_path / "place"
    with mempool.connect(served.address) as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=8))
        table.write(torch.arange(64), torch.ones(64, 8))
        pool.checkpoint(place)
    document = {"table": "facts", "file": str(file), "version": 0}
    assert json.loads(said("export", "facts", file, *at, "--json")) == document
    assert torch.equal(safetensors.torch.load_file(file)["values"], torch.ones(64, 8))
    written = file.read_bytes()
    assert "version 0" in said("export", "facts", file, "--from", place)
    assert file.read_bytes() == written
    assert "or another name (name=, --as)" in said("import", file, *at, expect=1)
    made = json.loads(said("import", file, *at, "--as", "again", "--json"))
    assert made == {"file": str(file), "table": {"name": "again", "num_slots": 64, "value_dim": 8}}
    assert "64 x 8" in said("import", file, *at, "--replace")

    safetensors.torch.save_file({"values.weight": torch.ones(64, 8, dtype=torch.bfloat16)}, other)
    assert "--as NAME" in said("import", other, *at, expect=2)
    said("import", other, *at, "--as", "layer", "--set", "optimizer={type: adam, lr: 0.5}", "--set", "layout=rows")
    with mempool.connect(served.address) as pool:
        assert torch.equal(pool.table("again").rows(torch.arange(64)), torch.ones(64, 8))
        schema = pool.table("layer").schema
        assert (schema.dtype, schema.layout, schema.optimizer.lr) == ("bfloat16", "rows", 0.5)
    assert "dtype" in said("import", other, *at, "--as", "x", "--set", "dtype=float3", expect=1)
    assert "no tensor 'x'" in said("import", other, *at, "--as", "x", "--values", "x", expect=1)
    for wrong in (
        ("import", other, *at, "--as", "x", "--set", "dtype"),
        ("export", "facts", file, "--checkpoint", "x"),
    ):
        said(*wrong, expect=2)
    said("export", "facts", file, "--from", place, *at, expect=2)


@pytest.mark.usefixtures("command")
def test_help_loads_nothing_heavy() -> None:
    loaded(["export", "--help"], ["import", "--help"])
