"""Kills a pool's controller in the middle of rescales, again and again, while a trainer runs; on a Ray of its own.

    python -m tests.hostile.controller_kills --kills 20

Prints whether any update was lost or doubled, the longest step beside the usual one, and the seconds it took. Exit 1
where a command did not end its rescale, or the values are not torch's own.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.integration.kills import kill_controllers
from tests.integration.pools import RayPool, Training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slots", type=int, default=40_000, help="of the table that moves")
    parser.add_argument("--after", type=float, default=1.0, help="the controller is killed within so many seconds")
    options = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pool = RayPool(Path(folder), name="kills", shards=2, ray_address="local")
        pool.up()
        try:
            with pool.connect() as client:
                training = Training(client, "moved", num_slots=options.slots)
                outcome = kill_controllers(
                    pool, training, kills=options.kills, seed=options.seed, after_s=options.after
                )
                print(outcome, *outcome.refusals, sep="\n", flush=True)
                training.assert_exact(client)
        except AssertionError as error:
            print(f"failed: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            pool.down()
    print(f"no update was lost or doubled; {time.monotonic() - began_s:.0f} s in all")


if __name__ == "__main__":
    main()
