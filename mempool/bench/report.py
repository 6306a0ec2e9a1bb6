"""A run as people read it, and as the file that is kept by machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mempool
from mempool.bench import machine, peers
from mempool.bench.cases import OWN
from mempool.bench.gate import GateError
from mempool.bench.goals import Standing
from mempool.bench.measured import Measured
from mempool.bench.run import Outcome

FORMAT = 1


def document(outcome: Outcome) -> dict[str, Any]:
    """What the result file holds."""
    device = torch.device(outcome.options.device)
    copies = sorted(one.ceiling_per_ms for one in outcome.measured if not one.case.of_keys)
    products = sorted(one.ceiling_per_ms for one in outcome.measured if one.case.of_keys)
    return {
        "format": FORMAT,
        "mempool": mempool.__version__,
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "implementation": machine.implementation(device),
        "threads": torch.get_num_threads(),
        "options": {
            "quick": outcome.options.quick,
            "rounds": outcome.options.rounds,
            "only": list(outcome.options.only),
            "seed": outcome.options.seed,
        },
        "copy_bytes_per_s": copies[len(copies) // 2] * 1e3 if copies else None,
        "matmul_flops_per_s": products[len(products) // 2] * 1e3 if products else None,
        "goals": [standing.document() for standing in outcome.standings],
        "cases": [one.document() for one in outcome.measured],
        "failed": failed_document(outcome.failed),
        "skipped": outcome.skipped,
        "peers_missing": outcome.peers_missing,
    }


def failed_document(failed: Sequence[GateError]) -> list[dict[str, Any]]:
    """What was wrong, as result files hold it."""
    return [
        {
            "name": error.case,
            "wrong": [
                {"contender": check.contender, "error": _number(check.error), "tolerance": check.tolerance}
                for check in error.wrong
            ],
        }
        for error in failed
    ]


def write(found: dict[str, Any], folder: Path, what: str = "") -> Path:
    """Write the result file of a machine; one of a quick or partial run goes beside that of a full one.

    Args:
        found: What it holds.
        folder: Made if it is missing.
        what: Of another benchmark than the kernels': a part of the file's name.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partly = found["options"]["quick"] or found["options"]["only"]
    parts = [found["machine"]["name"], what, "partly" if partly else ""]
    path = folder / f"{'-'.join(filter(None, parts))}.json"
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return path


def lines(outcome: Outcome) -> list[str]:
    """The report for people: every case with its peers, then the goals, then what is missing."""
    here = machine.describe(torch.device(outcome.options.device))
    running = machine.implementation(torch.device(outcome.options.device))
    out = [
        f"{here['model']}, {here['cores']} cores, {torch.get_num_threads()} threads; mempool's kernels: {running}",
        "",
    ]
    if outcome.measured:
        out += [*table(_HEADER, [_row(one) for one in outcome.measured]), ""]
        out.append(
            "ms: median of rounds (min to max). Peers: ms, and how many times longer than mempool (median of rounds)."
        )
        out.append(
            "share: unavoidable bytes a second beside a copy's, or, for keys, operations beside a square product's, "
            "in the same rounds; above 100 % where repeated rows come from a cache."
        )
    said = [standing for standing in outcome.standings if standing.measured is not None or not outcome.options.only]
    if outcome.measured and said:
        out += ["", *goal_lines(said)]
    out += ["", *(f"not as planned: {line}" for line in outcome.skipped)] if outcome.skipped else []
    if outcome.peers_missing:
        out += ["", f"peers that are not installed: {', '.join(outcome.peers_missing)}; to get them: {peers.INSTALL}"]
    return out


_HEADER = ("case", "mempool ms", "GB/s", "share", "peers")


def _row(one: Measured) -> tuple[str, ...]:
    times = one.times[OWN]
    share = one.share_of_product(OWN) if one.case.of_keys else one.share_of_copy(OWN)
    rate = f"{one.num_bytes / times.median_ms / 1e6:.1f}" if not one.case.of_keys else "-"
    beside = [
        f"{name} {peer.median_ms:.2f} ({peer.over(times):.2f}x)" for name, peer in one.times.items() if name != OWN
    ]
    return (
        one.case.name,
        f"{times.median_ms:.2f} ({times.min_ms:.2f} to {times.max_ms:.2f})",
        rate,
        f"{100 * share:.0f} %" if share is not None else "-",
        ", ".join(beside) or "-",
    )


def goal_lines(standings: Sequence[Standing]) -> list[str]:
    """Goals and how the run stands to them."""
    goals = [
        (
            standing.what,
            f"{standing.goal:g}",
            "-" if standing.measured is None else f"{standing.measured:.2f}",
            standing.standing,
        )
        for standing in standings
    ]
    return table(("goal", "wanted", "measured", ""), goals)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, two blanks between."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if abs(value) < float("inf") else str(value)
