"""Commands on a pool served in this process: what they do, print and exit with."""

import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mempool
from mempool import rayhost
from mempool.cli import show
from mempool.cli import target as target_module
from mempool.types import PoolStatus, RescaleProgress, ShardInfo, ShardStatus, TableCreation, TableStatus
from mempool.wire.channels.loop import run
from tests.support.serving import ServedPool

from .conftest import Command

CONFIG = mempool.TableConfig(name="facts", num_slots=512, value_dim=128)


def train(address: str, steps: int) -> None:
    with mempool.connect(address) as pool:
        table = pool.create_table(CONFIG)
        for _ in range(steps):
            table.gather(torch.tensor([[1, 2]]), torch.ones(1, 2)).sum().backward()
            table.commit()


def test_status_as_json(served: ServedPool, file: Path, command: Command) -> None:
    train(served.address, 3)
    document = json.loads(command("status", "--address", served.address, "--json").stdout)
    assert list(document) == [
        "pool", "address", "rescaling", "wanted_shards", "waiting_for", "unfinished", "checkpoint", "shards", "tables",
        "creating",
    ]  # fmt: skip
    assert (document["wanted_shards"], document["waiting_for"], document["unfinished"]) == (2, "", "")
    assert (document["pool"], document["address"], document["rescaling"]) == ("served", served.address, False)
    assert [shard["shard"] for shard in document["shards"]] == [0, 1]
    for shard in document["shards"]:
        assert shard["state"] == "ready"
        assert shard["address"] == served.shards[shard["shard"]].info.address
        assert shard["incarnation"] == served.shards[shard["shard"]].info.incarnation
        assert (shard["device"], shard["num_bytes"] > 0, shard["uptime_s"] >= 0) == ("cpu", True, True)
    (table,) = document["tables"]
    assert (table["name"], table["num_slots"], table["value_dim"], table["dtype"]) == ("facts", 512, 128, "float32")
    assert (table["layout"], table["placement"], table["optimizer"]) == ("auto", "columns", "adagrad")
    assert (table["version"], table["updates_applied"], table["lost_pages"]) == (3, 3, 0)
    assert table["pages"] == sum(shard["pages"] for shard in table["shards"]) == 64
    assert [shard["version"] for shard in table["shards"]] == [3, 3]
    by_file = json.loads(command("status", "-f", file, "--json").stdout)
    assert by_file["tables"] == document["tables"]


def test_status_for_people(served: ServedPool, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    train(served.address, 2)
    monkeypatch.setenv("MEMPOOL_ADDRESS", served.address)
    lines = command("status").stdout.splitlines()
    assert lines[0] == f"pool served at {served.address}: 2 shards, 1 table"
    assert served.shards[1].info.address in lines[3]
    facts = next(line for line in lines if line.startswith("facts")).split()
    assert facts == ["facts", "512", "128", "float32", "adagrad", "columns", "64", "0", "2", "2"]
    assert "\x1b" not in "\n".join(lines), "colours where nobody sees them"


def test_status_shows_where_time_goes_if_asked(served: ServedPool, command: Command) -> None:
    train(served.address, 2)
    assert "half within" not in command("status", "--address", served.address).stdout
    lines = command("status", "--address", served.address, "--stages").stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if "half within" in line)
    assert lines[at].split() == [
        "shard",
        "stage",
        "times",
        "in",
        "all",
        "half",
        "within",
        "99",
        "%",
        "within",
        "longest",
    ]
    assert {line.split()[0] for line in lines[at + 1 :] if line.strip()} == {"0", "1"}
    gathers = [line.split() for line in lines[at + 1 :] if line.split()[1:2] == ["gather"]]
    assert [gather[2] for gather in gathers] == ["2", "2"], lines
    assert all(gather[4] in ("us", "ms", "s") for gather in gathers)


def test_times_are_short() -> None:
    assert [show._short_time(time) for time in (0.0, 12e-6, 0.0345, 1.04)] == ["0 us", "12 us", "34.5 ms", "1.0 s"]


