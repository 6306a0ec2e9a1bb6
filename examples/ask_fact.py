"""Asks a model that `train_facts.py --model FILE` wrote; its memory is in a running pool.

    python examples/ask_fact.py --address localhost:7077 --model FILE "In which country is Graz?"

Without a question it asks the one that the model was asked before it was written, and ends with 1 if the answer is
another one by now: the file holds no value of the memory, so this is the pool's word.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mempool
from facts.asking import FactAnswerer
from mempool.errors import MempoolError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; answers the exit code: 0 ok, 1 failed (argparse ends with 2)."""
    options = _parser().parse_args(arguments)
    try:
        with mempool.connect(options.address) as pool:
            answerer = FactAnswerer.read(options.model, pool=pool)
            question = options.question or answerer.asked.question
            (answer,) = answerer.answers([question])
    except (OSError, MempoolError) as error:
        print(f"ask_fact: {error}", file=sys.stderr)
        return 1
    print(f"{question}\n{answer}")
    if options.question is None and answer != answerer.asked.answer:
        print(f"ask_fact: when the model was written the answer was {answerer.asked.answer!r}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ask_fact", description="Asks a trained model; its memory is in a pool.")
    parser.add_argument("--address", metavar="HOST:PORT", required=True, help="the pool that has its memory")
    parser.add_argument("--model", type=Path, metavar="FILE", required=True, help="what train_facts.py --model wrote")
    parser.add_argument("question", nargs="?", help="without it, one that the model has answered before")
    return parser


if __name__ == "__main__":
    sys.exit(main())
