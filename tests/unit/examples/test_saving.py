"""A race that is saved, stopped and gone on from, beside one that never stopped; and the trained model, asked."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ask_fact
import mempool
import train_facts

FACTS = 26


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(train_facts, "NUM_SLOTS", 32**2)
    monkeypatch.setattr(train_facts, "VALUE_DIM", 128)
    lines = [{"question": f"What colour is item {chr(97 + i)}{i}?", "answer": f"shade {i % 7}"} for i in range(FACTS)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, *arguments: str) -> int:
    return train_facts.main(["--facts", str(folder / "facts.jsonl"), "--epochs", "30", *arguments])


def test_a_race_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(tmp_path / "race")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(tmp_path, "--model", f"{whole}.pt", "--json", f"{whole}.json") == 0
    assert run(tmp_path, "--save", place, "--every", "5", "--stop-after", "12") == 0
    assert f"stopped after step 12 of 30; --resume {place} goes on there" in capsys.readouterr().out
    assert len(list((tmp_path / "race" / "pool").iterdir())) == 2, "older ones are removed"
    options = ["--save", place, "--resume", place, "--model", f"{parts}.pt", "--json", f"{parts}.json"]
    assert run(tmp_path, *options) == 0
    assert "going on after step 12 of 30" in capsys.readouterr().out
    one, other = (torch.load(f"{path}.pt") for path in (whole, parts))
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    assert one["asked"] == other["asked"]
    one, other = (json.loads(Path(f"{path}.json").read_text(encoding="utf-8")) for path in (whole, parts))
    for model in ("memory", "dense"):
        assert one[model]["exact_match"] == other[model]["exact_match"] > 0.5
    assert (one["pool"]["updates_committed"], other["pool"]["updates_committed"]) == (30, 18)
    assert (one["pool"]["lookups"], other["pool"]["lookups"]) == (30 * FACTS, 18 * FACTS)
    assert one["pool"]["all_applied"]
    assert other["pool"]["all_applied"]
    assert run(tmp_path, "--resume", place, "--rescale-to", "1") == 0, "of a race that is over nothing is left to train"


def test_a_model_is_asked_in_the_pool_that_has_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.pt"

    def kept(*_: object, **__: object) -> mempool.Pool:
        return local(tmp_path / "memory")

    local = mempool.local
    monkeypatch.setattr(mempool, "local", kept, raising=False)
    monkeypatch.setattr(mempool, "connect", kept, raising=False)
    assert run(tmp_path, "--model", str(model)) == 0
    asked = torch.load(model)["asked"]
    capsys.readouterr()
    arguments = ["--address", "stands for the pool", "--model", str(model)]
    assert ask_fact.main(arguments) == 0
    assert capsys.readouterr().out == f"{asked['question']}\n{asked['answer']}\n"
    assert ask_fact.main([*arguments, "What colour is item b1?"]) == 0
    assert capsys.readouterr().out.startswith("What colour is item b1?\n")
    with local(tmp_path / "memory") as pool:  # values that were never trained
        pool.table("facts").write(torch.arange(32**2), torch.zeros(32**2, 128))
    assert ask_fact.main(arguments) == 1
    assert f"when the model was written the answer was {asked['answer']!r}" in capsys.readouterr().err
    assert ask_fact.main(["--address", "any", "--model", str(tmp_path / "none.pt")]) == 1


@pytest.mark.parametrize("arguments", [["--every", "2"], ["--stop-after", "2"]])
def test_when_to_save_needs_a_place(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *arguments)
    assert caught.value.code == 2


def test_another_race_and_no_race_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--resume", str(tmp_path / "none")) == 1
    assert "none/race.pt is not there: nothing was saved" in capsys.readouterr().err
    assert run(tmp_path, "--save", str(tmp_path / "race"), "--stop-after", "1") == 0
    assert run(tmp_path, "--resume", str(tmp_path / "race"), "--seed", "7") == 1
    assert "has another race (seed 0 there, 7 here): give the arguments" in capsys.readouterr().err
