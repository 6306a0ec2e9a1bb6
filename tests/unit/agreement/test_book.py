"""What steps consist of, whatever happens in whatever order: pure, nothing is sent."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mempool.agreement.book import Book, Step

NUM_BYTES = 68


@dataclass(frozen=True)
class Update:
    num_bytes: int = NUM_BYTES


def push(steps: Book[Update]) -> tuple[Step[Update], int]:
    sequence, step = steps.next_sequence(), steps.open
    step.add(sequence, Update())
    return step, sequence


def test_updates_after_the_seal_belong_to_the_next_step() -> None:
    steps = Book[Update](group="g", rank=3)
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
    assert steps.acknowledged() == 2
    assert steps.applying is closing
    assert (steps.pending, steps.pending_bytes) == (1, NUM_BYTES)
    last = steps.seal()
    assert last is not None
    assert (last.step_id.step, last.sealed) == (2, (3,))


def test_what_was_prepared_and_grew_becomes_one_later_step() -> None:
    steps = Book[Update](group="g")
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
    steps = Book[Update](group="g")
    push(steps)
    step = steps.seal()
    assert step is not None
    step.committing = True
    push(steps)
    assert not steps.merge()
    assert steps.closing is step
    assert steps.give_up() == 1
    assert (steps.pending, steps.given_up[0].step) == (1, 2)
    steps.given_up.clear()
    assert steps.nothing_to_drop


def test_a_failed_update_is_no_part_of_it_unless_it_was_sealed_meanwhile() -> None:
    steps = Book[Update](group="g")
    step, sequence = push(steps)
    step.remove(sequence)
    assert (steps.pending, steps.pending_bytes) == (0, 0)
    step, sequence = push(steps)
    steps.seal()
    step.remove(sequence)
    assert steps.pending == 1


def test_a_step_whose_number_is_over_goes_on_under_the_next_and_the_open_one_above_it() -> None:
    steps = Book[Update](group="g", generation=4)
    push(steps)
    closing = steps.seal()
    assert closing is not None
    push(steps)
    steps.renumber()
    assert (closing.step_id.step, closing.sealed, steps.open.step_id.step) == (3, (1,), 4)
    assert [step_id.step for step_id in steps.given_up] == [1, 2]
    assert closing.step_id.generation == 4
    assert steps.holds


@given(
    st.lists(
        st.sampled_from(["push", "push", "fail", "merge", "seal", "commit", "done", "applied", "give up", "renumber"]),
        max_size=30,
    )
)
def test_no_update_is_in_two_steps_and_all_bytes_are_counted(events: list[str]) -> None:
    steps, mine, over, numbers = Book[Update](group="g"), set[int](), set[int](), [0]
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
        elif event == "commit" and closing is not None:
            closing.committing = True
        elif event == "done" and closing is not None and closing.committing:
            over |= set(closing.sealed)
            numbers.append(closing.step_id.step)
            steps.acknowledged()
        elif event == "applied":
            steps.applied()
        elif event == "renumber" and closing is not None:
            steps.renumber()
        elif event == "give up":
            committing = set(closing.sealed) if closing is not None and closing.committing else set()
            dropped = mine - over - committing
            assert steps.give_up() == len(dropped)
            over |= dropped
        closed = set(steps.closing.sealed) if steps.closing else set()
        opened = set(steps.open.updates)
        assert not closed & opened
        assert closed | opened == mine - over
        assert steps.pending == len(mine - over)
        assert steps.pending_bytes == NUM_BYTES * len(mine - over)
        live = [step.step_id.step for step in (steps.closing, steps.open) if step is not None]
        assert live == sorted(set(live))
        assert numbers == sorted(set(numbers))
        assert not {step_id.step for step_id in steps.given_up} & {*numbers, *live}
