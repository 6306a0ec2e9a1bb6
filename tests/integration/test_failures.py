"""Processes of a pool killed while clients work."""

import json

import pytest
import torch

import mempool
from mempool.errors import DataLoss, Unauthenticated
from tests.integration.conftest import TOKEN
from tests.integration.pools import RayPool, Training, kill_listener, listener, port_of, wait_for


def test_training_goes_on_while_the_controller_is_away(shared_pool: RayPool) -> None:
    with shared_pool.connect() as pool:
        before = len(pool.status().shards)
        training = Training(pool, "steady")
        training.step()
        killed = kill_listener(shared_pool.port)
        for _ in range(10):
            training.step()
        away = listener(shared_pool.port) is None
        assert [table.name for table in pool.tables()] == ["steady"]  # a shard answers, or the controller again
        assert away, "ten steps took longer than the controller's restart: this tested nothing"
        back = wait_for("the controller to come back", lambda: listener(shared_pool.port))
        assert back != killed
        status = shared_pool.status()
        assert [shard["state"] for shard in status["shards"]] == ["ready"] * before
        assert [table["name"] for table in status["tables"]] == ["steady"]
        assert status["tables"][0]["lost_pages"] == 0
        pool.create_table(mempool.TableConfig(name="later", num_slots=64, value_dim=8))
        pool.rescale(before + 1)
        training.step()
        pool.rescale(before)
        training.step()
        training.assert_exact(pool)
        for name in ("steady", "later"):
            pool.drop_table(name)


def test_a_killed_shard_says_data_loss(shared_pool: RayPool) -> None:
    with shared_pool.connect() as pool:
        doomed = Training(pool, "doomed")
        doomed.step()
        spared = pool.create_table(mempool.TableConfig(name="spared", num_slots=16, value_dim=8))
        ids, weights = torch.tensor([[3, 5]]), torch.ones(1, 2)
        values = spared.gather(ids, weights).detach()
        document = {table["name"]: table for table in shared_pool.status()["tables"]}
        victims = {shard["shard"] for shard in document["doomed"]["shards"]}
        victims -= {shard["shard"] for shard in document["spared"]["shards"]}
        before = next(shard for shard in pool.status().shards if shard.info.shard in victims)
        kill_listener(port_of(before.info))
        with pytest.raises(DataLoss, match=r"drop the table .* write back"):
            doomed.step()
        with pytest.raises(DataLoss):
            doomed.table.rows(torch.arange(doomed.table.num_slots))
        assert torch.equal(spared.gather(ids, weights), values)

        after = next(shard for shard in pool.status().shards if shard.info.shard == before.info.shard)
        assert after.info.incarnation > before.info.incarnation
        lost = {table["name"]: table["lost_pages"] for table in shared_pool.status()["tables"]}
        assert lost["doomed"] > 0
        assert lost["spared"] == 0
        seen = shared_pool.run_here("status", "-f", str(shared_pool.file)).out
        assert "table doomed lost" in seen
        assert "DATA_LOSS" in seen

        # What is made afterwards works, the restarted shard takes part; what is lost cannot move.
        fresh = Training(pool, "fresh")
        fresh.step()
        fresh.assert_exact(pool)
        assert before.info.shard in {
            shard["shard"]
            for table in shared_pool.status()["tables"]
            if table["name"] == "fresh"
            for shard in table["shards"]
        }
        with pytest.raises(DataLoss, match="drop the table"):
            pool.rescale(len(pool.status().shards) + 1)
        pool.drop_table("doomed")
        fresh.step()
        fresh.assert_exact(pool)
        for name in ("spared", "fresh"):
            pool.drop_table(name)


def test_nobody_enters_without_the_token(shared_pool: RayPool) -> None:
    assert TOKEN not in json.dumps(shared_pool.status())
    for wrong in ("wrong-token", ""):
        with pytest.raises(Unauthenticated, match="token"):
            mempool.connect(shared_pool.address, token=wrong, timeout_s=10)
    refused = shared_pool.run_here("status", "--address", shared_pool.address, expect=1)
    assert "MEMPOOL_TOKEN" in refused.err
    assert TOKEN not in refused.err


def test_a_token_is_needed_to_let_others_in(shared_pool: RayPool) -> None:
    text = shared_pool.file.read_text()
    try:
        shared_pool.edit('  token_file: "token"\n', "")
        refused = shared_pool.run_here("up", "-f", str(shared_pool.file), expect=1)
        assert "token" in refused.err
    finally:
        shared_pool.file.write_text(text)


def test_controller_and_shard_die_together(shared_pool: RayPool) -> None:
    with shared_pool.connect() as pool:
        lost = Training(pool, "lost")
        lost.step()
        victim = pool.status().shards[-1].info
        kill_listener(shared_pool.port)
        kill_listener(port_of(victim))
        with pytest.raises(DataLoss):
            lost.step()
        pool.drop_table("lost")
        fresh = Training(pool, "fresh")
        fresh.step()
        fresh.assert_exact(pool)
        pool.drop_table("fresh")
    shards = {shard["shard"]: shard for shard in shared_pool.status()["shards"]}
    assert {shard["state"] for shard in shards.values()} == {"ready"}
    assert shards[victim.shard]["incarnation"] > victim.incarnation
