"""Kills shards and the controller of a pool with storage at random moments of training; on a Ray of its own.

    python -m tests.hostile.pool_kills --kills 20 --seed 1

Prints what was killed and the longest step. Exit 1 where the trainer failed, or its tables are not bit for bit those of
a pool that nobody disturbed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.integration.chaos import disturb
from tests.integration.pools import RayPool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="as many kills as there is time for, in place of --kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--within", type=float, default=2.0, help="seconds from when training goes on to the next kill")
    parser.add_argument("--rescales", action="store_true", help="beside that change the number of shards all the time")
    options = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pool = RayPool(Path(folder), name="kills", shards=options.shards, ray_address="local")
        pool.edit("shard:\n", f'shard:\n  storage: {{"path": "{folder}/disk", "journal_limit": "1MiB"}}\n')
        pool.up()
        try:
            survived = disturb(
                pool,
                kills=options.kills if options.seconds is None else sys.maxsize,
                seed=options.seed,
                within_s=options.within,
                rescales=options.rescales,
                ends_s=float("inf") if options.seconds is None else began_s + options.seconds,
            )
            print(survived, *survived.refusals, sep="\n", flush=True)
        except AssertionError as error:
            print(f"failed, with seed {options.seed}: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            pool.down()
    print(f"bit for bit as without them; {time.monotonic() - began_s:.0f} s in all")


if __name__ == "__main__":
    main()
