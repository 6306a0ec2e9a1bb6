"""A pool is brought back from what its shards have kept, whatever number of shards is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mempool
from mempool.controller import Controller
from mempool.embedded.memory import PoolFolder
from mempool.embedded.pool import EngineLauncher
from mempool.wire.channels.loop import run

WAIT_S = 60.0


@pytest.fixture
def values(tmp_path: Path) -> Tensor:
    """A pool of 3 shards with a table, that is switched off: the table's values."""
    with mempool.local(tmp_path, shards=3) as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=500, value_dim=48, page_slots=16))
        return table.rows(torch.arange(500))


@contextmanager
def brought_back(path: Path, shards: int, *, wanted: int | None = None) -> Iterator[Controller]:
    """As `up` does it. wanted: how many there were to be; None: as was kept."""
    folder = PoolFolder(str(path), "local")
    if wanted is not None:
        folder.keep_wanted(wanted)
    launcher = EngineLauncher(device="cpu", pool="local", folder=folder)
    controller = Controller("local", launcher=launcher, dial=launcher.dial)
    try:
        run(controller.bring_back(shards, wanted=lambda: folder.wanted), timeout_s=WAIT_S)
        yield controller
    finally:
        run(controller.close(), timeout_s=WAIT_S)
        run(launcher.close(), timeout_s=WAIT_S)


@pytest.mark.parametrize("shards", [1, 3, 5])
def test_it_has_the_shards_that_it_had(tmp_path: Path, values: Tensor, shards: int) -> None:
    with brought_back(tmp_path, shards) as controller:
        status = run(controller.status(), timeout_s=WAIT_S)
        assert [shard.info.shard for shard in status.shards] == [0, 1, 2]
        assert [table.lost_pages for shard in status.shards for table in shard.tables] == [0, 0, 0]
        assert status.unfinished == ""
    assert sorted(path.name for path in (tmp_path / "local").glob("shard-*")) == ["shard-0", "shard-1", "shard-2"]
    with mempool.local(tmp_path) as pool:
        assert torch.equal(pool.table("facts").rows(torch.arange(500)), values)


@pytest.mark.parametrize(("shards", "wanted"), [(1, 1), (1, 2), (4, 2), (3, 4)])
def test_where_a_rescale_had_not_ended_all_owners_are_up_and_it_is_told(
    tmp_path: Path, values: Tensor, shards: int, wanted: int
) -> None:
    with brought_back(tmp_path, shards, wanted=wanted) as controller:
        status = run(controller.status(), timeout_s=WAIT_S)
        assert [shard.info.shard for shard in status.shards] == list(range(max(3, wanted)))
        assert str(wanted) in status.unfinished
        assert status.wanted_shards == wanted
    with mempool.local(tmp_path) as pool:
        assert torch.equal(pool.table("facts").rows(torch.arange(500)), values)
        pool.rescale(wanted)
        assert torch.equal(pool.table("facts").rows(torch.arange(500)), values)


def test_a_new_pool_has_as_many_as_are_asked_for(tmp_path: Path) -> None:
    with brought_back(tmp_path, 2) as controller:
        assert len(controller.shards) == 2
        assert run(controller.status(), timeout_s=WAIT_S).unfinished == ""
