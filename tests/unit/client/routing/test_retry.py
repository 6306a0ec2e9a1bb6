"""The retry policy, fed with failures: no clock, no sleep."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.client.routing.retry import Again, Backoff, GiveUp, Retry
from mempool.client.routing.whereabouts import Whereabouts
from mempool.errors import (
    ContextMissing,
    DataLoss,
    DeadlineExceeded,
    InvalidRequest,
    MempoolError,
    NotFound,
    Overloaded,
    PoolUnreachable,
    ShardUnavailable,
    StalePlacement,
    Unauthenticated,
)


def make_retry(*, timeout_s: float = 30.0, jitter: float = 0.0) -> Retry:
    return Retry(
        table="facts",
        where=Whereabouts(name="run-7"),
        start_s=100.0,
        timeout_s=timeout_s,
        backoff=Backoff(first_s=0.05, longest_s=1.0),
        jitter=lambda: jitter,
    )


@pytest.mark.parametrize("error", [DataLoss("x"), InvalidRequest("x"), Unauthenticated("x"), NotFound("x")])
def test_what_no_retry_heals_passes_at_once(error: MempoolError) -> None:
    action = make_retry().failed(error, now_s=100.1)
    assert isinstance(action, GiveUp)
    assert action.error is error


def test_waits_double_up_to_the_longest() -> None:
    retry = make_retry()
    delays = []
    for _ in range(8):
        action = retry.failed(ShardUnavailable("x"), now_s=100.1)
        assert isinstance(action, Again)
        delays.append(action.delay_s)
    assert delays == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert retry.tries == 8


def test_an_overloaded_shard_is_given_the_time_it_asks_for() -> None:
    """Clients that were told the same time come back spread out."""
    for jitter, expected in ((0.0, 0.4), (1.0, 0.6)):
        action = make_retry(jitter=jitter).failed(Overloaded("full", retry_after_s=0.4), now_s=100.1)
        assert isinstance(action, Again)
        assert action.delay_s == pytest.approx(expected)
    for odd in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        action = make_retry().failed(Overloaded("full", retry_after_s=odd), now_s=100.1)
        assert isinstance(action, Again)
        assert action.delay_s == 0.05
    retry = make_retry(timeout_s=1.0)
    final = retry.failed(Overloaded("shard 3 is full", shard=3, retry_after_s=2.0), now_s=100.1)
    assert isinstance(final, GiveUp)
    assert isinstance(final.error, Overloaded)
    assert "'facts'" in str(final.error)
    assert "1 try; last: shard 3 is full" in str(final.error)
    assert final.error.shard == 3


@given(number=st.integers(1, 10_000), jitter=st.floats(0.0, 1.0))
def test_jitter_takes_up_to_half_off(number: int, jitter: float) -> None:
    whole = Backoff().delay_s(number, jitter=0.0)
    assert whole / 2 <= Backoff().delay_s(number, jitter=jitter) <= whole <= 1.0


def test_first_replan_does_not_wait_and_later_ones_do() -> None:
    retry = make_retry()
    delays = []
    for error in (StalePlacement("x"), ContextMissing("x"), StalePlacement("x")):
        action = retry.failed(error, now_s=100.1)
        assert isinstance(action, Again)
        delays.append(action.delay_s)
    assert delays == pytest.approx([0.0, 0.005, 0.01])


def test_a_replan_that_found_a_newer_view_starts_anew() -> None:
    """A call that meets one round of a move after another waits for each of them, and for nothing besides."""
    retry = make_retry()
    for _ in range(20):
        action = retry.failed(StalePlacement("x"), now_s=100.1)
        assert isinstance(action, Again)
        assert action.delay_s == 0.0
        retry.replanned()


def test_a_table_that_a_shard_does_not_know_may_only_not_be_attached_yet() -> None:
    error = NotFound("shard 3 has no table 7", shard=3)
    retry = make_retry()
    assert isinstance(retry.failed(error, now_s=100.1), Again)
    action = retry.failed(error, now_s=131.0)
    assert isinstance(action, GiveUp)
    assert action.error is error


def test_shard_that_stays_away_is_named_with_all_that_is_known() -> None:
    retry = make_retry(timeout_s=2.0)
    retry.failed(ShardUnavailable("UNAVAILABLE from 10.0.0.3:7070", shard=6), now_s=100.1)
    retry.failed(ShardUnavailable("UNAVAILABLE from 10.0.0.3:7070", shard=6), now_s=100.3)
    action = retry.failed(
        ShardUnavailable(
            "UNAVAILABLE from 10.0.0.3:7070. See which shards are up: mempool status", shard=6, address="10.0.0.3:7070"
        ),
        now_s=101.95,
    )
    assert isinstance(action, GiveUp)
    assert isinstance(action.error, ShardUnavailable)
    assert (action.error.shard, action.error.address) == (6, "10.0.0.3:7070")
    assert str(action.error) == (
        "table 'facts': shard 6 of pool 'run-7' did not answer within 2.0 s (3 tries; last: UNAVAILABLE from "
        "10.0.0.3:7070). See which shards are up: mempool status"
    )


def test_silence_until_the_deadline_names_the_silent_shard() -> None:
    error = make_retry(timeout_s=2.0).out_of_time(waiting_for=((4, "host:1"), (5, "host:2")), now_s=102.0)
    assert isinstance(error, ShardUnavailable)
    assert (error.shard, error.address) == (4, "host:1")
    assert "within 2.0 s (1 try; last: no answer from host:1)" in str(error)


def test_deadline_between_tries_tells_the_last_error() -> None:
    retry = make_retry(timeout_s=2.0)
    retry.failed(ShardUnavailable("connection refused", shard=1), now_s=100.5)
    error = retry.out_of_time(waiting_for=(), now_s=102.0)
    assert isinstance(error, ShardUnavailable)
    assert "last: connection refused" in str(error)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (StalePlacement("epoch 3, not 2", shard=1), DeadlineExceeded, "under one placement within 30.5 s"),
        (
            PoolUnreachable("refused"),
            PoolUnreachable,
            "pool 'run-7' did not answer within 30.5 s (1 try; last: refused)",
        ),
        (DeadlineExceeded("late"), DeadlineExceeded, "not done within 30.5 s (1 try; last: late)"),
    ],
)
def test_errors_of_the_end_keep_their_kind(error: MempoolError, kind: type[MempoolError], text: str) -> None:
    action = make_retry().failed(error, now_s=130.5)
    assert isinstance(action, GiveUp)
    assert type(action.error) is kind
    assert text in str(action.error)


def test_nobody_answered_about_the_table() -> None:
    error = make_retry(timeout_s=1.0).out_of_time(waiting_for=(), now_s=101.0)
    assert isinstance(error, PoolUnreachable)
    assert "'facts'" in str(error)


def test_a_try_cut_off_soon_does_not_hide_who_failed_before() -> None:
    retry = make_retry(timeout_s=2.0)
    retry.failed(ShardUnavailable("connection refused", shard=2, address="host:2"), now_s=101.5)
    error = retry.out_of_time(waiting_for=((0, "host:0"),), now_s=102.0)
    assert (error.shard, error.address) == (2, "host:2")

    patient = make_retry(timeout_s=2.0)
    patient.failed(ShardUnavailable("connection refused", shard=2, address="host:2"), now_s=100.1)
    assert patient.out_of_time(waiting_for=((0, "host:0"),), now_s=102.0).shard == 0
