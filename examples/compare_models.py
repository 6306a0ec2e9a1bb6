"""The papers' comparison, on facts and text of yours: models of equal FLOPs that differ in their blocks.

    python examples/compare_models.py                          # hours on two cores; stop it, and it goes on
    python examples/compare_models.py --parts facts --facts 5000 --seeds 1
    python examples/compare_models.py --parts language --text book.txt
    python examples/compare_models.py --parts scaling --largest 20      # exact match against 2^10 to 2^20 slots
    python examples/compare_models.py --parts options          # what each option of a memory layer does

Models: dense, a mixture of experts, PEER, Memory, Memory+ (one and three layers of one table), n-grams. Each is as wide
as one budget of FLOPs a token allows, learns the same examples in the same order, and has the learning rates that a
small search found for it (on a seed and a part of the text that no figure is of).

Read the parts in this order: comparison/blocks, training, facts_task, language_task, study, report; then this.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import mempool
from comparison import report
from comparison.blocks import BALANCE, KINDS, WITH_TABLES, Sizes
from comparison.facts_task import FactsTask, Setup
from comparison.language_task import LanguageTask, TextError, read_text
from comparison.study import Rates, Study, StudyError, chosen, settings_of, slug, tuned, with_contents
from facts.data import FactBook, build_facts
from facts.facts_file import FactsFileError, read_facts
from mempool.errors import MempoolError

PARTS = ("facts", "language", "scaling", "options")
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "query_norm=False": {"query_norm": False},
    'query_norm="layer"': {"query_norm": "layer"},
    'query_norm="rms"': {"query_norm": "rms"},
    "qk_norm=True, query_norm=False": {"qk_norm": True, "query_norm": False},
    "query_dropout=0.1": {"query_dropout": 0.1},
    "value_dropout=0.1": {"value_dropout": 0.1},
    "input_dropout=0.1": {"input_dropout": 0.1},
    "key_dropout=0.1": {"key_dropout": 0.1},
    "sample_from=4 * topk": {"sample_from": "4 * topk"},
    "random_slots=4": {"random_slots": 4},
    "sink=True": {"sink": True},
    "balance_loss": {"balance": BALANCE},
    "values' rate stays (no ValueLR)": {"lower_values": False},
    "mem_gated=True": {"mem_gated": True},
    "query_bias=False": {"query_bias": False},
}
"""What is changed of a memory layer, one at a time."""
_TUNING_SEED = 1000
_SMALLEST = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; answers the exit code: 0 ok, 1 failed, 130 interrupted (argparse ends with 2)."""
    options = _parser().parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        with mempool.local(shards=2) if options.address is None else mempool.connect(options.address) as pool:
            compare(options, pool, console)
    except (FactsFileError, MempoolError, StudyError, TextError) as error:
        print(f"compare_models: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"compare_models: interrupted; the same command goes on with what is in {options.out}", file=sys.stderr)
        return 130
    return 0


def compare(options: argparse.Namespace, pool: mempool.Pool, console: Console, *, sizes: Sizes | None = None) -> None:
    """All parts that were asked for; each is printed as it ends, and all figures are in `figures.json`."""
    sizes = sizes or Sizes()
    parts = chosen(options.parts, PARTS, what="part")
    kinds = chosen(options.models, KINDS, what="model")
    path = options.out / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}  # other parts stay
    of = figures.setdefault("of", {})

    def show(part: str) -> None:
        console.print(report.sheets(figures)[part].shown())
        report.write(figures, options.out)

    if set(parts) - {"language"}:
        book = build_facts(options.facts, seed=0) if options.facts_file is None else read_facts(options.facts_file)
        comparison = FactsComparison(book, options, pool, console, sizes)
        of["facts"] = len(book.facts)
        if "facts" in parts:
            figures["facts"] = _with(figures.get("facts", {}), comparison.models(kinds))
            show("facts")
        if "scaling" in parts:
            figures["scaling"] = comparison.scaling(options.largest)
            show("scaling")
            report.plot_scaling(figures["scaling"], options.out / "scaling.png", console=console)
        if "options" in parts:
            figures["options"] = comparison.options()
            show("options")
    if "language" in parts:
        found, of["words"] = compare_language(kinds, options, pool, console, sizes)
        figures["language"] = _with(figures.get("language", {}), found)
        show("language")
    console.print(f"all figures: {path}")


