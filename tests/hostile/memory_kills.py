"""Kills the process of an embedded pool on a disk again and again, while it trains, rescales, and takes checkpoints.

    python -m tests.hostile.memory_kills --kills 50 --seed 1 [DIR]

After each kill the pool is opened here: all that was acknowledged is there, bit for bit as in a pool that never died,
and so is the newest checkpoint. Exit 1 where anything differs.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.support.memory_lives import Undisturbed, compare, keep_journals_small, live


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the pool lies; kept where anything goes wrong")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, help="as many kills as there is time for, in place of --kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--after", type=float, default=2.0, help="a process is killed within so many seconds")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="memory-kills-"))
    dice, oracle, began_s, stands = random.Random(options.seed), Undisturbed(), time.monotonic(), 0
    keep_journals_small()
    try:
        number = 0
        while number < options.kills if options.seconds is None else time.monotonic() < began_s + options.seconds:
            number += 1
            life = live(folder, oracle=oracle, dice=dice, known=stands, longest_s=options.after)
            stands = life.stood
            print(f"kill {number}: {'' if life.opened else 'while it opened; '}behind step {stands}", flush=True)
        compare(folder, oracle, at_least=stands)
    except AssertionError as error:
        print(f"failed, with seed {options.seed}, in {folder}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        oracle.close()
    print(f"{number} kills, {stands} steps, nothing lost; {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
