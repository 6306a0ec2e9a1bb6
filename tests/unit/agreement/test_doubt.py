"""When another shard is asked: after a moment, not too often, and not for nobody."""

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


def test_whoever_comes_after_a_question_is_asked_for_soon_and_whoever_it_did_not_settle_later() -> None:
    doubt = Doubt()
    doubt.wait(5.0)
    doubt.asked(5.1)
    assert doubt.ask_at() == 5.1 + AGAIN_S
    doubt.wait(5.2)
    assert doubt.ask_at() == 5.2 + GRACE_S
    doubt.wait(5.21, at_once=True)
    assert doubt.ask_at() == 5.21


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.sampled_from(["wait", "at once", "ends", "look"])), max_size=200))
def test_no_more_than_one_question_for_those_who_came_and_then_four_a_second(events: list[tuple[float, str]]) -> None:
    doubt, now_s = Doubt(), 0.0
    came: list[float] = []  # when those are due who wait since the last question
    asked_s: float | None = None  # for those who wait still
    for later_s, event in events:
        now_s += later_s
        if event in ("wait", "at once"):
            doubt.wait(now_s, at_once=event == "at once")
            came.append(now_s + (0.0 if event == "at once" else GRACE_S))
        elif event == "ends":
            doubt.ends()
            came, asked_s = [], None
        due = [*came, *([] if asked_s is None else [asked_s + AGAIN_S])]
        assert doubt.ask_at() == min(due, default=None)
        if due and min(due) <= now_s:
            doubt.asked(now_s)
            came, asked_s = [], now_s
