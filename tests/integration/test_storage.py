"""A pool whose shards keep what they have: a killed one comes back with its pages, one that was switched off whole."""

from pathlib import Path

import torch

from tests.integration.conftest import TOKEN
from tests.integration.pools import RayPool, Training, kill_listener, port_of
from tests.integration.ray_nodes import RayNodes


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
    kept.edit("shard:\n", f'shard:\n  storage: {{"path": "{tmp_path / "disk"}"}}\n')
    kept.up()
    try:
        with kept.connect() as pool:
            training = Training(pool, "facts")
            for _ in range(3):
                training.step()
            for shard in pool.status().shards:
                kill_listener(port_of(shard.info))
                training.step()
                training.step()
            training.assert_exact(pool)
            rows = training.table.rows(torch.arange(training.table.num_slots))
            before = {shard.info.shard: shard.info.incarnation for shard in pool.status().shards}
        kept.down()
        kept.up()
        with kept.connect() as pool:
            assert torch.equal(pool.table("facts").rows(torch.arange(rows.shape[0])), rows)
            assert all(shard.info.incarnation > before[shard.info.shard] for shard in pool.status().shards)
            status = kept.status()
            assert [table["lost_pages"] for table in status["tables"]] == [0]
    finally:
        kept.down()
