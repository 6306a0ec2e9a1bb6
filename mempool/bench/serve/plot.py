"""Bars of a result file of `bench serve`: the median of a look-up of each contender, a panel for each shape."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_OWN, _OTHER, _FLOOR = "#0b6e4f", "#30638e", "#bbbbbb"
_INCHES_A_BAR = 0.32


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw a result file as PNG; nothing where no look-up was timed.

    Args:
        found: As report.document makes it.
        path: The PNG.
    """
    shapes = found["lookups"]
    if not shapes:
        return
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    num_bars = max(len(shape["contenders"]) for shape in shapes)
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(5.0 * len(shapes), _INCHES_A_BAR * num_bars + 1.2), squeeze=False
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        names = list(shape["contenders"])[::-1]
        medians = [shape["contenders"][name]["median_ms"] for name in names]
        tails = [shape["contenders"][name]["p95_ms"] for name in names]
        colours = [_OWN if name.startswith("mempool") else _FLOOR if "echo" in name else _OTHER for name in names]
        axis.barh(range(len(names)), medians, color=colours, height=0.7)
        axis.plot(tails, range(len(names)), "k|", markersize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{shape['bags']} bags x {shape['pairs']}", fontsize=9)
        axis.set_xlabel("ms a look-up: median (bar), p95 (line)", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.5)
        axis.set_axisbelow(True)
    here = found["machine"]
    figure.suptitle(f"{here['model']}, {here['cores']} cores", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version in the file: the same figures make the same bytes.
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
