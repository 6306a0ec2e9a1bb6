"""`mempool table NAME` on a pool that is served: what it is, where it is, and how it is used."""

import json
from pathlib import Path

import torch

import mempool
from mempool.wire.channels.loop import run
from tests.support.serving import ServedPool

from .conftest import Command

CONFIG = mempool.TableConfig(
    name="facts",
    num_slots=400,
    value_dim=128,
    usage=True,
    optimizer=mempool.optim.AdamW(lr=0.01, weight_decay=0.2, dense=True),
    keys=mempool.ProductKeys(heads=2, key_dim=8),
)


def train(address: str) -> None:
    with mempool.connect(address) as pool:
        table = pool.create_table(CONFIG)
        pool.create_table(mempool.TableConfig(name="plain", num_slots=64, value_dim=8))
        for last in (3, 1):
            ids = torch.tensor([[0] * 40 + [5, 6, last]])
            table.gather(ids, torch.ones(1, 43)).sum().backward()
            table.commit()


def test_as_json(served: ServedPool, file: Path, command: Command) -> None:
    train(served.address)
    document = json.loads(command("table", "facts", "-f", file, "--older-than", 1, "--json").stdout)
    assert (document["name"], document["version"], document["placement"]) == ("facts", 2, "columns")
    assert document["schema"]["optimizer"]["weight_decay"] == 0.2
    assert document["schema"]["keys"] == {"type": "product", "heads": 2, "key_dim": 8, "deterministic": True}
    usage = document["usage"]
    assert (usage["num_slots"], usage["used"], usage["dead"], usage["outdated"]) == (400, 5, 395, 1)
    assert (usage["uses"], usage["most"], usage["coverage"]) == (86, 80, 5 / 400)
    assert usage["histogram"][:3] == [
        {"low": 0, "high": 0, "slots": 395, "uses": 0},
        {"low": 1, "high": 1, "slots": 2, "uses": 2},
        {"low": 2, "high": 3, "slots": 2, "uses": 4},
    ]
    plain = json.loads(command("table", "plain", "--address", served.address, "--json").stdout)
    assert plain["usage"] is None


def test_for_people(served: ServedPool, command: Command) -> None:
    train(served.address)
    shown = command("table", "facts", "--address", served.address).stdout
    for said in (
        f"table facts of pool served at {served.address}",
        "400 in pages of 16",
        "128 columns of float32, in blocks of 64",
        "adamw, lr 0.01, eps 1e-08, weight_decay 0.2, dense",
        "product, heads 2, key_dim 8",
        "2, 2 updates applied",
        "usage: 5 of 400 slots (1.2%), 86 uses, 80 of one slot; 395 never used, 0 not by the last 1,000 steps",
        "KL to uniform",
    ):
        assert said in shown, said
    lines = shown.splitlines()
    assert lines[-8].split() == ["0", "395", "#" * 40]
    assert lines[-7].split() == ["1", "2", "#"]
    assert lines[-1].split() == ["64", "-", "127", "1", "#"]
    plain = command("table", "plain", "--address", served.address).stdout
    assert "it is not counted how its slots are used" in plain
    missing = command("table", "nobody", "--address", served.address, expect=1)
    assert "has no table 'nobody'; it has facts, plain" in missing.stderr


def test_a_table_that_has_lost_pages_is_shown(served: ServedPool, command: Command) -> None:
    train(served.address)

    async def restart() -> None:
        await served.stop(served.shards[0].info)
        await served.controller.shard_restarted(await served.start(0))

    run(restart(), timeout_s=30)
    shown = command("table", "facts", "--address", served.address).stdout
    assert "lost" in shown
    assert "it cannot be told how its slots were used: " in shown
    document = json.loads(command("table", "facts", "--address", served.address, "--json").stdout)
    assert document["usage"] is None
    assert document["lost_pages"] > 0
