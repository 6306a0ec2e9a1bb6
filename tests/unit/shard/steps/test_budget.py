"""Fair shares, and that what is counted is what it costs."""

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mempool.errors import Overloaded, RequestTooLarge
from mempool.shard.steps.budget import Budget, out_of_memory
from mempool.shard.steps.contexts import Contexts
from mempool.shard.steps.held import HeldUpdate, HeldUpdates, PreparedStep
from mempool.shard.work.jobs import JobQueue, _Lane
from mempool.types import StepId
from mempool.types.bags import Bags

MIB = 2**20


def test_owners_that_take_what_they_can_share_it() -> None:
    budget = Budget(10**6)
    for owners in (1, 2, 3):
        names = [f"owner {number}" for number in range(owners)]
        held = dict.fromkeys(names, 0)
        growing = True
        while growing:
            growing = False
            for name in names:
                if budget.refusal(name, 100, "an update") is None:
                    budget.hold(name, 100)
                    held[name] += 100
                    growing = True
        assert max(held.values()) - min(held.values()) <= 100 * owners
        assert min(held.values()) == pytest.approx(budget.share(owners), rel=0.01)
        assert budget.refusal("one more", budget.held_limit // 64, "an update") is None
        for name, num_bytes in held.items():
            budget.hold(name, -num_bytes)
    assert budget.held_bytes == 0
    assert not budget._owners


def test_refusals_say_who_holds_what_and_whether_waiting_helps() -> None:
    budget = Budget(10**6)
    budget.hold("ipv4:10.0.0.3:5123", 500_000)
    budget.hold("rank 1 of group 'b'", 300_000)
    refusal = budget.refusal("new", 200_000, "an update")
    assert isinstance(refusal, Overloaded)
    assert "Most is held by ipv4:10.0.0.3:5123 (500,000 bytes), rank 1 of group 'b' (300,000 bytes)" in str(refusal)
    assert refusal.retry_after_s > 0
    refusal = budget.refusal("ipv4:10.0.0.3:5123", 300_000, "an update")
    assert isinstance(refusal, RequestTooLarge)
    assert "ipv4:10.0.0.3:5123 holds 500,000 bytes" in str(refusal)
    assert "commit more often" in str(refusal)
    assert isinstance(budget.refusal("new", 900_000, "an update"), RequestTooLarge)


def test_lookups_give_way_to_what_is_held_and_to_calls() -> None:
    budget = Budget(1000, context_bytes=600)
    assert budget.context_room == 600
    budget.hold("a", 300)
    assert budget.context_room == 600
    budget.queued_bytes = 300
    assert budget.context_room == 400
    budget.hold("a", 500)
    assert budget.context_room == 0
    assert budget.queue_room == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), max_size=60))
def test_no_more_is_ever_held_than_may_be(events: list[tuple[str, int]]) -> None:
    budget = Budget(1000)
    for owner, num_bytes in events:
        if budget.refusal(owner, num_bytes, "an update") is None:
            budget.hold(owner, num_bytes)
        else:
            budget.hold(owner, -budget._owners.get(owner, 0))
        assert 0 <= budget.held_bytes <= budget.held_limit
        assert sum(budget._owners.values()) == budget.held_bytes


def test_what_a_lack_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    for error in (raised.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shape"))


def _resident() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _one(pairs: int) -> Bags:
    return Bags(torch.zeros(pairs, dtype=torch.int64), torch.ones(pairs), torch.tensor([0, pairs]))


def _contexts() -> int:
    contexts = Contexts(room=lambda: 2**40, lease_s=600.0)
    for number in range(20_000):
        contexts.remember(number, table_id=1, epoch=1, bags=_one(1))
    _kept.append(contexts)
    return contexts.num_bytes


def _updates() -> int:
    budget = Budget(2**40)
    held = HeldUpdates(budget=budget, lease_s=600.0)
    for number in range(20_000):
        held.hold(StepId(group="g", rank=0, step=1), number, HeldUpdate(_one(1), torch.zeros(1, 16)))
    _kept.append(held)
    return budget.held_bytes


def _names() -> int:
    """Ranks that hold next to nothing, under long names."""
    budget = Budget(2**40)
    held = HeldUpdates(budget=budget, lease_s=600.0)
    prepared = PreparedStep(
        step_id=StepId(group="g", rank=0, step=1),
        decider=(1, 1),
        sequences=(),
        want_norm=False,
        squared_norm=0.0,
        finite=True,
        reductions=None,
    )
    for number in range(20_000):
        held.set_prepared(StepId(group=f"{number:05}" + "ü" * 100, rank=0, step=1), prepared)
    _kept.append(held)
    return budget.held_bytes


def _sequences() -> int:
    budget = Budget(2**40)
    held = HeldUpdates(budget=budget, lease_s=600.0)
    for number in range(40):
        sequences = tuple(10**12 + number * 10**6 + at for at in range(20_000))
        prepared = PreparedStep(
            step_id=StepId(group="g", rank=0, step=1),
            decider=(1, 1),
            sequences=sequences,
            want_norm=False,
            squared_norm=0.0,
            finite=True,
            reductions=None,
        )
        held.set_prepared(StepId(group=f"{number}", rank=0, step=1), prepared)
    _kept.append(held)
    return budget.held_bytes


_kept: list[object] = []
_KINDS: dict[str, Callable[[], int]] = {
    "contexts": _contexts,
    "updates": _updates,
    "names": _names,
    "sequences": _sequences,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is told by Linux")
def test_what_is_counted_covers_resident_memory() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=100, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(_KINDS)
    for line in lines:
        kind, counted, resident = line.split()[0], *map(int, line.split()[1:])
        assert resident > 5 * MIB, f"{kind}: too little to tell"
        assert resident <= counted * 1.1 + MIB, f"{kind}: {resident / counted:.2f} of what was counted"
        assert counted <= 4 * resident, f"{kind}: counted far too high"


if __name__ == "__main__":
    _one(1)
    for name, make in _KINDS.items():
        gc.collect()
        before = _resident()
        said = make()
        print(name, said, _resident() - before)


@pytest.mark.parametrize("configured", [True, False])
def test_messages_name_keys_of_a_config_only_where_there_is_one(configured: bool) -> None:
    budget = Budget(8 * MIB, configured=configured)
    queue = JobQueue(budget)
    budget.hold("a", 5 * MIB)
    said = [str(budget.refusal(owner, num_bytes * MIB, "an update")) for owner, num_bytes in (("a", 4), ("b", 3))]
    with pytest.raises(RequestTooLarge) as caught:
        queue._refuse_bytes(7 * MIB, _Lane("a"), "a gather", alone=True)
    said.append(str(caught.value))
    assert len(said) == 3
    assert all(text != "None" and ("shard.client_memory" in text) is configured for text in said), said
