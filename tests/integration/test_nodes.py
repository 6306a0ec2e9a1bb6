"""A pool on several nodes of a Ray that somebody else started."""

from pathlib import Path

import pytest
import torch

import mempool
from mempool.errors import DataLoss
from mempool.types import ShardInfo
from tests.integration.conftest import TOKEN
from tests.integration.pools import RayPool, kill_listener, listener, parent, port_of, wait_for
from tests.integration.proxy import Proxy
from tests.integration.ray_nodes import OWN_DISK, RayNodes


def test_a_node_dies_with_a_shard_and_the_controller(ray_nodes: RayNodes, shared_pool: RayPool, tmp_path: Path) -> None:
    ips = ("127.0.0.2", "127.0.0.3")
    nodes = {ray_nodes.add(ip=ip, folder=tmp_path / ip, worker=4, brain=1): ip for ip in ips}
    pool = RayPool(
        tmp_path, name="spread", shards=2, ray_address=ray_nodes.address, token=TOKEN, resources={"worker": 1}
    )
    pool.edit("shard:\n", f'shard:\n  storage: {{"path": "{OWN_DISK}"}}\n')
    proxy = Proxy(pool.address)  # which is also where it comes back: all is on one machine
    try:
        pool.up_where("brain")
        again = pool.up(expect=1)
        assert "runs already" in again.err
        assert "mempool apply" in again.err
        with mempool.connect(proxy.address, token=TOKEN) as client:
            table = client.create_table(mempool.TableConfig(name="facts", num_slots=512, value_dim=128))
            ids = torch.arange(512)
            rows = table.rows(ids)
            saved = client.checkpoint(tmp_path / "saved")
            infos = [shard.info for shard in client.status().shards]
            homes = {info.shard: parent(_process(port_of(info))) for info in infos}
            assert set(homes.values()) == set(nodes), "not one shard on each node"
            infos = _killed(client, infos)
            assert {info.shard: parent(_process(port_of(info))) for info in infos} == homes
            assert torch.equal(table.rows(ids), rows)
            before = client.status().tables[0].controller
            doomed = next(node for node, ip in nodes.items() if before == f"{ip}:{pool.port}")
            (lost,) = (shard for shard, home in homes.items() if home == doomed)
            ray_nodes.remove(doomed)
            nodes.pop(doomed)
            proxy.close()  # nobody listens where it was any more: the shard that lives says where the controller is

            def returned() -> bool:
                status = client.status()
                now = status.shards[lost]
                told = status.tables[0].controller not in ("", before)
                return told and now.state == "ready" and now.info.incarnation > infos[lost].incarnation

            wait_for("the shard and the controller to come back", returned)
            now = client.status().shards[lost].info
            (node,) = nodes
            assert parent(_process(port_of(now))) == node
            assert client.status().tables[0].controller == f"{nodes[node]}:{pool.port}"
            with pytest.raises(DataLoss, match=f"mempool restore .*/saved --checkpoint {saved.name} --table facts"):
                table.rows(ids)
            (restored,) = client.restore(str(tmp_path / "saved"), tables=["facts"], replace=True)
            assert torch.equal(restored.rows(ids), rows)
    finally:
        proxy.close()
        pool.run("down", "--pool", "spread")
        for node in nodes:
            ray_nodes.remove(node)
    # Neither the Ray that was there before nor the other pool on it has noticed.
    assert {shard["state"] for shard in shared_pool.status()["shards"]} == {"ready"}


def test_a_taken_port_leaves_nothing_behind(ray_nodes: RayNodes, shared_pool: RayPool, tmp_path: Path) -> None:
    pool = RayPool(tmp_path, name="second", shards=1, ray_at=ray_nodes.address, port=shared_pool.port)
    assert f"port {shared_pool.port}" in pool.up(expect=1).err
    assert "no pool" in pool.down(expect=1).err


def _killed(client: mempool.Pool, infos: list[ShardInfo]) -> list[ShardInfo]:
    """All shards' processes are killed, and have come back."""
    for info in infos:
        kill_listener(port_of(info))

    def returned() -> list[ShardInfo]:
        shards = [shard for shard in client.status().shards if shard.state == "ready"]
        came = [now.info for now in shards if now.info.incarnation > infos[now.info.shard].incarnation]
        return came if len(came) == len(infos) else []

    return wait_for("the shards to come back", returned)


def _process(port: int) -> int:
    pid = listener(port)
    assert pid is not None
    return pid
