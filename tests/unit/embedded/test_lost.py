"""A shard whose folder is not where it starts has lost its pages, says so, and names the checkpoint that has them."""

import shutil
from pathlib import Path

import pytest
import torch

import mempool
from mempool import errors
from mempool.cli import show

ALL = torch.arange(256)


def test_a_shard_without_its_folder_names_the_checkpoint_to_restore(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, place = tmp_path / "memory", tmp_path / "saved"
    config = mempool.TableConfig(name="facts", num_slots=256, value_dim=8, page_slots=64, layout="rows")
    with mempool.local(memory, shards=2) as pool:
        rows = pool.create_table(config).rows(ALL)
        saved = pool.checkpoint(place)
    shutil.rmtree(memory / "local" / "shard-1")
    for _ in range(2):  # what it knows of the checkpoint is kept
        with mempool.local(memory) as pool:
            with pytest.raises(errors.DataLoss) as lost:
                pool.table("facts").rows(ALL)
            assert f"mempool restore {place} --checkpoint {saved.name} --table facts --replace" in str(lost.value)
            show.status(pool.status(), address="here")
            assert f"Its newest checkpoint is {saved.name} in {place}, at version 0" in capsys.readouterr().out
            with pytest.raises(errors.DataLoss, match=saved.name):
                pool.rescale(1)
    with mempool.local(memory) as pool:
        (table,) = pool.restore(str(place), checkpoint=saved.name, tables=["facts"], replace=True)
        assert torch.equal(table.rows(ALL), rows)
        (view,) = pool.status().tables
        assert view.saved is not None, "it is saved where it was restored from"
        assert (view.saved.checkpoint, view.saved.url) == (saved.name, str(place))
    with mempool.local(memory) as pool:
        assert torch.equal(pool.table("facts").rows(ALL), rows)


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    config = mempool.TableConfig(name="facts", num_slots=256, value_dim=8, page_slots=64, layout="rows")
    with mempool.local(tmp_path, shards=2) as pool:
        pool.create_table(config)
    shutil.rmtree(tmp_path / "local" / "shard-0")
    with mempool.local(tmp_path) as pool, pytest.raises(errors.DataLoss, match="No checkpoint of it is known here"):
        pool.table("facts").rows(ALL)
