import dataclasses
from collections import Counter

import pytest
from rich.console import Console

from facts.flops import Flops
from facts.report import ModelReport, PoolReport, Report, print_report
from facts.train import Score

POOL = PoolReport(
    name="p",
    num_slots=9,
    value_dim=2,
    shards_before=2,
    shards_after=4,
    lookups=10,
    lookups_per_s=5.0,
    read_lookups=4,
    read_lookups_per_s=2.0,
    updates_committed=7,
    updates_applied={0: 7, 1: 7},
    rescale=None,
)


def model(trained: int, unseen: int | None) -> ModelReport:
    def score(right: int) -> Score:
        return Score(right=Counter(a=right), asked=Counter(a=10))

    return ModelReport(
        trained=score(trained),
        unseen=None if unseen is None else score(unseen),
        learning_rate=0.1,
        trainer_parameters=1,
        pool_parameters=2,
        layer_flops=Flops(3, 4),
        flops=Flops(30, 40),
        train_s=1.0,
    )


def report(memory: ModelReport, dense: ModelReport, pool: PoolReport = POOL) -> Report:
    return Report(
        facts=10,
        source="s",
        examples=20,
        epochs=2,
        seed=0,
        seconds=3.0,
        spent_s={"training": 2.0},
        memory=memory,
        dense=dense,
        pool=pool,
    )


def test_the_headline_is_unseen_phrasings_where_there_are_any() -> None:
    both = report(model(9, 6), model(4, 2))
    assert both.ratio == pytest.approx(3.0)
    assert both.as_json()["headline"] == "unseen phrasings"
    assert both.as_json()["memory"]["exact_match"] == 0.6
    assert both.as_json()["memory"]["exact_match_trained_phrasings"] == 0.9
    own = report(model(9, None), model(3, None))
    assert own.ratio == pytest.approx(3.0)
    assert own.as_json()["headline"] == "trained phrasings"


def test_there_is_no_ratio_to_nothing() -> None:
    assert report(model(9, 6), model(4, 0)).ratio is None


@pytest.mark.parametrize(
    ("applied", "right"), [({0: 7, 1: 7}, True), ({0: 7, 1: 6}, False), ({0: 8}, False), ({}, False)]
)
def test_every_shard_must_have_applied_each_update_once(applied: dict[int, int], right: bool) -> None:
    assert dataclasses.replace(POOL, updates_applied=applied).all_applied is right


def test_the_tables_show_both_models_and_what_was_applied() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        print_report(report(model(9, 6), model(4, 2)), console=console)
    printed = captured.get()
    for text in ("60.0 %", "20.0 %", "90.0 %", "40.0 %", "3.0x", "7 = 7", "2 -> 4"):
        assert text in printed
