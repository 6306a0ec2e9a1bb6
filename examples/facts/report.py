"""The closing table and its JSON file: what both models know after equal examples, and what the pool did for one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from facts.flops import Flops
from facts.rescale import RescaleReport
from facts.train import Score
from facts.usage import UsageReport


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One of the two models at the end.

    Attributes:
        trained: facts asked in trained phrasings.
        unseen: facts asked in phrasings never seen; None where the facts have none.
        learning_rate: of its dense parts.
        trainer_parameters: parameters in the trainer's process.
        pool_parameters: parameters in the pool.
        layer_flops: FLOPs per question, forward, of the layer that the twins differ in.
        flops: FLOPs per question, forward, of the whole model.
        train_s: seconds spent in its training steps.
    """

    trained: Score
    unseen: Score | None
    learning_rate: float
    trainer_parameters: int
    pool_parameters: int
    layer_flops: Flops
    flops: Flops
    train_s: float

    @property
    def headline(self) -> float:
        """Exact match over all facts: in unseen phrasings where there are any, else in trained ones."""
        return (self.unseen or self.trained).exact_match

    def as_json(self) -> dict[str, Any]:
        """All of it, in plain values."""
        return {
            "exact_match": self.headline,
            "exact_match_trained_phrasings": self.trained.exact_match,
            "exact_match_unseen_phrasings": None if self.unseen is None else self.unseen.exact_match,
            "by_relation_trained_phrasings": self.trained.by_relation(),
            "by_relation_unseen_phrasings": None if self.unseen is None else self.unseen.by_relation(),
            "learning_rate": self.learning_rate,
            "parameters_in_trainer": self.trainer_parameters,
            "parameters_in_pool": self.pool_parameters,
            "layer_flops_per_example": self.layer_flops.total,
            "flops_per_example": self.flops.total,
            "train_s": self.train_s,
        }


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What the pool did.

    Attributes:
        name: of the pool.
        num_slots: slots of the table.
        value_dim: width of a value.
        shards_before: shards at the start.
        shards_after: shards at the end.
        lookups: questions looked up in training.
        lookups_per_s: of training, of its forward, backward and commit together, while the dense twin rests.
        read_lookups: questions looked up in the evaluation.
        read_lookups_per_s: of the evaluation: encoding, lookup and spelling together.
        updates_committed: updates whose commit was acknowledged to this trainer.
        updates_applied: updates that the pool says it applied meanwhile, by shard.
        rescale: what the live rescale did; None if there was none.
        in_use: how slots were used; None of a table that does not count it.
    """

    name: str
    num_slots: int
    value_dim: int
    shards_before: int
    shards_after: int
    lookups: int
    lookups_per_s: float
    read_lookups: int
    read_lookups_per_s: float
    updates_committed: int
    updates_applied: dict[int, int]
    rescale: RescaleReport | None
    in_use: UsageReport | None = None

    @property
    def all_applied(self) -> bool:
        """Whether every shard applied each committed update once."""
        return bool(self.updates_applied) and set(self.updates_applied.values()) == {self.updates_committed}


@dataclass(frozen=True, slots=True)
class Report:
    """The whole run.

    Attributes:
        facts: how many were learned.
        source: where they come from.
        examples: questions that each model was trained on.
        epochs: times each fact was asked.
        seed: of the run.
        seconds: wall time from building the facts to the last answer.
        spent_s: where it went.
        memory: the model whose memory lives in the pool.
        dense: its dense twin.
        pool: the pool.
    """

    facts: int
    source: str
    examples: int
    epochs: int
    seed: int
    seconds: float
    spent_s: dict[str, float]
    memory: ModelReport
    dense: ModelReport
    pool: PoolReport

    @property
    def ratio(self) -> float | None:
        """The memory's headline over the dense twin's; None where the twin has nothing right."""
        return self.memory.headline / self.dense.headline if self.dense.headline else None

    def as_json(self) -> dict[str, Any]:
        """All of it, in plain values, keys as in the table."""
        pool = dataclasses.asdict(self.pool)
        pool["updates_applied"] = {str(shard): applied for shard, applied in self.pool.updates_applied.items()}
        return {
            "facts": self.facts,
            "source": self.source,
            "examples_per_model": self.examples,
            "epochs": self.epochs,
            "seed": self.seed,
            "seconds": self.seconds,
            "spent_s": self.spent_s,
            "headline": "unseen phrasings" if self.memory.unseen else "trained phrasings",
            "ratio": self.ratio,
            "memory": self.memory.as_json(),
            "dense": self.dense.as_json(),
            "pool": {**pool, "all_applied": self.pool.all_applied},
        }


def write_json(report: Report, *, path: Path) -> None:
    """Writes the report, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")


