"""Shards on nodes of a Ray that have disks of their own: where they come back, and with what.

    python -m tests.hostile.own_disks --kills 5

Three nodes. Each kill of a shard's process must end with it on the node where it was, with its pages. The pool is
switched off, and `up` of a file that asks for fewer shards must find all folders; a shard that a rescale adds stays on
its node too. At the end another pool, at a path that the nodes share, loses the node of one of its shards.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import mempool
from tests.integration.pools import RayPool, kill_listener, listener, parent, port_of, wait_for
from tests.integration.ray_nodes import OWN_DISK, RayNodes

IDS = torch.arange(512)


class Nodes:
    """Three nodes, each in a folder of its name."""

    def __init__(self, ray_nodes: RayNodes, folder: Path) -> None:
        self._ray_nodes = ray_nodes
        self.ray_address = ray_nodes.address
        self._raylets = {name: ray_nodes.add(folder=folder / name, worker=8) for name in ("a", "b", "c")}

    def homes(self, pool: mempool.Pool) -> dict[int, str]:
        """On which one each shard runs."""
        names = {raylet: name for name, raylet in self._raylets.items()}
        return {shard.info.shard: names[_raylet_of(port_of(shard.info))] for shard in pool.status().shards}

    def remove(self, name: str) -> None:
        """End it at once, as if its machine had lost power."""
        self._ray_nodes.remove(self._raylets.pop(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each shard")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder, RayNodes() as ray_nodes:
        nodes = Nodes(ray_nodes, Path(folder))
        own = _pool(nodes, Path(folder), "own", OWN_DISK)
        with _up(own) as pool:
            rows = pool.create_table(mempool.TableConfig(name="facts", num_slots=512, value_dim=128)).rows(IDS)
            homes = nodes.homes(pool)
            for number in range(kills):
                for shard in homes:
                    _kill(pool, shard)
                    assert nodes.homes(pool) == homes, f"{nodes.homes(pool)} and not {homes}"
                assert torch.equal(pool.table("facts").rows(IDS), rows)
                print(f"kill {number + 1} of {kills}: shards are on {homes} again, with their pages", flush=True)
        own.down()
        own.edit_shards(1)
        with _up(own) as pool:
            assert nodes.homes(pool) == homes, f"{nodes.homes(pool)} and not {homes}"
            assert torch.equal(pool.table("facts").rows(IDS), rows)
            print(f"up again: shards are on {homes}, with their pages", flush=True)
            pool.rescale(3)
            homes = nodes.homes(pool)
            _kill(pool, 2)
            assert nodes.homes(pool) == homes, f"{nodes.homes(pool)} and not {homes}"
            assert torch.equal(pool.table("facts").rows(IDS), rows)
            print(f"three shards, one of them killed: shards are on {homes}", flush=True)
        own.run("down", "--pool", "own", "--drop", "--yes")
        assert not list(Path(folder).glob("*/disk/own/*")), "something is left"

        shared = _pool(nodes, Path(folder), "shared", str(Path(folder, "shared")))
        with _up(shared) as pool:
            rows = pool.create_table(mempool.TableConfig(name="facts", num_slots=512, value_dim=128)).rows(IDS)
            incarnation = pool.status().shards[1].info.incarnation
            lost = nodes.homes(pool)[1]
            nodes.remove(lost)
            _wait(pool, 1, incarnation)
            assert torch.equal(pool.table("facts").rows(IDS), rows)
            homes = nodes.homes(pool)
            _kill(pool, 1)
            assert nodes.homes(pool) == homes, f"{nodes.homes(pool)} and not {homes}"
            print(f"a shared path, and node {lost} is gone: shards are on {homes}, with their pages", flush=True)
        shared.down()


def _pool(nodes: Nodes, folder: Path, name: str, path: str) -> RayPool:
    pool = RayPool(folder, name=name, shards=2, ray_address=nodes.ray_address, resources={"worker": 1})
    pool.edit("shard:\n", f'shard:\n  storage: {{"path": "{path}"}}\n')
    return pool


@contextmanager
def _up(pool: RayPool) -> Iterator[mempool.Pool]:
    pool.up()
    try:
        with pool.connect() as client:
            yield client
    except BaseException:
        pool.down()
        raise


def _kill(pool: mempool.Pool, shard: int) -> None:
    """Kill a shard's process; it is there again then."""
    info = pool.status().shards[shard].info
    kill_listener(port_of(info))
    _wait(pool, shard, info.incarnation)


def _wait(pool: mempool.Pool, shard: int, incarnation: int) -> None:
    def returned() -> bool:
        now = pool.status().shards[shard]
        return now.state == "ready" and now.info.incarnation > incarnation

    wait_for(f"shard {shard} to come back", returned)


def _raylet_of(port: int) -> int:
    pid = listener(port)
    assert pid is not None
    return parent(pid)


if __name__ == "__main__":
    main()
