"""When another shard is asked: after a moment, not too often, and not for nobody."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mempool.agreement.doubt import AGAIN_S, GRACE_S, Doubt


def test_nobody_is_asked_for_nobody() -> None:
    doubt = Doubt()
    assert doubt.ask_at() is None
    doubt.wait(5.0)
    doubt.wait(6.0)
    assert doubt.ask_at() == 5.0 + GRACE_S
    doubt.ends()
    assert doubt.ask_at() is None


def test_an_answer_is_for_those_who_waited_when_it_was_asked_for() -> None:
    doubt = Doubt()
    assert not doubt.covers(0.0)
    doubt.settled(3.0)
    doubt.settled(2.0)  # comes late
    assert [doubt.covers(since_s) for since_s in (1.0, 3.0, 3.1)] == [True, True, False]


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.sampled_from(["wait", "ends", "look"])), max_size=200))
def test_no_more_than_four_questions_a_second(events: list[tuple[float, str]]) -> None:
    doubt, now_s, asked = Doubt(), 0.0, []
    for later_s, event in events:
        now_s += later_s
        if event == "wait":
            doubt.wait(now_s)
        elif event == "ends":
            doubt.ends()
        at_s = doubt.ask_at()
        if at_s is not None and at_s <= now_s:
            assert doubt.since_s is not None
            assert now_s >= doubt.since_s + GRACE_S
            doubt.asked_s = now_s
            asked.append(now_s)
    assert all(later - earlier >= AGAIN_S - 1e-9 for earlier, later in itertools.pairwise(asked))
