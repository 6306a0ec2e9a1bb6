"""Rounds are interleaved, their order moves on, and nobody gets the inputs of the one before him."""

import itertools
import time

import pytest

from mempool.bench import measuring
from mempool.bench.measuring import MIN_ROUNDS, Contender, Times, interleaved


def test_order_and_inputs() -> None:
    calls: list[tuple[str, int]] = []
    contenders = [Contender(name, lambda i, name=name: calls.append((name, i))) for name in "abc"]  # type: ignore[misc]
    times = interleaved(contenders, num_inputs=4, rounds=40)
    assert all(len(one.rounds_ms) == 40 for one in times.values())
    rounds = [calls[first : first + 6] for first in range(0, len(calls), 6)]
    assert len(rounds) == 42, "two of them only warm up"
    for one in rounds:  # each untimed, then timed
        assert sorted({name for name, _ in one}) == ["a", "b", "c"]
        assert all(one[place][0] == one[place + 1][0] for place in (0, 2, 4))
    assert [one[0][0] for one in rounds] == ["b", "c", "a"] * 14
    for (_, inputs), (_, following) in itertools.pairwise(calls):
        assert inputs != following
    for name in "abc":
        assert {inputs for found, inputs in calls if found == name} == {0, 1, 2, 3}


def test_what_comes_before_is_done_every_time_on_the_same_inputs() -> None:
    calls: list[tuple[str, int]] = []
    contender = Contender("a", lambda i: calls.append(("run", i)), lambda i: calls.append(("before", i)))
    interleaved([contender], num_inputs=2, rounds=3)
    assert [what for what, _ in calls] == ["before", "run"] * 10
    assert all(calls[place][1] == calls[place + 1][1] for place in range(0, len(calls), 2))


@pytest.mark.parametrize(("beside_a_short_one", "runs"), [(True, 2 * 5), (False, 2 * 2 + 3)])
def test_contenders_of_a_case_are_warmed_up_alike(
    monkeypatch: pytest.MonkeyPatch, beside_a_short_one: bool, runs: int
) -> None:
    monkeypatch.setattr(measuring, "_SHORT_MS", 5.0)
    calls: list[int] = []

    def slow(inputs: int) -> None:
        calls.append(inputs)
        time.sleep(0.01)

    short = [Contender("short", lambda _: None)] if beside_a_short_one else []
    interleaved([Contender("long", slow), *short], num_inputs=2, rounds=3)
    assert len(calls) == runs


@pytest.mark.parametrize(("rounds", "made"), [(100, MIN_ROUNDS), (2, 2)])
def test_a_spent_budget_ends_a_case_after_the_fewest_rounds(rounds: int, made: int) -> None:
    times = interleaved([Contender("a", lambda _: None)], num_inputs=1, rounds=rounds, budget_s=0.0)
    assert len(times["a"].rounds_ms) == made


def test_median_and_spread() -> None:
    times = Times((3.0, 1.0, 10.0))
    assert (times.median_ms, times.min_ms, times.max_ms) == (3.0, 1.0, 10.0)
    assert times.over(Times((1.0, 1.0, 5.0))) == 2.0, "round by round: 3, 1 and 2"
