"""Jobs of several ranks on a pool with storage, whose shards and ranks are killed and whose shards change in number.

    python -m tests.hostile.ranks --ranks 2 --optimizer adam --steps 200 --shard-kills 5 --rank-kills 1 --rescale

Trains the same twice, once undisturbed and once disturbed, and a third time in one process on the whole batch with
torch's own optimizers. Prints how far they are apart. Exit 1 where either job is further than 1e-5 from the one
process, a step was lost or doubled, or the two jobs differ in any bit; but with --rescale, as gradients of weights are
summed over shards, and it comes when it comes. With --rescale-between both jobs wait for it behind the same steps, and
may not differ.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from tests.integration.pools import RayPool, kill_listener, port_of
from tests.integration.ranks import OPTIMIZERS, Job, alone, make_table

CLOSE = 1e-5
_SHARDS = 2
_RESCALES = (4, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adam")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--shard-kills", type=int, default=5)
    parser.add_argument("--rank-kills", type=int, default=1)
    parser.add_argument("--rescale", action="store_true", help="from 2 shards to 4 and to 3 meanwhile")
    parser.add_argument("--rescale-between", action="store_true", help="the same, of both jobs, between two steps")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two steps where it is disturbed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Bits of weights' gradients depend on where pages lie, and that must not depend on how often what was asked.
        pool = RayPool(
            Path(folder), name="ranks", shards=_SHARDS, ray_address="local", trainer_lease_s=4.0, rescale_by="pages"
        )
        pool.edit("shard:\n", f'shard:\n  storage: {{"path": "{folder}/disk"}}\n')
        pool.up()
        try:
            found = {
                name: _trained(pool, Path(folder, name), options, disturbed=name == "disturbed")
                for name in ("undisturbed", "disturbed")
            }
        finally:
            pool.run("down", "--pool", pool.name, "--drop", "--yes")
    initial, quiet, seconds = found["undisturbed"]
    _, loud, loud_seconds = found["disturbed"]
    local, dense = alone(initial, options.optimizer, options.steps)
    exact = {"values": local, **dense}
    apart = [
        max(float((job[name] - tensor).norm() / tensor.norm()) for name, tensor in exact.items())
        for job in (quiet, loud)
    ]
    differing = [name for name in exact if not torch.equal(quiet[name], loud[name])]
    print(
        f"{options.ranks} ranks, {options.steps} steps, {options.optimizer}: {apart[0]:.1e} from one process in "
        f"{seconds:.0f} s, disturbed {apart[1]:.1e} in {loud_seconds:.0f} s; "
        + (f"the two differ in {', '.join(differing)}" if differing else "the two are bit for bit the same")
    )
    if max(apart) > CLOSE or (differing and not options.rescale):
        sys.exit(1)


def _trained(
    pool: RayPool, folder: Path, options: argparse.Namespace, *, disturbed: bool
) -> tuple[Tensor, dict[str, Tensor], float]:
    """The table's first values; its last ones and the dense part's; how long it took."""
    rescales = {options.steps // 3: _RESCALES[0], 2 * options.steps // 3: _RESCALES[1]}
    with pool.connect() as client:
        if options.rescale_between:
            client.rescale(_SHARDS)
        table = make_table(client, options.optimizer)
        everything = torch.arange(table.num_slots)
        initial = table.rows(everything)
        began_s = time.monotonic()
        pause_s = options.pause if disturbed else 0.0
        job = Job(
            pool,
            folder,
            ranks=options.ranks,
            steps=options.steps,
            pause_s=pause_s,
            rescales=rescales if options.rescale_between else {},
        )
        try:
            if disturbed:
                _disturb(pool, job, options)
            job.wait()
        finally:
            job.close()
        took_s = time.monotonic() - began_s
        values = table.rows(everything)
        applied = {status.version for shard in client.status().shards for status in shard.tables if status.pages}
        assert applied == {options.steps}, f"steps were lost or doubled: {applied}"
        client.drop_table(table.name)
    return initial, {"values": values, **job.dense(options.steps)}, took_s


def _disturb(pool: RayPool, job: Job, options: argparse.Namespace) -> None:
    faults = ["shard"] * options.shard_kills + ["rank"] * options.rank_kills
    faults += [f"{shards} shards" for shards in _RESCALES] if options.rescale else []
    faults = faults[::2] + faults[1::2]
    for number, fault in enumerate(faults, 1):
        job.wait_for_step(number * options.steps // (len(faults) + 1))
        print(f"behind step {job.step}: {fault}", flush=True)
        if fault == "shard":
            with pool.connect() as client:
                shards = client.status().shards
            kill_listener(port_of(shards[number % len(shards)].info))
        elif fault == "rank":
            job.kill(number % options.ranks)
        else:
            with pool.connect() as client:
                client.rescale(int(fault.split()[0]))


if __name__ == "__main__":
    main()
