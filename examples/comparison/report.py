"""The tables and curves of a comparison."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comparison.study import Rates, spread

Runs = Mapping[str, Sequence[dict[str, Any]]]


def facts_table(runs: Runs, rates: Mapping[str, Rates], *, facts: int) -> Table:
    """Of each kind its runs over seeds."""
    table = Table(
        title=f"{facts:,} facts, asked in phrasings that training never showed; mean of seeds (least to most)"
    )
    for name in (
        "model",
        "exact match",
        "token F1",
        "trained phrasings",
        "FLOPs a question",
        "parameters",
        "in the pool",
    ):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_column("slots used", justify="right")
    table.add_column("rates", justify="right")
    table.add_column("training", justify="right")
    for kind, found in runs.items():
        unseen = "unseen" if "exact_match_unseen" in found[0] else "trained"
        table.add_row(
            kind,
            _percents(spread(found, f"exact_match_{unseen}")),
            f"{spread(found, f'f1_{unseen}')[0]:.1%}",
            f"{spread(found, 'exact_match_trained')[0]:.1%}",
            *_sizes(found),
            f"{spread(found, 'coverage')[0]:.1%}" if "coverage" in found[0] else "",
            _rates(rates[kind]),
            f"{spread(found, 'train_s')[0]:.0f} s",
        )
    return table


def language_table(runs: Runs, rates: Mapping[str, Rates], *, tokens: int) -> Table:
    """Of each kind its runs over seeds."""
    table = Table(title=f"a language model, {tokens:,} words of text; mean of seeds (least to most)")
    for name in ("model", "perplexity", "FLOPs a word", "parameters", "in the pool", "rates", "training"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for kind, found in runs.items():
        mean, least, most = spread(found, "perplexity")
        table.add_row(
            kind,
            f"{mean:.2f} ({least:.2f} to {most:.2f})",
            *_sizes(found),
            _rates(rates[kind]),
            f"{spread(found, 'train_s')[0]:.0f} s",
        )
    return table


def options_table(runs: Runs) -> Table:
    """What each option does to one memory."""
    table = Table(title="one memory layer with one option more, or less; mean of seeds (least to most)")
    for name in ("option", "exact match", "trained phrasings", "slots used", "KL to equal use", "training"):
        table.add_column(name, justify="left" if name == "option" else "right")
    for name, found in runs.items():
        unseen = "unseen" if "exact_match_unseen" in found[0] else "trained"
        table.add_row(
            name,
            _percents(spread(found, f"exact_match_{unseen}")),
            f"{spread(found, 'exact_match_trained')[0]:.1%}",
            f"{spread(found, 'coverage')[0]:.1%}",
            f"{spread(found, 'kl_to_uniform')[0]:.2f}",
            f"{spread(found, 'train_s')[0]:.0f} s",
        )
    return table


def scaling_table(curve: Mapping[int, Sequence[dict[str, Any]]]) -> Table:
    """Exact match against slots."""
    table = Table(title="a memory layer of more and more slots; mean of seeds (least to most)")
    for name in ("slots", "exact match", "trained phrasings", "slots used", "FLOPs a question"):
        table.add_column(name, justify="right")
    for slots, found in curve.items():
        unseen = "unseen" if "exact_match_unseen" in found[0] else "trained"
        table.add_row(
            f"{slots:,}",
            _percents(spread(found, f"exact_match_{unseen}")),
            f"{spread(found, 'exact_match_trained')[0]:.1%}",
            f"{spread(found, 'coverage')[0]:.1%}",
            f"{found[0]['flops']:,.0f}",
        )
    return table


def plot_scaling(curve: Mapping[int, Sequence[dict[str, Any]]], path: Path, *, console: Console) -> None:
    """A PNG of exact match against slots, where matplotlib is installed; else it says what to install."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install 'mempool[bench]')")
        return
    figure, axes = pyplot.subplots(figsize=(6.0, 4.0))
    for name in ("unseen", "trained"):
        if all(f"exact_match_{name}" in found[0] for found in curve.values()):
            means, least, most = zip(*(spread(found, f"exact_match_{name}") for found in curve.values()), strict=True)
            axes.plot(list(curve), [100.0 * each for each in means], marker="o", label=f"{name} phrasings")
            axes.fill_between(list(curve), [100.0 * each for each in least], [100.0 * each for each in most], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("slots")
    axes.set_ylabel("exact match, %")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    console.print(f"drawn: {path}")


def write_json(found: dict[str, Any], path: Path) -> None:
    """All figures, plain."""
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _percents(of: tuple[float, float, float]) -> str:
    mean, least, most = of
    return f"{mean:.1%} ({least:.1%} to {most:.1%})"


def _sizes(found: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    first = found[0]
    return f"{first['flops']:,.0f}", f"{first['parameters']:,}", f"{first['pool_parameters']:,}"


def _rates(rates: Rates) -> str:
    return f"{rates.lr:g}, {rates.table_lr:g}"
