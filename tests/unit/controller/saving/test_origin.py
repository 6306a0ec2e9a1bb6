"""What a restore asks for, against what a checkpoint has."""

from pathlib import Path

import pytest
import torch

import mempool
from mempool.controller.saving.origin import origins_of
from mempool.errors import InvalidRequest
from mempool.types import RestoreTables


def test_a_name_is_for_one_table_named_or_the_only_one(tmp_path: Path) -> None:
    def asked(place: str, *tables: str) -> list[str]:
        request = RestoreTables(url=str(tmp_path / place), tables=tables, name="copy")
        return [schema.name for schema, _ in origins_of(request)]

    with mempool.local() as pool:
        pool.create_table(mempool.TableConfig(name="facts", num_slots=16, value_dim=8))
        pool.checkpoint(tmp_path / "one")
        pool.create_table(mempool.TableConfig(name="more", num_slots=16, value_dim=8)).write([0], torch.ones(1, 8))
        pool.checkpoint(tmp_path / "two")
    assert asked("one") == ["copy"]
    assert asked("two", "more", "more") == ["copy"]
    with pytest.raises(InvalidRequest, match=r"2 are asked for \(facts, more\)"):
        asked("two")
    with pytest.raises(InvalidRequest, match="Nothing was changed"):
        asked("two", "facts", "more")
