"""``python -m mempool.bench``: `mempool bench kernels` for machines with torch and the kernels' library alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mempool.bench.cases import FAMILIES
from mempool.bench.command import bench_kernels
from mempool.bench.run import Options, OptionsError


def main() -> int:
    """Parse the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mempool.bench", description="Time every kernel beside its peers.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="the headline's cases only")
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="rounds of a case")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"some of: {','.join(FAMILIES)}")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the result file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the roofline, a PNG")
    given = parser.parse_args()
    only = tuple(name for name in given.only.split(",") if name)
    try:
        options = Options(device=given.device, quick=given.quick, rounds=given.rounds, only=only)
        return bench_kernels(options, as_json=given.json, out=given.out, plot_file=given.plot)
    except OptionsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
