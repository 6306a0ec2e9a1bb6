"""Digits as images, as spoken and as written words, that find each other through one memory in a pool.

    python examples/digits_in_three_ways.py                            # an embedded pool; needs apt install espeak-ng
    python examples/digits_in_three_ways.py --address localhost:7077   # a running pool

Images are scikit-learn's, spoken words espeak-ng's (six languages, eleven speakers), written words num2words'. Three
towers with one `mempool.nn.MultiModalMemory` between them are trained by `mempool.nn.InfoNCE`; then each way asks each
other one, with images and speakers that training never saw.

Read the parts in this order: digits/speech, spectrogram, data, model, train, retrieval.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mempool
from digits.data import Way, build
from digits.errors import DigitsError
from digits.model import Towers, table_config
from digits.retrieval import Direction, directions
from digits.speech import Cached, espeak
from digits.train import STEPS, train
from mempool.errors import MempoolError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; answers the exit code: 0 ok, 1 failed, 130 interrupted (argparse ends with 2)."""
    options = _parser().parse_args(arguments)
    console = Console()
    began_s = time.perf_counter()
    try:
        ways = build(Cached(espeak, options.cache))
        ready_s = time.perf_counter()
        with mempool.local(shards=2) if options.address is None else mempool.connect(options.address) as pool:
            found = run(ways, pool=pool, options=options, console=console)
    except (DigitsError, MempoolError) as error:
        print(f"digits_in_three_ways: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("digits_in_three_ways: interrupted", file=sys.stderr)
        return 130
    print_report(ways, found, console=console)
    console.print(
        f"{ready_s - began_s:.0f} s for the data (sounds are kept in {options.cache}),"
        f" {time.perf_counter() - ready_s:.0f} s for training and asking",
        soft_wrap=True,
    )
    return 0


def run(
    ways: Mapping[str, Way], *, pool: mempool.Pool, options: argparse.Namespace, console: Console
) -> list[Direction]:
    """Trains towers on a table of their own, which is dropped at the end, and asks in all directions."""
    table = pool.create_table(table_config(options.table))
    try:
        towers = trained(ways, table, options=options, console=console)
        alone = trained(ways, None, options=options, console=console) if options.alone else None
        return directions(towers, ways, alone=alone)
    finally:
        pool.drop_table(options.table)


def trained(
    ways: Mapping[str, Way], table: mempool.Table | None, *, options: argparse.Namespace, console: Console
) -> Towers:
    """Towers after their training, with a memory in a table or without one."""
    torch.manual_seed(options.seed)
    towers = Towers({name: way.trained.features.shape[1] for name, way in ways.items()}, table)
    progress = iter(track(range(options.steps), "training", console=console, transient=True))
    train(towers, ways, steps=options.steps, seed=options.seed, on_step=lambda: next(progress))
    next(progress, None)
    return towers


def print_report(ways: Mapping[str, Way], found: Sequence[Direction], *, console: Console) -> None:
    """What was trained on, and a row for each direction."""
    for name, way in ways.items():
        asked = "asked: the same" if way.asked is way.trained else f"asked: {len(way.asked.digits)} never seen"
        console.print(f"{name}: {way.trained.features.shape[1]} features; trained: {len(way.trained.digits)}; {asked}")
    with_alone = any(each.alone is not None for each in found)
    columns = ["top-1", *(["without memory"] if with_alone else []), "linear probes", "chance"]
    report = Table("direction", "questions", "gallery", *columns)
    for each in found:
        parts = [each.top1, each.alone, each.probe, each.chance]
        report.add_row(
            f"{each.asked} -> {each.found}",
            str(each.questions),
            str(each.gallery),
            *(f"{100 * part:.1f} %" for part in parts if part is not None),
        )
    console.print(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="digits_in_three_ways", description="Images, spoken and written words that find each other."
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="a running pool; without it, one in this process")
    parser.add_argument("--table", default="digits", help="made at the start, dropped at the end (default: digits)")
    parser.add_argument("--steps", type=_steps, default=STEPS, help=f"of training (default: {STEPS})")
    parser.add_argument("--alone", action="store_true", help="train and ask towers without a memory, too")
    parser.add_argument("--seed", type=int, default=0, help="of start and order (default: 0)")
    parser.add_argument(
        "--cache", type=Path, default=Path("out/digits"), help="folder of spoken words (default: out/digits)"
    )
    return parser


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise argparse.ArgumentTypeError(f"{text}: train at least 1 step")
    return steps


if __name__ == "__main__":
    raise SystemExit(main())
