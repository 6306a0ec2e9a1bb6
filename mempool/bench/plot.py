"""The roofline of a result file: shares of the copy's bandwidth, and of the square product for cases of keys."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from mempool.bench.cases.bags import OWN_FLOAT32

_COLOURS = (
    "#0b6e4f",
    "#d1495b",
    "#edae49",
    "#30638e",
    "#8d6a9f",
    "#66a182",
    "#c77dff",
    "#3a86ff",
    "#6c584c",
    "#ff7f51",
)
#: Reads more than the bytes of the case it stands beside: its share would mislead.
_OTHER_ROWS = OWN_FLOAT32
_INCHES_A_LINE = 0.2
_LEGEND_COLUMNS = 4
_PANELS = (
    ("share_of_copy", "unavoidable bytes a second, share of the same run's copy"),
    ("share_of_matmul", "operations a second, share of the same run's square product"),
)


def can_plot() -> bool:
    """Whether matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw a result file as PNG: a line for each case, a dot for each contender, the ceiling at 100 %.

    Args:
        found: As report.document makes it.
        path: The PNG.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    panels = [
        (share, label, [case for case in found["cases"] if case["contenders"]["mempool"][share] is not None])
        for share, label in _PANELS
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    names = list(dict.fromkeys(name for case in found["cases"] for name in case["contenders"] if name != _OTHER_ROWS))
    heights = [len(cases) + 3 for _, _, cases in panels]
    legend_lines = -(-len(names) // _LEGEND_COLUMNS) + 1
    num_lines = sum(heights) + legend_lines + 3
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(11, _INCHES_A_LINE * num_lines),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axis, (share, label, cases) in zip(axes[:, 0], panels, strict=True):
        for place, case in enumerate(reversed(cases)):
            for name, times in case["contenders"].items():
                if name == _OTHER_ROWS:
                    continue
                number = names.index(name)
                axis.plot(100 * times[share], place, zorder=2 if number else 3, **_style(number))
        axis.axvline(100, color="black", linewidth=1)
        axis.set_yticks(range(len(cases)), [case["name"] for case in reversed(cases)], fontsize=7)
        axis.set_xlabel(f"{label}, %", fontsize=8)
        axis.set_xlim(left=0)
        axis.set_ylim(-0.7, len(cases) - 0.3)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="both", color="#dddddd", linewidth=0.5)
        axis.set_axisbelow(True)
    handles = [pyplot.Line2D([], [], label=name, **_style(number)) for number, name in enumerate(names)]
    here = found["machine"]
    figure.suptitle(f"{here['model']}, {here['cores']} cores, {found['threads']} threads", fontsize=10)
    figure.legend(handles=handles, loc="lower center", ncols=_LEGEND_COLUMNS, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, legend_lines / num_lines, 1, 1 - 1.5 / num_lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version in the file: the same figures make the same bytes.
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _style(number: int) -> dict[str, Any]:
    """Of the dots of a contender: mempool is the first."""
    return {
        "marker": "osD^vPX"[number % 7],
        "markersize": 5 if number else 7,
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": "",
    }
