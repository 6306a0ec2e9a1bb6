"""A pool whose shards keep what they have: a killed one comes back with its pages, one that was switched off whole."""

from pathlib import Path

import pytest
import torch

from tests.integration.chaos import disturb
from tests.integration.conftest import TOKEN
from tests.integration.pools import RayPool, Training
from tests.integration.ray_nodes import RayNodes


@pytest.mark.filterwarnings("ignore:(a step|updates) of .* dropped by shards:UserWarning")  # of a slow machine
def test_killed_shards_and_a_pool_that_was_switched_off(ray_nodes: RayNodes, tmp_path: Path) -> None:
    kept = RayPool(
        tmp_path,
        name="kept",
        shards=2,
        ray_at=ray_nodes.address,
        token=TOKEN,
        resources={"head": 1},
        trainer_lease_s=2.0,
    )
    disk = tmp_path / "disk"
    kept.edit("shard:\n", f'shard:\n  storage: {{"path": "{disk}"}}\n')
    kept.up()
    try:
        with kept.connect() as pool:
            training = Training(pool, "facts")
            for _ in range(3):
                training.step()
            training.assert_exact(pool)
            rows = training.table.rows(torch.arange(training.table.num_slots))
            before = {shard.info.shard: shard.info.incarnation for shard in pool.status().shards}
        assert "stays in" in kept.down().out
        kept.edit_shards(3)
        said = kept.up().out
        assert "brought back" in said
        assert "it has 2 shards, as it had, and the file says 3" in said
        with kept.connect() as pool:
            assert torch.equal(pool.table("facts").rows(torch.arange(rows.shape[0])), rows)
            assert all(shard.info.incarnation > before[shard.info.shard] for shard in pool.status().shards)
            assert [table["lost_pages"] for table in kept.status()["tables"]] == [0]
            disturb(kept, storage=disk, faults=2, seed=1, within_s=1.0, kinds=("shard killed", "trainer killed"))
            pool.rescale(1)
        assert shards_in(disk) == ["shard-0"]  # one that leaves leaves nothing
        kept.run("down", "--pool", kept.name, "--drop", "--yes")
        assert shards_in(disk) == []
    finally:
        if shards_in(disk):
            kept.down()


def shards_in(disk: Path) -> list[str]:
    """The folders that a pool's shards have on a disk."""
    return sorted(folder.name for folder in disk.glob("kept/*"))
