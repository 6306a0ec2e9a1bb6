"""Checkpoints of a pool on Ray: what a killed shard had comes back, what a killed controller began counts not."""

import contextlib
import threading
from pathlib import Path

import pytest
import torch

import mempool
from mempool.checkpoint import looking
from mempool.checkpoint.stores import open_store
from mempool.errors import DataLoss, MempoolError
from tests.integration.pools import RayPool, Training, kill_listener, listener, port_of, wait_for


def test_lost_pages_come_back_from_a_checkpoint_and_a_killed_controller_leaves_older_ones_whole(
    shared_pool: RayPool, tmp_path: Path
) -> None:
    with shared_pool.connect() as pool:
        training = Training(pool, "saved")
        training.step()
        taken = pool.checkpoint(tmp_path, extra={"step": 1})
        everything = torch.arange(training.table.num_slots)
        then = training.table.rows(everything)
        training.step()
        before = next(shard for shard in pool.status().shards if shard.tables[0].pages)
        kill_listener(port_of(before.info))
        with pytest.raises(DataLoss):
            training.table.rows(everything)
        (restored,) = pool.restore(tmp_path, replace=True)
        assert torch.equal(restored.rows(everything), then)
        assert [each.name for each in pool.tables()] == ["saved"]

        # The controller dies while another is begun, at whatever moment: that one is whole, or counts for nothing.
        begun = threading.Thread(target=_quietly, args=(pool, tmp_path))
        begun.start()
        killed = kill_listener(shared_pool.port)
        begun.join(60.0)
        assert not begun.is_alive()
        wait_for("the controller to come back", lambda: listener(shared_pool.port) not in (None, killed))
        training = Training(pool, "later")
        training.step()
        training.assert_exact(pool)
        restored.gather(torch.tensor([[1, 2]]), torch.ones(1, 2)).sum().backward()
        restored.commit()
        found = [each["name"] for each in looking.checkpoints(open_store(tmp_path))]
        assert found[0] == taken.name
        last = pool.checkpoint(tmp_path, keep=1)
        assert [each["name"] for each in looking.checkpoints(open_store(tmp_path))] == [last.name]
        assert not looking.verify(open_store(tmp_path)).damages
        assert {folder.name for folder in tmp_path.iterdir()} <= {last.name, *_bases(tmp_path)}
        for name in ("saved", "later"):
            pool.drop_table(name)


def _quietly(pool: mempool.Pool, place: Path) -> None:
    with contextlib.suppress(MempoolError):
        pool.checkpoint(place)


def _bases(place: Path) -> list[str]:
    bases: list[str] = looking.inspect(open_store(place))["bases"]
    return bases
