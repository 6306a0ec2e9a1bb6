"""A pool that an earlier version has kept is opened for ever: a folder of each version of the format is there."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mempool
from tests.support.durable_trainer import contents, differences
from tests.support.golden_pool import CONTENTS, GOLDEN, STEPS, tables_of, train

VERSIONS = sorted(GOLDEN.glob("pool-*"))


@pytest.mark.parametrize("golden", VERSIONS, ids=lambda path: path.name)
def test_a_pool_of_this_version_goes_on(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "local", tmp_path / "local")
    expected = load_file(golden / CONTENTS)
    with mempool.local(tmp_path) as pool:
        assert len(pool.status().shards) == 2
        assert sorted(table.name for table in pool.tables()) == ["coded", "dense", "facts"]
        tables = tables_of(pool)
        assert differences(contents(tables), expected) == []
        train(tables, STEPS + 2)
        assert [table.step_count() for table in tables] == [STEPS + 1] * 3


def test_there_is_one_of_the_newest_version() -> None:
    assert [path.name for path in VERSIONS] == ["pool-1"]
