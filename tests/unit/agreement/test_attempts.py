"""Prepares of a step that come late, again, and after they were ended: only later ones count."""

from hypothesis import given
from hypothesis import strategies as st

from mempool.agreement.attempts import Attempts


def test_an_end_is_of_what_it_names_and_of_what_came_before() -> None:
    attempts = Attempts()
    attempts.prepared(1, 2)
    assert not attempts.end(1, 1)
    assert attempts.end(1, 2)
    assert attempts.end(1, 3)
    assert [bool(attempts.late(1, attempt)) for attempt in (1, 2, 3, 4)] == [True, True, True, False]


def test_a_later_step_begins_anew() -> None:
    attempts = Attempts()
    attempts.prepared(1, 9)
    attempts.end(1, 9)
    assert attempts.late(2, 1) == ""
    attempts.prepared(2, 1)
    assert attempts.late(1, 10) == "step 2 has begun since"
    assert attempts.late(2, 1) == ""
    assert not attempts.end(2, 0)


def test_what_is_not_counted_is_never_late() -> None:
    attempts = Attempts()
    attempts.prepared(1, 0)
    assert attempts.end(1, 0)
    assert attempts.late(1, 0) == ""
    attempts.prepared(1, 3)
    assert attempts.late(1, 0) == ""
    assert not attempts.end(1, 0)


MESSAGES = st.lists(st.tuples(st.sampled_from(["prepare", "end"]), st.integers(1, 3), st.integers(1, 4)), max_size=30)


@given(MESSAGES)
def test_in_whatever_order_they_come_the_latest_says_what_is_prepared(messages: list[tuple[str, int, int]]) -> None:
    """Of each (step, attempt) a trainer sends a Prepare, then perhaps an end: so its order is theirs."""
    attempts = Attempts()
    prepared: tuple[int, int] | None = None
    for kind, step, attempt in messages:
        if kind == "prepare":
            if not attempts.late(step, attempt):
                attempts.prepared(step, attempt)
                prepared = step, attempt
        elif attempts.end(step, attempt) and prepared is not None and prepared[0] == step:
            prepared = None
    last = max(messages, key=lambda each: (each[1], each[2], each[0] == "end"), default=None)
    expected = None
    if last is not None and last[0] == "prepare":
        expected = last[1:]
    if last is not None and last[0] == "end" and prepared is not None:
        assert prepared[0] < last[1]  # an earlier step, whose end is its own
        return
    assert prepared == expected
