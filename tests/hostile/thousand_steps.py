"""A thousand steps on three shards of a pool on Ray, disturbed: are they those of a pool that nobody disturbed?

    python -m tests.hostile.thousand_steps --seed 1

Ten `kill -9` over shards, controller and trainer, two rescales, and one power cut: everything is killed at once, Ray
too, then `mempool up -f`. Prints what was done at which step. Exit 1 where anything differs in a bit from the same
steps on a pool of one shard in this process.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.integration.pools import RayPool
from tests.integration.scenario import STEPS, Scenario


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pool = RayPool(Path(folder), name="thousand", shards=3, ray_address="local", trainer_lease_s=2.0)
        pool.edit("shard:\n", f'shard:\n  storage: {{"path": "{folder}/disk", "journal_limit": "1MiB"}}\n')
        pool.up()
        try:
            print(Scenario(pool, steps=options.steps, seed=options.seed).run(), flush=True)
        except AssertionError as error:
            print(f"failed, with seed {options.seed}: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            pool.down()
    print(f"bit for bit as undisturbed; {time.monotonic() - began_s:.0f} s in all")


if __name__ == "__main__":
    main()
