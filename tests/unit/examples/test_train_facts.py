import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mempool
import train_facts
from facts.rescale import LiveRescale, RescaleFailed
from facts.train import StepTime


@pytest.fixture
def facts_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    lines = [{"question": f"What colour is item {chr(97 + i)}{i}?", "answer": f"shade {i % 7}"} for i in range(26)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_facts, "NUM_SLOTS", 64**2)
    monkeypatch.setattr(train_facts, "VALUE_DIM", 128)


def test_own_facts_are_learned_while_an_embedded_pool_is_rescaled(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out.json"
    arguments = ["--facts", str(facts_file), "--epochs", "80", "--rescale-to", "1", "--json", str(out)]
    assert train_facts.main(arguments) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["facts"] == 26
    assert report["examples_per_model"] == 26 * 80
    assert report["headline"] == "trained phrasings"
    assert report["memory"]["exact_match"] == 1.0
    assert report["memory"]["exact_match_unseen_phrasings"] is None
    assert report["memory"]["parameters_in_pool"] == 64**2 * 128
    assert report["dense"]["parameters_in_pool"] == 0
    assert report["dense"]["flops_per_example"] >= report["memory"]["flops_per_example"]
    pool = report["pool"]
    assert (pool["shards_before"], pool["shards_after"]) == (2, 1)
    assert pool["updates_committed"] == 80
    assert pool["updates_applied"] == {"0": 80}
    assert pool["all_applied"] is True
    assert pool["rescale"]["steps_during"] >= 0
    printed = capsys.readouterr().out
    assert "updates committed = applied" in printed
    assert "2 -> 1" in printed


def test_a_table_trained_before_is_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    with mempool.local() as pool:
        console = train_facts.Console(width=200)
        table = train_facts.open_table(pool, name="facts", console=console)
        assert (table.num_slots, table.value_dim) == (64**2, 128)
        assert train_facts.open_table(pool, name="facts", console=console) is table
        assert capsys.readouterr().out == ""
        table.gather(torch.tensor([[1, 2]])).sum().backward()
        table.commit()
        train_facts.open_table(pool, name="facts", console=console)
        assert "has 1 commits from before" in capsys.readouterr().out


def test_bad_facts_end_with_a_message_and_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("nonsense\n", encoding="utf-8")
    assert train_facts.main(["--facts", str(path)]) == 1
    assert f"train_facts: {path}:1: is not JSON" in capsys.readouterr().err


def test_an_address_where_nobody_listens_ends_with_a_message_and_1(
    facts_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str) -> mempool.Pool:
        raise mempool.errors.PoolUnreachable(f"no pool at {address}")

    monkeypatch.setattr(mempool, "connect", refuse, raising=False)
    assert train_facts.main(["--facts", str(facts_file), "--address", "localhost:1"]) == 1
    assert "train_facts: no pool at localhost:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--epochs", "0"], ["--rescale-config", "x.yaml"], ["--rescale-config", "x.yaml", "--rescale-to", "4"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train_facts.main(arguments)
    assert caught.value.code == 2


def test_a_failed_rescale_is_raised_when_it_is_waited_for(tmp_path: Path) -> None:
    with mempool.local() as pool:
        rescale = LiveRescale(pool, shards=2, config=tmp_path / "none.yaml")
        assert str(rescale) == "1 shards"
        rescale.start()
        with pytest.raises(RescaleFailed, match=r"1 -> 2 failed.*none\.yaml"):
            rescale.finish(steps=[])
        assert str(rescale) == "rescale failed"


def test_steps_that_overlap_the_rescale_are_told_from_the_others() -> None:
    with mempool.local() as pool:
        rescale = LiveRescale(pool, shards=2)
        rescale.start()
        rescale.finish(steps=[])
        during_s = rescale.began_s + 1e-9
        report = rescale.finish(steps=[StepTime(0.0, 1.0), StepTime(1.0, 3.0), StepTime(3.0, during_s)])
    assert (report.shards_before, report.shards_after) == (1, 2)
    assert report.steps_during == 1
    assert report.usual_step_s == 1.5
    assert report.longest_step_s == pytest.approx(during_s - 3.0)


def test_by_a_config_the_file_is_edited_and_apply_is_run_and_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("pool:\n  name: p\n  shards: 1  # kept\n", encoding="utf-8")
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text("import sys, time; print(sys.argv[1:], flush=True); time.sleep(60)", encoding="utf-8")
    begun: list[subprocess.Popen[str]] = []

    def popen(arguments: list[str], **options: object) -> "subprocess.Popen[str]":
        begun.append(real_popen([sys.executable, str(stand_in), *arguments[3:]], **options))
        return begun[0]

    real_popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    with mempool.local() as pool:
        with LiveRescale(pool, shards=3, config=config) as rescale:
            rescale.start()
            deadline_s = time.monotonic() + 30
            while not begun and time.monotonic() < deadline_s:
                time.sleep(0.01)
            assert str(rescale) == "rescaling 1 -> 3"
        with pytest.raises(RescaleFailed, match=r"`mempool apply -f .*cluster\.yaml` ended with -15"):
            rescale.finish(steps=[])
    assert begun[0].returncode == -15
    assert config.read_text(encoding="utf-8") == "pool:\n  name: p\n  shards: 3  # kept\n"


def test_dead_slots_begin_anew_half_way_and_are_used_then(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_facts, "FLAT_SLOTS", 1024)
    revived = {}
    for more in ([], ["--reinit-dead"]):
        out = tmp_path / "out.json"
        arguments = ["--facts", str(facts_file), "--epochs", "20", "--keys", "flat", "--json", str(out)]
        assert train_facts.main([*arguments, *more]) == 0
        report = json.loads(out.read_text(encoding="utf-8"))
        assert report["dense"]["flops_per_example"] >= report["memory"]["flops_per_example"]
        in_use = report["pool"]["in_use"]
        dead = round(1024 * (1 - in_use["coverage_half_way"]))
        assert dead > 50
        assert in_use["begun_anew"] == (dead if more else 0)
        revived[bool(more)] = in_use["revived"]
        assert in_use["coverage"] == pytest.approx(
            in_use["coverage_half_way"] + in_use["revived"] * (1 - in_use["coverage_half_way"])
        )
    assert revived[True] > 2 * revived[False], revived
    printed = capsys.readouterr().out
    assert "slots used, half way" in printed
    assert "dead then, begun anew" in printed
    with pytest.raises(SystemExit):
        train_facts.main(["--reinit-dead"])
    assert "--reinit-dead needs --keys flat" in capsys.readouterr().err


def test_a_table_of_other_keys_ends_with_a_message_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    with mempool.local() as pool:
        train_facts.open_table(pool, name="facts", console=None)
        with pytest.raises(mempool.errors.InvalidRequest, match="made with other keys than --keys asks for"):
            train_facts.open_table(pool, name="facts", console=None, flat=True)
    assert capsys.readouterr().out == ""
