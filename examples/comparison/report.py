"""The tables and curves of a comparison."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comparison.study import spread

Runs = Sequence[dict[str, Any]]
_NAMES = {
    "dense": "dense",
    "moe": "mixture of experts, 2 a token",
    "peer": "PEER",
    "memory": "Memory",
    "memory+1": "Memory+, 1 layer",
    "memory+3": "Memory+, 3 layers of one table",
    "ngram": "n-grams",
}


@dataclass(frozen=True)
class Sheet:
    """A table, to be shown or written; the first column's cells are names."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def shown(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title)
        for number, name in enumerate(self.columns):
            table.add_column(name, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def written(self) -> str:
        """As Markdown."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return f"{self.title[:1].upper()}{self.title[1:]}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in lines)


def sheets(figures: Mapping[str, Any]) -> dict[str, Sheet]:
    """Of all parts that there are figures of, by their names."""
    made = {"facts": _facts, "language": _language, "scaling": _scaling, "options": _options}
    return {part: make(figures[part], figures["of"]) for part, make in made.items() if part in figures}


def _facts(kinds: Mapping[str, Any], of: Mapping[str, int]) -> Sheet:
    columns = (
        "model",
        "exact match",
        "token F1",
        "trained phrasings",
        "FLOPs a question",
        "parameters",
        "in the pool",
        "slots used",
        "rates: Adam, values",
        "training",
    )
    rows = []
    for kind, each in kinds.items():
        found = each["runs"]
        rows.append(
            (
                _NAMES[kind],
                _percents(spread(found, f"exact_match_{_asked(found)}")),
                f"{spread(found, f'f1_{_asked(found)}')[0]:.1%}",
                f"{spread(found, 'exact_match_trained')[0]:.1%}",
                *_sizes(found),
                f"{spread(found, 'coverage')[0]:.1%}" if "coverage" in found[0] else "",
                _rates(each),
                _seconds(found),
            )
        )
    title = f"{of['facts']:,} facts, asked in phrasings that training never showed; mean of seeds (least to most)"
    return Sheet(title, columns, rows)


def _language(kinds: Mapping[str, Any], of: Mapping[str, int]) -> Sheet:
    columns = ("model", "perplexity", "FLOPs a word", "parameters", "in the pool", "rates: Adam, values", "training")
    rows = []
    for kind, each in kinds.items():
        found = each["runs"]
        mean, least, most = spread(found, "perplexity")
        seen = f"{mean:.2f} ({least:.2f} to {most:.2f})" if len(found) > 1 else f"{mean:.2f}"
        rows.append((_NAMES[kind], seen, *_sizes(found), _rates(each), _seconds(found)))
    some = next(iter(kinds.values()))["runs"][0]["tokens"]
    title = f"a language model that read {some:,} of {of['words']:,} words; mean of seeds (least to most)"
    return Sheet(title, columns, rows)


def _options(options: Mapping[str, Runs], _: Mapping[str, int]) -> Sheet:
    columns = ("option", "exact match", "trained phrasings", "slots used", "KL to equal use", "training")
    rows = [
        (
            f"`{name}`",
            _percents(spread(found, f"exact_match_{_asked(found)}")),
            f"{spread(found, 'exact_match_trained')[0]:.1%}",
            f"{spread(found, 'coverage')[0]:.1%}",
            f"{spread(found, 'kl_to_uniform')[0]:.2f}",
            _seconds(found),
        )
        for name, found in options.items()
    ]
    return Sheet("one Memory+ layer with one option more, or less; mean of seeds (least to most)", columns, rows)


def _scaling(curve: Mapping[str, Runs], _: Mapping[str, int]) -> Sheet:
    columns = ("slots", "exact match", "trained phrasings", "slots used", "FLOPs a question")
    rows = [
        (
            f"{int(slots):,}",
            _percents(spread(found, f"exact_match_{_asked(found)}")),
            f"{spread(found, 'exact_match_trained')[0]:.1%}",
            f"{spread(found, 'coverage')[0]:.1%}",
            f"{found[0]['flops']:,.0f}",
        )
        for slots, found in curve.items()
    ]
    return Sheet("one Memory+ layer of more and more slots; mean of seeds (least to most)", columns, rows)


def plot_scaling(curve: Mapping[str, Runs], path: Path, *, console: Console) -> None:
    """A PNG of exact match against slots, where matplotlib is installed; else it says what to install."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install 'mempool[bench]')")
        return
    figure, axes = pyplot.subplots(figsize=(6.0, 4.0))
    slots = [int(each) for each in curve]
    for name in ("unseen", "trained"):
        if all(f"exact_match_{name}" in found[0] for found in curve.values()):
            means, least, most = zip(*(spread(found, f"exact_match_{name}") for found in curve.values()), strict=True)
            axes.plot(slots, [100.0 * each for each in means], marker="o", label=f"{name} phrasings")
            axes.fill_between(slots, [100.0 * each for each in least], [100.0 * each for each in most], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("slots")
    axes.set_ylabel("exact match, %")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    console.print(f"drawn: {path}")


def write(figures: dict[str, Any], folder: Path) -> None:
    """All figures, plain, and all tables as Markdown."""
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    tables = "\n".join(sheet.written() for sheet in sheets(figures).values())
    (folder / "comparison.md").write_text(tables, encoding="utf-8")


def _asked(found: Runs) -> str:
    """Which phrasings the facts are asked in."""
    return "unseen" if "exact_match_unseen" in found[0] else "trained"


def _percents(of: tuple[float, float, float]) -> str:
    mean, least, most = of
    return f"{mean:.1%} ({least:.1%} to {most:.1%})" if least < most else f"{mean:.1%}"


def _sizes(found: Runs) -> tuple[str, str, str]:
    flops, parameters, pool = (found[0][name] / 1e6 for name in ("flops", "parameters", "pool_parameters"))
    return f"{flops:.2f} M", f"{parameters:.2f} M", f"{pool:.1f} M" if pool else ""


def _rates(kind: Mapping[str, Any]) -> str:
    lr, table_lr = f"{kind['rates']['lr']:g}", f"{kind['rates']['table_lr']:g}"
    return f"{lr}, {table_lr}" if kind["runs"][0]["pool_parameters"] else lr


def _seconds(found: Runs) -> str:
    return f"{spread(found, 'train_s')[0]:.0f} s"