def _with(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """All kinds that there are figures of: other models' stay."""
    every = {**before, **found}
    return {kind: every[kind] for kind in KINDS if kind in every}


class FactsComparison:
    """What is asked of facts."""

    def __init__(
        self, book: FactBook, options: argparse.Namespace, pool: mempool.Pool, console: Console, sizes: Sizes
    ) -> None:
        self._task = FactsTask(book, sizes)
        self._options, self._pool, self._sizes = options, pool, sizes
        source = "built in" if options.facts_file is None else with_contents(options.facts_file)
        settings = settings_of(sizes=sizes, facts=len(book.facts), source=source, epochs=options.epochs)
        self._study = Study(options.out / "facts", settings, say=console.print)
        self._metric = "exact_match_unseen" if book.has_unseen else "exact_match_trained"

    def models(self, kinds: list[str]) -> dict[str, Any]:
        """Each kind, over seeds."""
        runs, rates = {}, {}
        for kind in kinds:
            rates[kind] = self._rates(kind)
            runs[kind] = self._seeds(f"{kind}/seed-{{seed}}", Setup(kind, 0, rates[kind].lr, rates[kind].table_lr))
        return {kind: {"rates": settings_of(rates=rates[kind])["rates"], "runs": runs[kind]} for kind in kinds}

    def scaling(self, largest: int) -> dict[str, Any]:
        """One memory layer of 2^10 slots, and of 4 times as many, and so on."""
        rates = self._rates("memory+1")
        curve = {}
        for power in range(_SMALLEST, largest + 1, 2):
            sizes = replace(self._sizes, slots=2**power)
            setup = Setup("memory+1", 0, rates.lr, rates.table_lr)
            curve[2**power] = self._seeds(f"scaling/{2**power}-seed-{{seed}}", setup, sizes=sizes)
        return {str(slots): found for slots, found in curve.items()}

    def options(self) -> dict[str, Any]:
        """One memory layer, with one option changed at a time."""
        rates, runs = self._rates("memory+1"), {}
        for name, changed in OPTIONS.items():
            given = dict(changed)
            if given.get("sample_from"):
                given["sample_from"] = 4 * self._sizes.topk
            balance, lower_values = given.pop("balance", 0.0), given.pop("lower_values", True)
            setup = Setup(
                "memory+1",
                0,
                rates.lr,
                rates.table_lr,
                options=tuple(given.items()),
                balance=balance,
                lower_values=lower_values,
            )
            runs[name] = self._seeds(f"options/{slug(name)}-seed-{{seed}}", setup)
        return runs

    def _seeds(self, name: str, setup: Setup, *, sizes: Sizes | None = None) -> list[dict[str, Any]]:
        found = []
        for seed in range(self._options.seeds):
            one = replace(setup, seed=seed, epochs=self._options.epochs)
            path = f"{name.format(seed=seed)}-{_at(setup)}"
            found.append(self._study.run(path, partial(self._task.run, one, self._pool, sizes=sizes)))
        return found

    def _rates(self, kind: str) -> Rates:
        epochs = self._options.epochs
        tuning = None if epochs is None else math.ceil(epochs / 2)

        def worth(rates: Rates) -> float:
            setup = Setup(kind, _TUNING_SEED, rates.lr, rates.table_lr, epochs=tuning or 7)
            found = self._study.run(f"{kind}/tuning-{_at(setup)}", lambda: self._task.run(setup, self._pool))
            return float(found[self._metric])

        return tuned(kind in WITH_TABLES, worth)


def _at(setup: Setup) -> str:
    """Its rates, for a file's name: a search that comes out otherwise makes other runs."""
    return f"{setup.lr:g}-{setup.table_lr:g}"


def compare_language(
    kinds: list[str], options: argparse.Namespace, pool: mempool.Pool, console: Console, sizes: Sizes
) -> tuple[dict[str, Any], int]:
    """Each kind as a language model, over seeds; and how many words there are."""
    task = LanguageTask(read_text(options.text), replace(sizes, dim=sizes.dim // 2, key_dim=sizes.key_dim // 2))
    source = "WordNet" if options.text is None else with_contents(options.text)
    words = sum(len(stream) for stream in task.tokens.values())
    batches = {"vocabulary": task.vocabulary, "context": task.context, "batch": task.batch}
    settings = settings_of(sizes=task.sizes, text=source, words=words, steps=options.steps, **batches)
    study = Study(options.out / "language", settings, say=console.print)
    runs: dict[str, list[dict[str, Any]]] = {}
    rates: dict[str, Rates] = {}
    for kind in kinds:
        rates[kind] = tuned(kind in WITH_TABLES, _perplexity_of(kind, task, study, pool, max(1, options.steps // 4)))
        runs[kind] = []
        for seed in range(options.seeds):
            setup = Setup(kind, seed, rates[kind].lr, rates[kind].table_lr)
            path = f"{kind}/seed-{seed}-{_at(setup)}"
            runs[kind].append(study.run(path, partial(task.run, setup, pool, steps=options.steps)))
    return {kind: {"rates": settings_of(rates=rates[kind])["rates"], "runs": runs[kind]} for kind in kinds}, words


def _perplexity_of(
    kind: str, task: LanguageTask, study: Study, pool: mempool.Pool, steps: int
) -> Callable[[Rates], float]:
    def worth(rates: Rates) -> float:
        setup = Setup(kind, _TUNING_SEED, rates.lr, rates.table_lr)
        found = study.run(
            f"{kind}/tuning-{_at(setup)}",
            lambda: task.run(setup, pool, steps=steps, split="tuning"),
        )
        return -float(found["perplexity"])

    return worth


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_models", description="Models of equal FLOPs that differ in their blocks, on facts and on text."
    )
    parser.add_argument("--parts", default="facts,scaling,language", help=f"of {', '.join(PARTS)}, or all")
    parser.add_argument("--models", default="all", help=f"of {', '.join(KINDS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("out/comparison"), metavar="PLACE", help="runs, figures, curve"
    )
    parser.add_argument("--seeds", type=_positive, default=3, help="runs of each model")
    parser.add_argument("--facts", type=_positive, default=20_000, help="of the built-in facts, how many at most")
    parser.add_argument("--facts-file", type=Path, metavar="FILE", help="your own: JSON lines, `question` and `answer`")
    parser.add_argument("--epochs", type=_positive, help="times each fact is asked (14, or more where facts are few)")
    parser.add_argument(
        "--largest", type=int, default=18, choices=range(_SMALLEST, 25, 2), help="of the curve: 2^N slots"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="your own text, a passage a line; else WordNet's glosses"
    )
    parser.add_argument("--steps", type=_positive, default=1000, help="of the language model")
    parser.add_argument("--address", metavar="HOST:PORT", help="a running pool; without it, one in this process")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
