"""A pool on several nodes of a Ray that somebody else started."""

from pathlib import Path

import pytest
import torch

import mempool
from mempool.errors import DataLoss
from tests.integration.pools import RayPool, listener, parent, port_of, wait_for
from tests.integration.ray_nodes import RayNodes


def test_shards_spread_and_come_back_on_another_node(ray_nodes: RayNodes, shared_pool: RayPool, tmp_path: Path) -> None:
    nodes = [ray_nodes.add(worker=4) for _ in range(2)]
    pool = RayPool(tmp_path, name="spread", shards=2, ray_address=ray_nodes.address, resources={"worker": 1})
    try:
        pool.up()
        again = pool.up(expect=1)
        assert "runs already" in again.err
        assert "mempool apply" in again.err
        with pool.connect() as client:
            table = client.create_table(mempool.TableConfig(name="facts", num_slots=512, value_dim=128))
            ids = torch.arange(512)
            table.rows(ids)
            infos = [shard.info for shard in client.status().shards]
            homes = {info.shard: parent(_process(port_of(info))) for info in infos}
            assert set(homes.values()) == set(nodes), "not one shard on each node"
            nodes.remove(homes[1])
            ray_nodes.remove(homes[1])

            def returned() -> bool:
                now = client.status().shards[1]
                return now.state == "ready" and now.info.incarnation > infos[1].incarnation

            wait_for("shard 1 to come back", returned)
            now = client.status().shards[1].info
            assert parent(_process(port_of(now))) == nodes[0]
            with pytest.raises(DataLoss):
                table.rows(ids)
            client.drop_table("facts")
            again_made = client.create_table(mempool.TableConfig(name="facts", num_slots=512, value_dim=128))
            assert again_made.rows(ids).isfinite().all()
    finally:
        pool.run("down", "--pool", "spread")
        for node in nodes:
            ray_nodes.remove(node)
    # Neither the Ray that was there before nor the other pool on it has noticed.
    assert {shard["state"] for shard in shared_pool.status()["shards"]} == {"ready"}


def test_a_taken_port_leaves_nothing_behind(ray_nodes: RayNodes, shared_pool: RayPool, tmp_path: Path) -> None:
    pool = RayPool(tmp_path, name="second", shards=1, ray_at=ray_nodes.address, port=shared_pool.port)
    assert f"port {shared_pool.port}" in pool.up(expect=1).err
    assert "no pool" in pool.down(expect=1).err


def _process(port: int) -> int:
    pid = listener(port)
    assert pid is not None
    return pid
