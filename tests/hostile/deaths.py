"""Trainers, shards and controllers that die or fall silent at the worst moment; on a Ray of its own, of three shards.

    python -m tests.hostile.deaths trainers            killed before and after each message of a step of two tables
    python -m tests.hostile.deaths cuts                cut off from a shard for longer than the lease, in a rescale
    python -m tests.hostile.deaths stops --for 40      a shard that stands still for so long, in a rescale
    python -m tests.hostile.deaths creations           controllers killed inside create_table

Prints a line for each, and whether all was whole. Exit 1 where a step was half applied, lost or doubled, a rescale that
met a dead trainer's step failed or took longer than the lease and 5 s, or a table was left half made.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.integration.deaths import REST_S, controller_dies_creating, trainer_dies
from tests.integration.pools import RayPool
from tests.integration.silences import cut_off, stopped_shard

_MOST_MESSAGES = 8
CUTS = ((1, "Prepare"), (1, "Commit"), (0, "Prepare"), (0, "Commit"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["trainers", "cuts", "stops", "creations"])
    parser.add_argument("--lease", type=float, default=10.0, help="shard.trainer_lease")
    parser.add_argument("--for", type=float, default=40.0, dest="for_s", help="seconds that a shard stands still")
    parser.add_argument("--kills", type=int, default=10, help="inside create_table")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pool = RayPool(
            Path(folder),
            name="deaths",
            shards=3,
            ray_address="local",
            memory="1GiB",
            trainer_lease_s=options.lease,
        )
        pool.up()
        try:
            if options.what == "trainers":
                _trainers(pool)
            elif options.what == "cuts":
                for shard, method in CUTS:
                    print(cut_off(pool, shard=shard, method=method), flush=True)
            elif options.what == "stops":
                print(stopped_shard(pool, for_s=options.for_s), flush=True)
            else:
                print(controller_dies_creating(pool, kills=options.kills, seed=options.seed), flush=True)
        except AssertionError as error:
            print(f"failed: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            pool.down()
    print(f"nothing was half done; {time.monotonic() - began_s:.0f} s in all")


def _trainers(pool: RayPool) -> None:
    longest_s = 0.0
    for number in range(1, _MOST_MESSAGES + 1):
        for side in ("before", "after"):
            found = trainer_dies(pool, cut=number, side=side)
            print(found, flush=True)
            assert found.rescale_s <= pool.trainer_lease_s + REST_S, "the rescale waited for longer than that"
            longest_s = max(longest_s, found.rescale_s)
            if not found.died:
                print(
                    f"the longest rescale: {longest_s:.1f} s, of {pool.trainer_lease_s + REST_S:g} s that it may take"
                )
                return


if __name__ == "__main__":
    main()
