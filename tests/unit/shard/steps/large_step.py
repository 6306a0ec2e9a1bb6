"""A process that prepares and commits a large step in little memory, and says how its peak grew, in bytes."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import torch

from mempool.agreement.ledger import AppliedLedger
from mempool.shard.pages.storage import Storage
from mempool.shard.steps import commits
from mempool.shard.steps.budget import Budget
from mempool.shard.steps.held import HeldUpdate, HeldUpdates
from mempool.types import DecidedStep, OptimizerSpec, Placement, StepId
from mempool.types.bags import Bags
from tests.contract.driver import make_schema

NUM_SLOTS, WIDTH, BAG_PAIRS, BAGS = 2**17, 64, 32, 31_248
MIB = 2**20


def _peak() -> int:
    """Bytes; of the time since the last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be taken again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _hold(updates: HeldUpdates, step: StepId, lookups: int, bags: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(step.step)
    for sequence in range(lookups):
        pairs = bags // lookups * BAG_PAIRS
        ids = torch.randint(NUM_SLOTS, (pairs,), generator=generator)
        held = Bags(ids, torch.randn(pairs, generator=generator), torch.arange(0, pairs + 1, BAG_PAIRS))
        grads = torch.randn(bags // lookups, WIDTH, generator=generator)
        updates.hold(step, sequence, HeldUpdate(held, grads))
    return tuple(range(lookups))


def main(lookups: int) -> None:
    schema = make_schema(
        num_slots=NUM_SLOTS,
        value_dim=WIDTH,
        block_dim=WIDTH,
        page_slots=4096,
        optimizer=OptimizerSpec(algorithm="adagrad", lr=0.1),
    )
    table = Storage(schema, shard=0, device=torch.device("cpu"))
    owners = np.zeros((schema.num_row_pages, 1), dtype=np.int32)
    placement = Placement(table_id=0, epoch=1, owners=owners, key_owners=np.empty(0, dtype=np.int32))
    for _ in table.initialise(placement):
        pass
    ledger = AppliedLedger(None)

    def run(step: int, commit_bytes: int, bags: int, *, says: tuple[str, ...] = ()) -> None:
        updates = HeldUpdates(budget=Budget(2**34, commit_bytes=commit_bytes), lease_s=600.0)
        step_id = StepId(group="trainer", rank=0, step=step)
        sequences = _hold(updates, step_id, lookups, bags)
        decided = DecidedStep(table_id=0, version=step, step_id=step_id, lr=0.1, grad_scale=1.0, sequences=sequences)
        before = _reset_peak()
        commits.prepare(table, updates, step_id, sequences, decider=(0, step), want_norm=True)
        grown = [_peak() - before]
        before = _reset_peak()
        commits.apply(table, updates, ledger, decided)
        grown.append(_peak() - before)
        for name, num_bytes in zip(says, grown, strict=False):
            print(name, num_bytes)

    with torch.no_grad():
        run(1, 2**34, lookups * 8)  # compiles
        run(2, 100_000, lookups * 64)
        run(3, 16 * MIB, BAGS, says=("prepare", "commit"))
        run(4, 2**34, BAGS, says=("at_once",))


if __name__ == "__main__":
    main(int(sys.argv[1]))
