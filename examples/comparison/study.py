"""The runs of a comparison: each is kept as it ends, so that a study that was stopped goes on with what is missing."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LR, TABLE_LR = 1e-3, 0.3
"""Where the search for learning rates begins."""
_LR_FACTOR, _TABLE_LR_FACTOR = 2.0, 3.0
_MOST_TRIES = 6


class StudyError(Exception):
    """The folder is another study's, or cannot be written."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates: of Adam, and of values."""

    lr: float
    table_lr: float


class Study:
    """Runs by name, in a folder.

    Args:
        folder: made if need be.
        settings: what all runs have in common; a folder of other settings is refused.
        say: is told what begins and what came of it.

    Attributes:
        done: runs that were made now, and not read.

    Raises:
        StudyError: the folder has runs of other settings, or cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self.done = 0
        path = folder / "settings.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                _write(path, settings)
            there = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise StudyError(f"{folder} cannot be used for a study: {error}") from error
        wanted = json.loads(json.dumps(settings))
        if there != wanted:
            other = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
            said = ", ".join(f"{name} = {there.get(name)!r} (now {wanted.get(name)!r})" for name in other)
            raise StudyError(f"{folder} has runs of other settings: {said}. Give another --out, or the same settings")

    def run(self, name: str, carry_out: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a run found; carried out where it was not, or not to its end."""
        path = self.folder / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return found
        self._say(f"{name} ...")
        found = carry_out()
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, found)
        self.done += 1
        self._say(f"{name}: {headline(found)}")
        return found


def headline(found: dict[str, Any]) -> str:
    """What a run found, in a few words."""
    if "perplexity" in found:
        return f"perplexity {found['perplexity']:.2f}, {found['train_s']:.0f} s"
    name = "unseen" if "exact_match_unseen" in found else "trained"
    return f"exact match {found[f'exact_match_{name}']:.1%}, {found['train_s']:.0f} s"


def climb(start: float, factor: float, worth: Callable[[float], float]) -> float:
    """The best of ``start * factor ** i``: its neighbours are tried, and on from the better one while that helps.

    Args:
        worth: of a number, the higher the better; NaN counts as the worst.
    """
    seen: dict[int, float] = {}

    def of(step: int) -> float:
        if step not in seen:
            value = worth(float(f"{start * factor**step:.3g}"))
            seen[step] = -math.inf if math.isnan(value) else value
        return seen[step]

    best = max((0, -1, 1), key=of)
    way = best
    while way and len(seen) < _MOST_TRIES + 1 and of(best + way) > of(best):
        best += way
    return float(f"{start * factor**best:.3g}")


def tuned(has_tables: bool, worth: Callable[[Rates], float]) -> Rates:
    """Learning rates by a small search: of the values first, with Adam's where it begins, then Adam's."""
    table_lr = TABLE_LR
    if has_tables:
        table_lr = climb(TABLE_LR, _TABLE_LR_FACTOR, lambda each: worth(Rates(LR, each)))
    return Rates(climb(LR, _LR_FACTOR, lambda each: worth(Rates(each, table_lr))), table_lr)


def spread(found: Sequence[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """Mean, least and most of several runs."""
    values = [each[name] for each in found]
    return sum(values) / len(values), min(values), max(values)


def settings_of(**parts: Any) -> dict[str, Any]:
    """Plain values of dataclasses and others."""
    return {name: asdict(part) if hasattr(part, "__dataclass_fields__") else part for name, part in parts.items()}


def with_contents(path: Path) -> str:
    """A file's name and what is in it, for settings: a file that was changed is another one."""
    return f"{path}, CRC-32 {zlib.crc32(path.read_bytes()):08x}"


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _write(path: Path, found: dict[str, Any]) -> None:
    partly = path.with_suffix(".part")
    partly.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(partly, path)


def chosen(names: str, allowed: Iterable[str], *, what: str) -> list[str]:
    """Names of a list with commas; "all": each.

    Raises:
        StudyError: one is unknown.
    """
    allowed = list(allowed)
    if names == "all":
        return allowed
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in allowed:
            raise StudyError(f"{what} {name!r} is none of {', '.join(allowed)}")
    return [name for name in allowed if name in wanted]
