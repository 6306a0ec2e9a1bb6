"""Compiles the CPU kernels that the tables of a cluster file need, and a trainer's scoring; once per machine.

    python examples/compile_kernels.py -f cluster/local.yaml

Nobody has to: a pool does so when it makes a table, and a trainer at its first step. It shows what that takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mempool.config import load, resolve
from mempool.kernels import SCORING, make_ready
from mempool.shard.steps.optimizers import kernel_needs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; answers the exit code, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="compile_kernels", description="Compiles what a cluster's tables need.")
    parser.add_argument("-f", "--file", type=Path, required=True, help="the cluster file")
    options = parser.parse_args(arguments)
    needed = [kernel_needs(resolve(table), torch.device("cpu")) for table in load(options.file).tables]
    try:
        for needs in dict.fromkeys([SCORING, *needed]):  # scoring first: it has the part that takes longest
            make_ready(needs)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
