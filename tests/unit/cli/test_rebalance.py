"""`mempool rebalance` on a pool that is served: what would move, what moves, and what status says of load."""

import json
from pathlib import Path

import pytest
import torch

import mempool
from mempool.controller.moves import evening
from tests.support.serving import ServedPool

from .conftest import Command

CONFIG = mempool.TableConfig(name="facts", num_slots=512, value_dim=64, page_slots=16, layout="rows")


def test_load_is_evened(served: ServedPool, file: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evening, "LEAST_SEEN", 500)
    with mempool.connect(served.address) as pool:
        table = pool.create_table(CONFIG)
        at = ("--address", served.address)
        said = command("rebalance", *at).stdout
        assert "too little was read and written lately" in said
        shares = [shard["load"] for shard in json.loads(command("status", *at, "--json").stdout)["shards"]]
        assert shares == [None, None]

        ids, weights = torch.arange(256).repeat(8, 1), torch.ones(8, 256)  # the pages of the first shard
        with torch.no_grad():
            expected = table.gather(ids, weights)
            for _ in range(160):
                table.gather(ids, weights)
        shards = json.loads(command("status", *at, "--json").stdout)["shards"]
        assert [shard["load"] for shard in shards] == [1.0, 0.0]
        assert "100%" in command("status", *at).stdout

        said = command("rebalance", *at, "--dry-run").stdout.splitlines()
        assert said[0].split() == ["shard", "load", "before", "load", "after"]
        assert said[1].split()[:2] == ["0", "100.0%"]
        assert said[-1].startswith("16 pages would move, ")
        assert pool.table("facts").schema.layout == "rows"
        planned = json.loads(command("rebalance", "-f", file, "--dry-run", "--json").stdout)
        assert (planned["applied"], planned["pages"]) == (False, 16)
        assert [shard["before"] for shard in planned["shards"]] == [1.0, 0.0]
        assert max(shard["after"] for shard in planned["shards"]) < 0.5 * 1.05 + 1e-9

        said = command("rebalance", *at).stdout
        assert "moved 16 of 16 pages" in said
        torch.testing.assert_close(table.gather(ids, weights), expected, rtol=1e-6, atol=1e-6)
        assert json.loads(command("rebalance", *at, "--dry-run", "--json").stdout)["pages"] == 0
