"""Steps that a freeze has held off go before the next freeze, which waits for nobody for long."""

from hypothesis import given
from hypothesis import strategies as st

from mempool.agreement.turns import MOST, TURN_S, Turns
from mempool.types import StepId


def step(rank: int, number: int = 1) -> StepId:
    return StepId(group="g", rank=rank, step=number)


def test_a_freeze_waits_for_those_that_the_last_one_held_off() -> None:
    turns = Turns()
    turns.held_off(step(0))
    turns.held_off(step(1))
    assert turns.ends_s(5.0) is None  # their freeze has not ended
    turns.thawed(10.0)
    assert turns.ends_s(10.0) == 10.0 + TURN_S
    turns.served(step(0))
    assert turns.ends_s(10.5) == 10.0 + TURN_S
    turns.served(step(1, number=2))  # it went on under another number
    assert turns.ends_s(10.5) is None


def test_it_waits_for_nobody_for_longer_than_a_turn() -> None:
    turns = Turns()
    turns.held_off(step(0))
    turns.thawed(10.0)
    assert turns.ends_s(10.0 + TURN_S) is None
    turns.thawed(20.0)  # and not again for whoever did not come
    assert turns.ends_s(20.0) is None


def test_a_freeze_that_held_off_nobody_gives_no_turn() -> None:
    turns = Turns()
    turns.thawed(10.0)
    assert turns.ends_s(10.0) is None


def test_a_step_that_the_new_view_has_set_back_goes_first_too() -> None:
    turns = Turns()
    turns.set_back(step(0), 9.0)  # by something else than a freeze
    turns.thawed(10.0)
    assert turns.ends_s(10.0) is None
    turns.set_back(step(0), 10.2)
    assert turns.ends_s(10.5) == 10.0 + TURN_S  # however late it says so, the turn is not longer
    turns.served(step(0))
    assert turns.ends_s(10.5) is None
    turns.set_back(step(1), 10.0 + TURN_S)  # late
    assert turns.ends_s(10.0 + TURN_S) is None
    turns.thawed(20.0)
    assert turns.ends_s(20.0) is None


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("held off"), st.integers(0, 5)),
            st.tuples(st.just("set back"), st.integers(0, 5)),
            st.tuples(st.just("served"), st.integers(0, 5)),
            st.tuples(st.just("thawed"), st.just(0)),
            st.tuples(st.just("later"), st.integers(0, 3)),
        ),
        max_size=40,
    )
)
def test_whatever_happens_a_turn_ends_and_nobody_served_is_waited_for(events: list[tuple[str, int]]) -> None:
    turns, now_s, thawed_s, waiting = Turns(), 0.0, None, set[int]()
    for what, number in events:
        if what == "held off":
            turns.held_off(step(number))
            waiting.add(number)
        elif what == "set back":
            turns.set_back(step(number), now_s)
            waiting.add(number)
        elif what == "served":
            turns.served(step(number))
            waiting.discard(number)
        elif what == "thawed":
            turns.thawed(now_s)
            thawed_s = now_s
        else:
            now_s += number * TURN_S / 2
        ends_s = turns.ends_s(now_s)
        assert ends_s is None or (waiting and thawed_s is not None and now_s < ends_s <= thawed_s + TURN_S)


def test_many_ranks_are_not_all_remembered() -> None:
    turns = Turns()
    for rank in range(MOST + 1):
        turns.held_off(step(rank))
    turns.thawed(0.0)
    for rank in range(MOST):
        turns.served(step(rank))
    assert turns.ends_s(0.0) is None
