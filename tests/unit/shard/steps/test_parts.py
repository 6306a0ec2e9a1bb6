"""A step in parts: the bits of the step at once, within the memory that was given."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool import kernels
from mempool.shard.pages.storage import Storage
from mempool.shard.steps.canonical import Canonical
from mempool.shard.steps.held import HeldUpdate
from mempool.shard.steps.parts import pairs_bytes, reduce_in_parts
from mempool.types import OptimizerSpec, Placement, StepId
from mempool.types.bags import Bags
from tests.contract.bags import make_bags
from tests.contract.driver import make_schema, same
from tests.contract.layouts import LAYOUTS
from tests.unit.shard.conftest import MakeDriver

CPU = torch.device("cpu")
MIB = 2**20


def _table(layout: str, *, num_slots: int = 50, page_slots: int = 8) -> Storage:
    table = Storage(make_schema(num_slots=num_slots, page_slots=page_slots), shard=0, device=CPU)
    owners = np.array(LAYOUTS[layout], dtype=np.int32)
    placement = Placement(table_id=0, epoch=1, owners=owners, key_owners=np.empty(0, dtype=np.int32))
    for _ in table.initialise(placement):
        pass
    return table


def _update(table: Storage, seed: int, lengths: list[int], *, weighted: bool) -> HeldUpdate:
    """Every third pair is of one slot."""
    bags = make_bags(seed, num_slots=table.schema.num_slots, lengths=lengths, weighted=weighted)
    bags.ids[::3] = 31
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(len(lengths), table.schema.width(table.blocks), generator=generator)
    return HeldUpdate(Bags(bags.ids, bags.weights, bags.offsets), grads)


def _at_once(table: Storage, updates: list[HeldUpdate]) -> list[dict[int, Tensor]]:
    """Per lane, the sum of each slot."""
    pairs = Canonical.of(updates).pairs([update.grads for update in updates])
    found = []
    for lane in table.lanes:
        in_order = kernels.sort_pairs(lane.arena.paged(), pairs.ids)
        sums = kernels.segment_sum(in_order, pairs.weights, pairs.bags, lane.of(pairs.grads))
        found.append(dict(zip(in_order.slots.tolist(), sums, strict=True)))
    return found


@settings(max_examples=15, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    updates=st.lists(
        st.tuples(st.integers(0, 9999), st.lists(st.integers(0, 700), min_size=1, max_size=5), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    room=st.sampled_from([1, 1000, 200_000]),
    wide=st.booleans(),
)
def test_parts_have_the_bits_of_the_whole(
    layout: str, updates: list[tuple[int, list[int], bool]], room: int, wide: bool
) -> None:
    # Of the wide table, a bucket of the first histogram has many slots.
    table = _table(layout, **({"num_slots": 50 * 2**10, "page_slots": 8 * 2**10} if wide else {}))
    held = [_update(table, seed, lengths, weighted=weighted) for seed, lengths, weighted in updates]
    held = [update for update in held if update.bags.ids.numel()]
    if not held:
        return
    found: list[dict[int, Tensor]] = [{} for _ in table.lanes]
    arenas = [lane.arena for lane in table.lanes]
    for part in reduce_in_parts(table, held, room):
        sums = dict(zip(part.pairs.slots.tolist(), part.sums.clone(), strict=True))
        assert not sums.keys() & found[arenas.index(part.lane.arena)].keys(), "a slot is in one part"
        found[arenas.index(part.lane.arena)] |= sums
        rows = kernels.sort_pairs(part.lane.arena.paged(), part.pairs.slots).rows
        assert torch.equal(part.pairs.rows, rows)
    assert same(dict(enumerate(found)), dict(enumerate(_at_once(table, held))))


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adam", "dense adamw"])
@pytest.mark.parametrize(("dtype", "want_norm"), [("float32", True), ("int8", False)])
def test_a_commit_in_parts_changes_no_bit(make_driver: MakeDriver, optimizer: str, dtype: str, want_norm: bool) -> None:
    dense = optimizer == "dense adamw"
    spec = OptimizerSpec(algorithm="adamw" if dense else optimizer, lr=0.1, dense=dense)  # type: ignore[arg-type]
    schema = make_schema(optimizer=spec, dtype=dtype, rounding="stochastic", master=dense and dtype != "float32")
    results = []
    for commit_memory_bytes in (8 * MIB, 400_000, 100_000):
        driver = make_driver(3, commit_memory_bytes=commit_memory_bytes).create(schema, "mixed")
        norms = []
        for step in range(1, 4):
            for sequence in (2 * step, 2 * step + 1):
                driver.gather(make_bags(sequence, lengths=(400, 0, 70, 1900), weighted=bool(sequence % 3)))
                grads = torch.randn(4, 10, generator=torch.Generator().manual_seed(sequence))
                driver.update(step, sequence, grads)
            replies = driver.prepare(step, [2 * step, 2 * step + 1], want_norm=want_norm)
            norms += [reply.squared_norm for reply in replies.values()]
            driver.commit(step, [2 * step, 2 * step + 1])
        results.append((norms, driver.contents()))
    for norms, contents in results[1:]:
        assert norms == pytest.approx(results[0][0], rel=1e-12)
        assert same(contents, results[0][1])


def test_what_prepared_steps_keep_leaves_half_of_the_memory(make_driver: MakeDriver) -> None:
    driver = make_driver(1, commit_memory_bytes=30_000).create(make_schema(), "one")
    budget = driver.host(0)._budget  # type: ignore[attr-defined]
    for group in range(8):
        step_id = StepId(group=f"group {group}", rank=0, step=1)
        bags = make_bags(group, lengths=(30, 30, 0, 5))
        update = driver.update_request(0, 1, 0, torch.ones(4, 10), bags=bags, step_id=step_id)
        driver.call(driver.host(0).update(update))
        driver.call(driver.host(0).prepare(driver.prepare_request(0, 1, [0], group=f"group {group}")))
    assert 0 < budget.commit_bytes - budget.commit_room <= budget.commit_bytes // 2
    for group in range(8):
        driver.discard(1, group=f"group {group}")
    assert budget.commit_room == budget.commit_bytes


def test_the_estimate_covers_all_lanes_and_joining() -> None:
    mixed, whole = _table("mixed"), _table("one")
    for table, lanes in ((mixed, 4), (whole, 1)):
        assert len(table.lanes) == lanes
        one = [_update(table, 1, [50, 50], weighted=True)]
        assert pairs_bytes(table, one) >= 100 * (8 + 32 * lanes)
        assert pairs_bytes(table, one * 2) >= 2 * pairs_bytes(table, one) + 2 * 100 * 20


def test_the_estimate_covers_a_gpus_sums_of_long_runs() -> None:
    table = _table("one")
    one = [_update(table, 1, [50, 50], weighted=True)]
    on_cpu = pairs_bytes(table, one)
    table.device = torch.device("cuda")
    assert pairs_bytes(table, one) - on_cpu >= 100 * table.schema.value_dim * 4 / kernels.LONG_RUN


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is told by Linux")
@pytest.mark.parametrize("lookups", [1, 4])
def test_a_large_step_stays_within_its_memory(lookups: int) -> None:
    """A million pairs, 64 columns: sorted and summed at once they take more than 50 MiB, in parts the 16 MiB given."""
    script = Path(__file__).with_name("large_step.py")
    done = subprocess.run(
        [sys.executable, str(script), str(lookups)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = {name: int(num_bytes) for name, num_bytes in (line.split() for line in done.stdout.splitlines())}
    assert grown["at_once"] > 50 * MIB, "the step is not large: the test shows nothing"
    assert grown["prepare"] < (16 + 4) * MIB
    assert grown["commit"] < (16 + 4) * MIB
