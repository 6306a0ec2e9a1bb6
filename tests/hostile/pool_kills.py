"""Faults of a pool with storage at random moments of training; on a Ray of its own, whose nodes come and go.

    python -m tests.hostile.pool_kills --faults 20 --seed 1 [--kinds "shard killed" "disk full"]

Shards, the controller, the trainer and Ray's nodes are killed or stand still, connections are cut, a small disk fills,
bits are flipped in files of shards that are down (which must be found, and named). Prints what happened, and counts.
Exit 1 where the trainer failed, or its tables are not bit for bit those of a pool that nobody disturbed.
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.integration.chaos import disturb
from tests.integration.faults import WEIGHTS, SmallDisk, WorkerNodes
from tests.integration.pools import RayPool
from tests.integration.ray_nodes import RayNodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="as many as there is time for, in place of --faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--within", type=float, default=2.0, help="seconds from when training goes on to the next one")
    parser.add_argument("--changes", action="store_true", help="beside that rescales and checkpoints, all the time")
    parser.add_argument("--kinds", nargs="+", choices=sorted(WEIGHTS), default=list(WEIGHTS), help="these alone")
    options = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        disk: SmallDisk | None = SmallDisk(Path(folder, "disk"))
        assert disk is not None
        storage = disk.folder
        if disk.mount():
            stack.callback(disk.unmount)
        else:
            print("no disk fills: this process may not mount a tmpfs", flush=True)
            disk = None
        nodes = stack.enter_context(RayNodes())
        workers = WorkerNodes(nodes, 2)
        pool = RayPool(
            Path(folder),
            name="chaos",
            shards=options.shards,
            ray_address=nodes.address,
            resources={"worker": 1},
            trainer_lease_s=2.0,
        )
        pool.edit("shard:\n", f'shard:\n  storage: {{"path": "{storage}", "journal_limit": "1MiB"}}\n')
        pool.up()
        try:
            survived = disturb(
                pool,
                storage=storage,
                faults=options.faults if options.seconds is None else sys.maxsize,
                seed=options.seed,
                within_s=options.within,
                kinds=options.kinds,
                disk=disk,
                nodes=workers,
                changes=Path(folder, "checkpoints") if options.changes else None,
                ends_s=float("inf") if options.seconds is None else began_s + options.seconds,
                say=lambda line: print(line, flush=True),
            )
            print(survived, *sorted(set(survived.refusals)), sep="\n", flush=True)
        except AssertionError as error:
            print(f"failed, with seed {options.seed}: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            pool.down()
    print(f"bit for bit as undisturbed; {time.monotonic() - began_s:.0f} s in all")


if __name__ == "__main__":
    main()