def test_status_shows_what_is_wrong(served: ServedPool, command: Command) -> None:
    train(served.address, 1)

    async def restart() -> None:
        await served.stop(served.shards[1].info)
        await served.controller.shard_restarted(await served.start(1))

    run(restart(), timeout_s=30)
    shown = command("status", "--address", served.address).stdout
    assert "table facts lost 32 of 64 pages: it answers DATA_LOSS" in shown
    assert "pool.drop_table('facts')" in shown
    document = json.loads(command("status", "--address", served.address, "--json").stdout)
    assert document["tables"][0]["lost_pages"] == 32
    assert document["tables"][0]["version"] == 1, "the restarted shard's empty ledger hides the table's"

    async def lose() -> None:
        served.shards[0].info, gone = served.shards[1].info, served.shards[0]
        await gone.server.stop(0)

    run(lose(), timeout_s=30)
    assert "shard 0 does not answer" in command("status", "--address", served.address).stdout


def test_apply(served: ServedPool, file: Path, command: Command) -> None:
    train(served.address, 1)
    file.write_text(
        file.read_text()
        .replace("shards: 2", "shards: 3")
        .replace("[]", "\n  - {name: more, num_slots: 64, value_dim: 8}")
    )
    dry = command("apply", "-f", file, "--dry-run").stdout
    assert "shards: 2 -> 3" in dry
    assert "create table more: 64 x 8 float32" in dry
    assert "keep table facts" in dry
    assert "whether Ray has room for more shards is asked when it is done" in dry
    assert len(served.shards) == 2
    planned = json.loads(command("apply", "-f", file, "--dry-run", "--json").stdout)
    assert planned == {
        "applied": False,
        "nothing": False,
        "unfinished": "",
        "shards_before": 2,
        "shards_after": 3,
        "create": ["more"],
        "kept": ["facts"],
        "refused": [],
        "restart": [],
    }
    done = command("apply", "-f", file).stdout.splitlines()
    assert done[0] == "asking for 3 shards; there are 2"
    assert done[-1] == "creating table 'more': 64 x 8 float32"
    assert sorted(served.shards) == [0, 1, 2]
    assert json.loads(command("apply", "-f", file, "--json").stdout)["nothing"] is True
    assert "nothing to do" in command("apply", "-f", file).stdout


def test_apply_refuses_whole(served: ServedPool, file: Path, command: Command) -> None:
    train(served.address, 1)
    file.write_text(
        file.read_text()
        .replace("shards: 2", "shards: 3")
        .replace("[]", "[{name: facts, num_slots: 512, value_dim: 64}]")
    )
    assert "tables[facts].value_dim: 128 -> 64" in command("apply", "-f", file, expect=1).stderr
    assert "refuse" in command("apply", "-f", file, "--dry-run", expect=1).stdout
    assert len(served.shards) == 2


def test_scale_edits_the_file_or_says_so(served: ServedPool, file: Path, command: Command) -> None:
    train(served.address, 1)
    lines = command("scale", "--shards", 3, "-f", file).stdout.splitlines()
    assert lines[-2].startswith("moved ")
    assert "shards: 3" in file.read_text()
    assert "# a comment" in file.read_text()
    assert "Set pool.shards to 1" in command("scale", "--shards", 1, "--address", served.address).stdout
    assert sorted(served.shards) == [0]


def test_scale_leaves_the_file_of_another_pool_alone(served: ServedPool, file: Path, command: Command) -> None:
    file.write_text(text := file.read_text().replace("name: served", "name: other"))
    error = command("scale", 3, "-f", file, expect=1).stderr
    assert "'served'" in error
    assert "'other'" in error
    assert file.read_text() == text
    assert sorted(served.shards) == [0, 1]


