"""A checkpoint of every format version that there was is read, bit for bit. Nobody changes those files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mempool.checkpoint.exchange.table_source import TableSource
from mempool.checkpoint.format.schema_json import parse_schema
from mempool.checkpoint.format.sealed import FORMAT_VERSION
from mempool.checkpoint.looking import checkpoints, verify
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores.local import LocalStore
from tests.unit.checkpoint.contents import read, same_bits, spread
from tests.unit.checkpoint.golden.make import digest, tables

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("v*"))


def test_there_is_one_of_every_version() -> None:
    assert [f"v{version}" for version in range(1, FORMAT_VERSION + 1)] == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_checkpoints_are_read(version: str) -> None:
    store = LocalStore(GOLDEN / version / "place")
    described: list[Any] = json.loads((GOLDEN / version / "contents.json").read_text())
    assert [found["name"] for found in checkpoints(store)] == [found["name"] for found in described]
    for one in described:
        assert verify(store, one["name"]).damages == ()
        checkpoint = Checkpoint(store, one["name"])
        assert checkpoint.manifest.extra == {"epoch": 3}
        assert len(checkpoint.manifest.tables) == len(one["tables"])
        for table in one["tables"]:
            schema = parse_schema(table["schema"], "schema")
            state = checkpoint.manifest.tables[schema.name]
            assert (state.schema, state.version) == (schema, table["version"])
            assert (state.step_count, state.ledger) == (table["version"] + 3, {"version": table["version"]})
            assert digest(read(checkpoint, schema.name, spread(schema, 3, "rows"))) == table["sha256"]


def test_the_first_version_has_the_tables_that_it_had() -> None:
    manifest = Checkpoint(LocalStore(GOLDEN / "v1" / "place")).manifest
    assert [table.schema for table in manifest.tables.values()] == sorted(tables(), key=lambda schema: schema.name)


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_exports_are_read(version: str) -> None:
    source = TableSource(GOLDEN / version / "cities.safetensors")
    stored = Checkpoint(LocalStore(GOLDEN / version / "place")).table("cities")
    schema = stored.state.schema
    assert source.schema == schema
    content = read(Checkpoint(LocalStore(GOLDEN / version / "place")), "cities", spread(schema, 1))
    assert same_bits(source.flat_keys(schema, 0, 36), content.rows["keys"][:36])
    assert source.values(0, 36).shape == (36, 9)