def print_report(report: Report, *, console: Console) -> None:
    """Prints what both models know, and below it what the pool did."""
    console.print(_models_table(report))
    console.print(_pool_table(report))


def _models_table(report: Report) -> Table:
    memory, dense = report.memory, report.dense
    table = Table(title=f"{report.facts:,} facts, {report.examples:,} questions to each model in the same order")
    table.add_column("exact match")
    table.add_column("memory in the pool", justify="right")
    table.add_column("dense twin", justify="right")
    if memory.unseen is not None and dense.unseen is not None:
        table.add_row("all facts, unseen phrasings", _percent(memory.headline), _percent(dense.headline), style="bold")
    table.add_row("all facts, trained phrasings", *(_percent(each.trained.exact_match) for each in (memory, dense)))
    table.add_section()
    memory_by, dense_by = ((each.unseen or each.trained).by_relation() for each in (memory, dense))
    if len(memory_by) > 1:
        for relation, asked in sorted(memory.trained.asked.items(), key=lambda item: -item[1]):
            name = f"  {relation.replace('_', ' -> ')} ({asked:,})"
            table.add_row(name, _percent(memory_by[relation]), _percent(dense_by[relation]))
        table.add_section()
    for name, values in (
        ("parameters in the trainer", (f"{each.trainer_parameters:,}" for each in (memory, dense))),
        ("parameters in the pool", (f"{each.pool_parameters:,}" for each in (memory, dense))),
        ("FLOPs per question, forward", (f"{each.flops.total:,}" for each in (memory, dense))),
        ("  of the layer that differs", (f"{each.layer_flops.total:,}" for each in (memory, dense))),
        ("learning rate (Adam)", (f"{each.learning_rate:g}" for each in (memory, dense))),
        ("training, seconds", (f"{each.train_s:.0f}" for each in (memory, dense))),
    ):
        table.add_row(name, *values)
    if report.ratio is not None:
        table.caption = f"the memory has {report.ratio:.1f}x the dense twin's exact match"
    return table


def _pool_table(report: Report) -> Table:
    pool = report.pool
    table = Table(title=f"pool {pool.name!r}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("slots x value width", f"{pool.num_slots:,} x {pool.value_dim}")
    table.add_row("shards before -> after", f"{pool.shards_before} -> {pool.shards_after}")
    table.add_row(
        "lookups in training", f"{pool.lookups:,} ({pool.lookups_per_s:,.0f}/s, backward and commit included)"
    )
    table.add_row("lookups in evaluation", f"{pool.read_lookups:,} ({pool.read_lookups_per_s:,.0f}/s)")
    applied = sorted(set(pool.updates_applied.values()))
    table.add_row(
        "updates committed = applied",
        f"{pool.updates_committed:,} = {' / '.join(f'{each:,}' for each in applied) or 'unknown'}",
        style="green" if pool.all_applied else "bold red",
    )
    if pool.rescale is not None:
        live = pool.rescale
        table.add_row("live rescale", f"{live.seconds:.1f} s, {live.steps_during} training steps meanwhile")
        table.add_row(
            "longest step meanwhile", f"{live.longest_step_s * 1000:.0f} ms (usual {live.usual_step_s * 1000:.0f} ms)"
        )
    if pool.in_use is not None:
        for name, value in _usage_rows(pool.in_use):
            table.add_row(name, value)
    table.add_row("whole run, seconds", f"{report.seconds:.0f}")
    return table


def _usage_rows(in_use: UsageReport) -> Iterator[tuple[str, str]]:
    if in_use.coverage_half_way is not None:
        yield "slots used, half way", _percent(in_use.coverage_half_way)
        yield "  dead then, begun anew", f"{in_use.begun_anew:,}"
    if in_use.revived is not None:
        yield "  dead then, used since", _percent(in_use.revived)
    yield "slots used, in the end", _percent(in_use.coverage)
    if in_use.kl_uniform is not None:
        yield "uses, KL to uniform", f"{in_use.kl_uniform:.2f} nats"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
