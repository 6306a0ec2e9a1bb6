"""Bars of a result file, a panel for each piece of work: the median of each contender, and its tail."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OWN, _OTHER, _FLOOR = "#0b6e4f", "#30638e", "#bbbbbb"
_INCHES_A_BAR = 0.32


def bars(found: dict[str, Any], panels: Sequence[tuple[str, dict[str, Any]]], what: str, path: Path) -> None:
    """Draw a PNG; nothing where there are no panels.

    Args:
        found: A result file, for the machine.
        panels: Title, and figures by contender as ``Times.figures`` has them.
        what: Is timed: "a look-up".
        path: The PNG.
    """
    if not panels:
        return
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    num_bars = max(len(contenders) for _, contenders in panels)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.0 * len(panels), _INCHES_A_BAR * num_bars + 1.2), squeeze=False
    )
    for axis, (title, contenders) in zip(axes[0], panels, strict=True):
        names = list(contenders)[::-1]
        medians = [contenders[name]["median_ms"] for name in names]
        tails = [contenders[name]["p95_ms"] for name in names]
        colours = [_OWN if name.startswith("mempool") else _FLOOR if "echo" in name else _OTHER for name in names]
        axis.barh(range(len(names)), medians, color=colours, height=0.7)
        axis.plot(tails, range(len(names)), "k|", markersize=8)
        axis.set_xlim(0, 2 * max(medians))  # a tail may lie far out, and bars shall be told apart
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"ms {what}: median (bar), p95 (line)", fontsize=8)
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
