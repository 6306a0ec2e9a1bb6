"""What steps consist of, whatever happens in whatever order: pure, nothing is sent."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from mempool.client.training.steps import Decision, Pushed, Step, Steps
from mempool.types.bags import Bags

BAGS = Bags(ids=torch.arange(3), weights=torch.ones(3), offsets=torch.tensor([0, 3]))
NUM_BYTES = 3 * 8 + 3 * 4 + 2 * 8 + 4 * 4


def push(steps: Steps) -> tuple[Step, int]:
    sequence, step = steps.next_sequence(), steps.open
    record = SimpleNamespace(bags=BAGS)
    step.add(sequence, Pushed(record=record, grads=torch.ones(1, 4)))  # type: ignore[arg-type]
    return step, sequence


def test_updates_after_the_seal_belong_to_the_next_step() -> None:
    steps = Steps(group="g", rank=3)
    assert steps.seal() is None
    push(steps)
    push(steps)
    closing = steps.seal()
    assert closing is not None
    assert (closing.step_id.group, closing.step_id.rank, closing.step_id.step) == ("g", 3, 1)
    assert closing.sealed == (1, 2)
    push(steps)
    assert (steps.pending, steps.pending_bytes) == (3, 3 * NUM_BYTES)
    assert steps.seal() is closing
    steps.acknowledged()
    assert (steps.pending, steps.pending_bytes) == (1, NUM_BYTES)
    last = steps.seal()
    assert last is not None
    assert (last.step_id.step, last.sealed) == (2, (3,))


def test_what_was_prepared_and_grew_becomes_one_later_step() -> None:
    steps = Steps(group="g")
    push(steps)
    first = steps.seal()
    push(steps)
    steps.merge()
    second = steps.seal()
    assert first is not None
    assert second is not None
    assert steps.given_up == [first.step_id]
    assert (second.step_id.step, second.sealed, second.num_bytes) == (2, (1, 2), 2 * NUM_BYTES)


def test_a_decided_step_neither_grows_nor_is_given_up() -> None:
    steps = Steps(group="g")
    push(steps)
    step = steps.seal()
    assert step is not None
    assert steps.decided is None
    step.decision = Decision(lr=0.1, grad_scale=1.0)
    push(steps)
    steps.merge()
    assert steps.decided is step
    assert steps.closing is step
    assert steps.give_up() == 1
    assert (steps.pending, steps.given_up[0].step) == (1, 2)
    steps.given_up.clear()
    assert steps.nothing_to_drop


def test_a_failed_update_is_no_part_of_it_unless_it_was_sealed_meanwhile() -> None:
    steps = Steps(group="g")
    step, sequence = push(steps)
    step.remove(sequence)
    assert (steps.pending, steps.pending_bytes) == (0, 0)
    step, sequence = push(steps)
    steps.seal()
    step.remove(sequence)
    assert steps.pending == 1


@given(st.lists(st.sampled_from(["push", "push", "fail", "merge", "seal", "decide", "done", "give up"]), max_size=30))
def test_no_update_is_in_two_steps_and_all_bytes_are_counted(events: list[str]) -> None:
    steps, mine, over = Steps(group="g"), set(), set()
    for event in events:
        closing = steps.closing
        if event == "push":
            mine.add(push(steps)[1])
        elif event == "fail":
            step, sequence = push(steps)
            step.remove(sequence)
        elif event == "merge":
            steps.merge()
        elif event == "seal":
            steps.seal()
        elif event == "decide" and closing is not None:
            closing.decision = Decision(lr=0.1, grad_scale=1.0)
        elif event == "done" and closing is not None and closing.decision is not None:
            over |= set(closing.sealed)
            steps.acknowledged()
        elif event == "give up":
            decided = set(steps.decided.sealed) if steps.decided else set()
            dropped = mine - over - decided
            assert steps.give_up() == len(dropped)
            over |= dropped
        closed = set(steps.closing.sealed) if steps.closing else set()
        opened = set(steps.open.updates)
        assert not closed & opened
        assert closed | opened == mine - over
        assert steps.pending == len(mine - over)
        assert steps.pending_bytes == NUM_BYTES * len(mine - over)
