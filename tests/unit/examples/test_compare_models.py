"""The comparison of models, at a size that a test can wait for."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import compare_models
import mempool
from comparison.blocks import BALANCE, KINDS, WITH_TABLES, Blocks, Mixture, Sizes, Tables, plan
from comparison.facts_task import FactsTask, Setup, token_f1
from comparison.language_task import LanguageTask, TextError, read_text
from comparison.study import Study, StudyError, chosen, climb, slug, tuned, with_contents
from comparison.training import Learner
from facts.data import FactBook

SMALL = Sizes(dim=32, slots=32**2, heads=2, topk=4, key_dim=16, experts=4, ngram_heads=2, ngram_dim=8)


@pytest.fixture(scope="module")
def pool() -> Iterator[mempool.Pool]:
    with mempool.local(shards=2) as pool:
        yield pool


@pytest.mark.parametrize("sizes", [Sizes(), SMALL], ids=["usual", "small"])
def test_all_models_cost_the_same(sizes: Sizes) -> None:
    costs = {kind: plan(kind, sizes).flops for kind in KINDS}
    assert max(costs.values()) == costs["memory+3"]
    assert min(costs.values()) > (0.98 if sizes.dim > 32 else 0.9) * max(costs.values())  # widths are multiples of 8


@pytest.mark.parametrize("kind", ["dense", "moe", "memory", "memory+1", "memory+3"])
def test_products_are_as_many_as_the_formula_says(kind: str, pool: mempool.Pool) -> None:
    tables = Tables(pool, f"flops-{kind.replace('+', '-')}", lr=0.1)
    blocks = Blocks(plan(kind, SMALL), SMALL, tables, vocabulary=10).eval()
    x = torch.randn(512, SMALL.dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for number in range(SMALL.depth):
            blocks(x, number)
    tables.drop()
    # Kernels of our own are unknown to torch: half-keys, sums of candidates, weighted sums.
    memories = sum(part.startswith("memory") for part in blocks.plan.parts)
    queries, chosen_slots = SMALL.heads * SMALL.key_dim, SMALL.heads * SMALL.topk
    own = memories * (2 * queries * 32 + 2 * SMALL.heads * SMALL.topk**2 + 2 * chosen_slots * SMALL.dim)
    assert counter.get_total_flops() / 512 == pytest.approx(blocks.plan.flops - own, rel=1e-6)


def test_an_unknown_model_and_one_that_is_too_dear_are_refused() -> None:
    with pytest.raises(ValueError, match="model 'transformer' is none of dense, moe"):
        plan("transformer", SMALL)
    with pytest.raises(ValueError, match="give larger sizes"):
        plan("ngram", SMALL, ngram_tokens=1000.0)


def test_a_mixture_is_the_weighted_sum_of_two_experts_and_its_loss_is_least_where_use_is_equal() -> None:
    torch.manual_seed(0)
    mixture = Mixture(6, 8, 4)
    x = torch.randn(5, 3, 6)
    y = mixture(x)
    scores = mixture.router(x)
    best, chosen_experts = scores.topk(2, dim=-1)
    everyone = torch.stack([expert(x) for expert in mixture.experts], dim=-2)
    picked = everyone.gather(-2, chosen_experts[..., None].expand(*chosen_experts.shape, 6))
    torch.testing.assert_close(y, (best.softmax(-1)[..., None] * picked).sum(-2))
    assert mixture.extra_loss is not None
    assert mixture.extra_loss.item() >= 0.9 * BALANCE


@pytest.mark.parametrize("kind", KINDS)
def test_each_model_learns_facts(kind: str, small_book: FactBook, pool: mempool.Pool) -> None:
    task = FactsTask(small_book, SMALL)
    found = task.run(Setup(kind, seed=0, lr=1e-2, table_lr=0.3, epochs=150), pool)
    assert found["exact_match_trained"] > 0.6
    assert found["f1_trained"] >= found["exact_match_trained"]
    assert (found["pool_parameters"] > 0) == (kind in WITH_TABLES)
    if "memory" in kind:
        assert 0 < found["coverage"] <= 1
        assert found["kl_to_uniform"] >= 0
    assert not pool.tables()


def test_a_run_is_the_same_again(small_book: FactBook, pool: mempool.Pool) -> None:
    task, setup = FactsTask(small_book, SMALL), Setup("memory+3", seed=3, lr=3e-3, table_lr=0.3, epochs=3)
    first, second = (
        {name: value for name, value in task.run(setup, pool).items() if name != "train_s"} for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_each_model_learns_a_text(kind: str, pool: mempool.Pool) -> None:
    passages = [
        f"the {a} of {b} is {a} and {b} ." for a in ["red", "green", "blue", "amber"] for b in ["one", "two", "six"]
    ]
    task = LanguageTask(passages * 20, SMALL, context=16, batch=8)
    found = task.run(Setup(kind, seed=0, lr=1e-2, table_lr=0.3), pool, steps=60)
    assert 1.0 < found["perplexity"] < 0.5 * task.vocabulary
    assert not pool.tables()


def test_options_of_a_memory_are_carried_out(small_book: FactBook, pool: mempool.Pool) -> None:
    task = FactsTask(small_book, SMALL)
    for changed in compare_models.OPTIONS.values():
        given: dict[str, Any] = {**changed, **({"sample_from": 16} if "sample_from" in changed else {})}
        balance, lower_values = given.pop("balance", 0.0), given.pop("lower_values", True)
        setup = Setup("memory+1", 0, 3e-3, 0.3, 1, tuple(given.items()), balance, lower_values)
        assert 0 <= task.run(setup, pool)["exact_match_trained"] <= 1
    assert len({slug(name) for name in compare_models.OPTIONS}) == len(compare_models.OPTIONS)


@pytest.mark.parametrize("lower_values", [True, False])
def test_the_values_rate_comes_down_to_a_tenth_or_stays(lower_values: bool, pool: mempool.Pool) -> None:
    tables = Tables(pool, "rates", lr=0.5)
    blocks = Blocks(plan("memory+1", SMALL), SMALL, tables, vocabulary=10)
    learner = Learner(blocks, blocks, lr=1e-3, table_lr=0.5, num_steps=4, lower_values=lower_values)
    seen = []
    for _ in range(4):
        learner.step(blocks(torch.randn(3, SMALL.dim), SMALL.middle).square().mean())
        seen.append(learner._optimizers[1].param_groups[0]["lr"])
    tables.drop()
    assert seen == pytest.approx([0.3875, 0.275, 0.1625, 0.05] if lower_values else [0.5] * 4)


def test_the_curve_says_what_each_number_of_slots_costs(small_book: FactBook, pool: mempool.Pool) -> None:
    task, setup = FactsTask(small_book, SMALL), Setup("memory+1", 0, 3e-3, 0.3, 1)
    base, larger = (task.run(setup, pool, sizes=replace(SMALL, slots=side**2)) for side in (32, 64))
    assert base["flops"] == task.plan("memory+1").flops
    assert larger["hidden"] == base["hidden"]
    assert larger["flops"] - base["flops"] == 2 * SMALL.heads * SMALL.key_dim * (64 - 32)


def test_the_command_prints_goes_on_and_refuses_other_settings(
    tmp_path: Path, pool: mempool.Pool, small_book: FactBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_models, "build_facts", lambda *_, **__: small_book)
    command = ["--parts", "facts,scaling", "--models", "dense,memory+1", "--seeds", "2", "--epochs", "2"]
    options = compare_models._parser().parse_args([*command, "--largest", "10", "--out", str(tmp_path)])
    console = Console(record=True, width=200)
    compare_models.compare(options, pool, console, sizes=SMALL)
    text = console.export_text()
    assert "Memory+, 1 layer" in text
    assert "exact match" in text
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["facts"]["memory+1"]["runs"]) == 2
    assert list(figures["scaling"]) == ["1024"]
    written = (tmp_path / "comparison.md").read_text()
    assert "| Memory+, 1 layer |" in written
    assert "| 1,024 |" in written
    options.parts, options.models = "facts,scaling", "dense"  # other models' figures stay
    compare_models.compare(options, pool, console, sizes=SMALL)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert (tmp_path / "comparison.md").read_text() == written
    options.models = "dense,memory+1"
    options.parts = "facts,scaling"
    runs = sorted(tmp_path.rglob("seed-*.json"))
    runs[0].unlink()
    again = Console(record=True, width=200)
    compare_models.compare(options, pool, again, sizes=SMALL)
    assert again.export_text().count(" ...") == 1  # what is missing, alone
    options.epochs = 3
    with pytest.raises(StudyError, match=r"epochs = 2 \(now 3\).*another --out"):
        compare_models.compare(options, pool, console, sizes=SMALL)


def test_what_the_command_cannot_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--parts", "speed"], "part 'speed' is none of facts, language"),
        (["--models", "lstm"], "model 'lstm' is none of dense"),
        (["--parts", "language", "--text", str(tmp_path / "none.txt")], "cannot be read"),
    ):
        assert compare_models.main([*arguments, "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a line\n" * 5)
    with pytest.raises(TextError, match="has 5 lines"):
        read_text(path)
    with pytest.raises(TextError, match="too short for windows of 64"):
        LanguageTask(["a b c"] * 30, SMALL)


def test_climbing_finds_the_best_rate_and_stops() -> None:
    tried: list[float] = []

    def worth(rate: float) -> float:
        tried.append(rate)
        return -abs(rate - 4e-3)

    assert climb(1e-3, 2.0, worth) == 4e-3
    assert len(tried) == len(set(tried)) <= 7
    rates = tuned(True, lambda each: -abs(each.lr - 5e-4) - abs(each.table_lr - 0.9))
    assert (rates.lr, rates.table_lr) == (5e-4, 0.9)
    assert climb(1.0, 2.0, lambda _: float("nan")) == 1.0


def test_runs_that_ended_are_read_and_others_carried_out(tmp_path: Path) -> None:
    study = Study(tmp_path, {"facts": 5}, say=lambda _: None)
    found = {"perplexity": 3.0, "train_s": 1.0}
    assert study.run("one/two", lambda: found) == study.run("one/two", lambda: {}) == found
    assert study.done == 1
    with pytest.raises(StudyError, match="none of a, b"):
        chosen("a,c", ["a", "b"], what="part")
    assert chosen("b,a", ["a", "b"], what="part") == ["a", "b"]


def test_a_file_that_was_changed_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("one")
    before = with_contents(path)
    path.write_text("two")
    assert with_contents(path) != before
    path.write_text("one")
    assert with_contents(path) == before


def test_f1_is_of_words() -> None:
    assert token_f1("new york", "york") == pytest.approx(2 / 3)
    assert token_f1("", "york") == token_f1("x", "york") == 0.0
    assert token_f1("a a", "a") == pytest.approx(2 / 3)
