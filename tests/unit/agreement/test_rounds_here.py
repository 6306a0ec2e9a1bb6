"""Of all rounds of moves one holds a table, for as long as its lease, and once over it never comes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.agreement import rounds_here
from mempool.agreement.rounds_here import Fate, RoundsHere, fate_of_lapsed
from mempool.errors import StalePlacement


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def expire(rounds: RoundsHere) -> bool:
    """As a table's gate does: whether the lease of a round had ended, which is over then."""
    return rounds.lapsed and rounds.end()


def test_a_round_holds_for_its_lease_unless_it_is_said_again() -> None:
    clock = Clock()
    rounds = RoundsHere(clock)
    rounds.begin("a", 10.0)
    clock.now_s += 9.0
    assert not expire(rounds)
    rounds.begin("a", 10.0)
    clock.now_s += 9.0
    assert not expire(rounds)
    assert rounds.token
    clock.now_s += 1.0
    assert expire(rounds)
    assert not rounds.token
    assert not expire(rounds)
    with pytest.raises(StalePlacement, match="round 'a' of a move is over on this shard"):
        rounds.begin("a", 10.0)


def test_without_a_lease_it_holds_until_it_is_ended() -> None:
    clock = Clock()
    rounds = RoundsHere(clock)
    rounds.begin("a", 0.0)
    clock.now_s += 1e9
    assert not expire(rounds)
    assert rounds.end("a")
    assert not rounds.token


def test_one_round_at_a_time() -> None:
    rounds = RoundsHere(Clock())
    rounds.begin("a", 0.0)
    for refused in (lambda: rounds.begin("b", 1.0), lambda: rounds.check("b"), lambda: rounds.join("b", 1.0)):
        with pytest.raises(StalePlacement, match="round 'a' of a move holds the table, and round 'b' asks"):
            refused()
    assert not rounds.end("b")
    assert rounds.token
    assert rounds.end("")
    rounds.begin("c", 1.0)
    with pytest.raises(StalePlacement, match="round 'b' of a move is over"):
        rounds.check("b")  # it was ended before it began


def test_who_joins_goes_on_while_pages_come_and_a_freeze_is_not_prolonged_by_them() -> None:
    clock = Clock()
    rounds = RoundsHere(clock)
    rounds.join("a", 10.0)
    clock.now_s += 9.0
    rounds.join("a", 10.0)
    clock.now_s += 9.0
    assert not expire(rounds)
    rounds.begin("a", 5.0)
    clock.now_s += 4.0
    rounds.join("a", 10.0)
    clock.now_s += 1.0
    assert expire(rounds)
    with pytest.raises(StalePlacement, match="is over"):
        rounds.join("a", 10.0)


@pytest.mark.parametrize(
    ("gate_epoch", "gate_token", "fate"),
    [
        (None, None, "wait"),
        (1, None, "wait"),
        (2, "a", "wait"),
        (2, "b", "thaw"),
        (2, None, "thaw"),
        (3, "a", "adopt"),
        (3, None, "adopt"),
    ],
)
def test_the_gate_says_what_becomes_of_a_round_by_its_token(
    gate_epoch: int | None, gate_token: str | None, fate: Fate
) -> None:
    assert fate_of_lapsed("a", epoch=2, gate_epoch=gate_epoch, gate_token=gate_token) == fate


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds_here, "MAX_OVER", 3)
    rounds = RoundsHere(Clock())
    for number in range(10):
        rounds.end(f"round {number}")
    assert list(rounds._over) == ["round 7", "round 8", "round 9"]


@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "join", "check", "end", "later"]), st.sampled_from("abcd")), max_size=60
    )
)
def test_a_round_that_is_over_never_comes_back(events: list[tuple[str, str]]) -> None:
    clock = Clock()
    rounds = RoundsHere(clock)
    over: set[str] = set()
    held = ""
    for event, token in events:
        if event == "later":
            clock.now_s += 6.0
            if expire(rounds):
                over.add(held)
                held = ""
            continue
        if event == "end":
            assert rounds.end(token) == (token == held)
            held = "" if token == held else held
            over.add(token)
            continue
        refused = token in over or held not in ("", token)
        try:
            getattr(rounds, event)(*([token] if event == "check" else [token, 10.0]))
            assert not refused
            held = held if event == "check" else token
        except StalePlacement:
            assert refused
        assert (rounds.token is not None) == bool(held)