def test_errors_are_one_message(file: Path, command: Command, tmp_path: Path) -> None:
    assert command("status", "--address", "nowhere", expect=2).stderr.startswith("mempool: address 'nowhere' is not")
    assert command("scale", "--shards", 0, expect=2).stderr
    for arguments in ((), (2, "--shards", 3)):
        assert "once: mempool scale 3" in command("scale", *arguments, expect=2).stderr
    assert "no such file" in command("apply", "-f", tmp_path / "none.yaml", expect=1).stderr
    file.write_text("pool: {name: served}\n")
    assert f"{file}:1: pool.shards is missing" in command("apply", "-f", file, expect=1).stderr
    file.write_text("pool: {name: elsewhere, shards: 1, port: 0}\n")
    assert "--address" in command("status", "-f", file, expect=2).stderr
    assert "no pool that `mempool up` started runs" in command("down", expect=1).stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_up_that_is_told_to_end_undoes_what_it_began(
    number: signal.Signals, file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    undone = []

    def start(_config: object, **_: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        except BaseException:
            undone.append(True)
            raise

    monkeypatch.setattr(rayhost, "up", start, raising=False)
    before = signal.signal(number, signal.SIG_DFL)  # nohup has it ignored
    try:
        command("up", "-f", file, expect=128 + number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert undone == [True]


def test_nobody_there(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "_ANSWER_TIMEOUT_S", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    found = command("status", "--address", f"127.0.0.1:{port}", "--json", expect=3)
    assert found.stdout == ""
    assert found.stderr.count(f"127.0.0.1:{port}") == 1
    assert "connection refused" in found.stderr


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=120, record=True, highlight=False, markup=False)
    monkeypatch.setattr(show, "screen", lambda: console)
    with show.rescale_progress() as (say, watch):
        say("rescaling: 1 -> 2 shards")
        watch(
            RescaleProgress(
                shards_before=1,
                shards_after=2,
                pages_moved=7,
                pages_total=64,
                bytes_moved=3 * 2**20,
                bytes_total=2**25,
                table="facts",
                done=False,
            )
        )
    text = console.export_text()
    assert "rescaling: 1 -> 2 shards" in text
    assert "moving facts" in text
    assert "7/64 pages" in text
    assert "3.0 MiB" in text


def test_who_stops_watching_a_rescale_is_told_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with show.rescale_progress(quiet=True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "goes on without its watcher: see mempool status" in capsys.readouterr().err


def shown(capsys: pytest.CaptureFixture[str], **fields: object) -> str:
    now = PoolStatus(name="p", tables=(), **{"shards": (), "rescaling": False, **fields})
    show.status(now, address="localhost:7077")
    return capsys.readouterr().out


def test_status_says_what_is_not_as_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    infos = [ShardInfo(shard=shard, address="localhost:1", incarnation=1) for shard in range(2)]
    shards = (ShardStatus(info=infos[0], state="ready"), ShardStatus(info=infos[1], state="starting"))
    assert "asked for" not in shown(capsys, shards=shards, wanted_shards=2)
    assert "asked for" not in shown(capsys, shards=shards, wanted_shards=0), "while the controller is away"
    found = shown(capsys, shards=shards, wanted_shards=3)
    assert "has 2 shards and was asked for 3: ask again with mempool scale --shards 3" in found
    assert "shard 1 is starting" in found
    damaged = (shards[0], replace(shards[1], state="unreachable", storage_refuses="file: damaged"))
    assert "shard 1 cannot start, and is tried again: file: damaged" in shown(capsys, shards=damaged)
    moving = shown(capsys, shards=shards, wanted_shards=3, rescaling=True, waiting_for="Ray to place shard 2")
    assert moving.splitlines()[0].endswith("going to 3 shards: waiting for Ray to place shard 2")
    assert "asked for" not in moving
    assert (
        shown(capsys, wanted_shards=3, unfinished="stopped there; do this").splitlines()[-1] == "stopped there; do this"
    )


def test_status_says_what_is_left_of_a_table_that_nobody_makes_any_more(capsys: pytest.CaptureFixture[str]) -> None:
    infos = [ShardInfo(shard=shard, address="localhost:1", incarnation=1) for shard in range(3)]
    pending = TableStatus(
        table_id=7, name="half", epoch=1, version=0, pages=1, lost_pages=0, num_bytes=1, updates_held=0,
        updates_applied=0, lookups=0, frozen=False, pending=True,
    )  # fmt: skip
    shards = tuple(ShardStatus(info=info, state="ready", tables=(pending,) if info.shard else ()) for info in infos)
    assert "table half is half made on shard 1, 2, and nobody makes it any more" in shown(capsys, shards=shards)
    making = TableCreation(table="half", table_id=7, waiting_for="", spent_s=1.0, shards=())
    assert "half made" not in shown(capsys, shards=shards, creating=(making,))
