"""`mempool apply` on an edited file, while a trainer runs."""

import json
import threading

import pytest

from mempool.errors import InvalidRequest
from tests.integration.pools import RayPool, Training, wait_for


def test_apply_rescales_while_a_trainer_runs(shared_pool: RayPool) -> None:
    before = len(shared_pool.status()["shards"])
    with shared_pool.connect() as pool:
        training = Training(pool, "rescaled")
        enough = threading.Event()
        failures: list[BaseException] = []

        def train() -> None:
            try:
                while not enough.is_set():
                    training.step()
            except BaseException as error:
                failures.append(error)

        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            wait_for("first steps", lambda: training.steps >= 3 or failures)
            shared_pool.edit_shards(4)
            grown = shared_pool.run("apply", "-f", str(shared_pool.file)).out
            at_four = training.steps
            wait_for("steps on 4 shards", lambda: training.steps >= at_four + 3 or failures)
            shared_pool.edit_shards(3)
            shrunk = json.loads(shared_pool.apply("--json").out)
            at_three = training.steps
            wait_for("steps on 3 shards", lambda: training.steps >= at_three + 3 or failures)
        finally:
            enough.set()
            trainer.join(60)
        assert not failures
        assert not trainer.is_alive()
        assert f"asking for 4 shards; there are {before}" in grown
        assert "pages" in grown
        assert (shrunk["applied"], shrunk["shards_before"], shrunk["shards_after"]) == (True, 4, 3)
        training.assert_exact(pool)
        pool.drop_table("rescaled")
    document = shared_pool.status()
    assert [shard["shard"] for shard in document["shards"]] == [0, 1, 2]
    assert {shard["state"] for shard in document["shards"]} == {"ready"}


def test_apply_says_what_it_will_not_do(shared_pool: RayPool) -> None:
    shared_pool.edit("tables: []", 'tables:\n  - {name: "kept", num_slots: 64, value_dim: 8}')
    try:
        dry = json.loads(shared_pool.apply("--dry-run", "--json").out)
        assert (dry["applied"], dry["create"]) == (False, ["kept"])
        assert shared_pool.status()["tables"] == []
        shared_pool.apply()
        assert [table["name"] for table in shared_pool.status()["tables"]] == ["kept"]
        shared_pool.edit("value_dim: 8", "value_dim: 9")
        shared_pool.edit("threads: 1", "threads: 2")
        refused = shared_pool.apply(expect=1)
        assert "tables[kept].value_dim: 8 -> 9" in refused.err
        assert "nothing was applied" in refused.err
        shared_pool.edit("value_dim: 9", "value_dim: 8")
        aside = shared_pool.apply().out
        assert "shard.threads: 1 -> 2" in aside
        shared_pool.edit("threads: 2", "threads: 1")
        shared_pool.edit("tables:\n", "tables:\n  - {name: large, num_slots: 4_000_000, value_dim: 128}\n")
        assert "160.0 MiB" in shared_pool.apply(expect=1).err
        assert [table["name"] for table in shared_pool.status()["tables"]] == ["kept"]
    finally:
        text = shared_pool.file.read_text()
        shared_pool.file.write_text(text[: text.index("tables:")] + "tables: []\n")
        with shared_pool.connect() as pool:
            for table in pool.tables():
                pool.drop_table(table.name)


def test_a_second_rescale_is_refused(shared_pool: RayPool) -> None:
    now = len(shared_pool.status()["shards"])
    with shared_pool.connect() as pool, shared_pool.connect() as other:
        grower = threading.Thread(target=lambda: pool.rescale(now + 1))
        grower.start()
        try:
            wait_for("the rescale to begin", lambda: other.status().rescaling)
            with pytest.raises(InvalidRequest, match=r"rescale to \d+ shards is under way"):
                other.rescale(now)
            shared_pool.edit_shards(5)
            assert "on its way to" in shared_pool.apply(expect=1).err
            shared_pool.edit_shards(3)
        finally:
            grower.join(60)
        assert not grower.is_alive()
        other.rescale(now)
        assert len(other.status().shards) == now
