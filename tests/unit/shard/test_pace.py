"""Pieces are small where somebody else asks for little, and only there."""

import asyncio

import pytest

from mempool.observe import Stages
from mempool.shard import Engine
from mempool.shard.work import pace as of_pace
from mempool.shard.work.pace import (
    LEAST_PIECE_BYTES,
    LITTLE_BYTES,
    PIECE_BYTES,
    PIECE_S,
    WHOLE_BYTES,
    Pace,
)
from mempool.shard.work.thread import EngineThread
from mempool.types.caller import Caller
from tests.contract.bags import make_bags
from tests.contract.driver import make_schema

from .conftest import MakeDriver

SECONDS_A_BYTE = 2e-10  # 5 GB/s


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    made = Pace(clock)
    for _ in range(50):
        made.took(WHOLE_BYTES, WHOLE_BYTES * SECONDS_A_BYTE)
    return made


@pytest.mark.parametrize("line", ["unix:7:", "ipv4:10.0.0.1:7/", "ipv6:%5B::1%5D:7/"])
def test_who_is_alone_is_answered_in_one_go(pace: Pace, line: str) -> None:
    for cost in (1000, 10 * LITTLE_BYTES):  # its own small calls, too
        pace.asks(f"{line}1", cost)
        pace.asks(f"{line}2", cost)
    pace.serves(f"{line}1")
    assert not pace.is_shared
    assert pace.piece_bytes == PIECE_BYTES
    assert not pace.is_long(WHOLE_BYTES)
    assert pace.is_long(WHOLE_BYTES + 1)


def test_others_who_ask_for_as_much_change_nothing(pace: Pace) -> None:
    for other in ("unix:8:1", "ipv4:10.0.0.1:4", "ipv4:10.0.0.1:5", "ipv4:10.0.0.1:4/1"):
        pace.asks(other, LITTLE_BYTES)
    pace.serves("unix:7:1")
    assert not pace.is_long(WHOLE_BYTES)


@pytest.mark.parametrize("other", ["unix:8:1", "ipv4:10.0.0.1:4", "ipv4:10.0.0.1:4/9"])
def test_a_piece_takes_a_millisecond_where_another_asks_for_little(pace: Pace, clock: Clock, other: str) -> None:
    pace.asks(other, 1000)
    pace.asks("unix:7:1", 1000)  # and the one that is served, later
    pace.serves("unix:7:2")
    assert pace.is_shared
    assert pace.piece_bytes * SECONDS_A_BYTE == pytest.approx(PIECE_S, rel=0.01)
    assert pace.is_long(int(2.1 * PIECE_S / SECONDS_A_BYTE))
    assert not pace.is_long(int(1.9 * PIECE_S / SECONDS_A_BYTE))
    pace.serves(other)
    assert pace.is_shared, "the first is another to that one"
    pace.asks(other, 1000)
    pace.asks(other, 1000)
    assert pace.is_shared_by("unix:7:9"), "whoever is served now"
    clock.now_s += 0.9
    pace.asks(other, 1000)
    clock.now_s += 0.2
    assert not pace.is_shared_by(other), "of whom it is asked counts, not who was served last"
    assert pace.is_long(int(2.1 * PIECE_S / SECONDS_A_BYTE), "unix:7:9")
    assert not pace.is_long(WHOLE_BYTES, other)
    clock.now_s += 1.5
    assert not pace.is_shared, "they have gone"


def test_pieces_are_within_bounds_at_any_speed(pace: Pace) -> None:
    pace.asks("unix:8:1", 1)
    pace.serves("unix:7:1")
    for seconds, expected in ((0.0, PIECE_BYTES), (1e6, LEAST_PIECE_BYTES)):
        for _ in range(200):
            pace.took(WHOLE_BYTES, seconds)
        assert pace.piece_bytes == expected
    pace.took(LEAST_PIECE_BYTES // 2 - 1, 0.0)
    assert pace.piece_bytes == LEAST_PIECE_BYTES, "what is begun takes time besides; little says nothing of it"


def test_who_was_slow_for_a_moment_is_not_taken_for_slow_by_its_own_small_pieces(pace: Pace) -> None:
    pace.asks("unix:8:1", 1)
    pace.serves("unix:7:1")
    for _ in range(10):
        pace.took(WHOLE_BYTES, 10.0)
    assert pace.piece_bytes == LEAST_PIECE_BYTES
    for _ in range(200):
        num_bytes = int(0.9 * pace.piece_bytes)  # up to the last bag that fits
        pace.took(num_bytes, num_bytes * SECONDS_A_BYTE)
    assert pace.piece_bytes * SECONDS_A_BYTE == pytest.approx(PIECE_S, rel=0.01)


def test_speed_is_told_by_the_shards_clock_alone(
    make_driver: MakeDriver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs on a seed have a clock of their own: what takes longer there must change nothing."""
    monkeypatch.setattr(of_pace, "LEAST_PIECE_BYTES", 1)
    driver = make_driver(clock=clock).create(make_schema())
    driver.gather(make_bags(1))
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    assert engine._thread.pace._s_per_byte == 0.0


@pytest.mark.parametrize(("stage", "cuts"), [("gather", True), ("score", True), ("prepare", False), ("commit", False)])
def test_steps_of_another_trainer_are_no_small_calls(stage: str, cuts: bool) -> None:
    async def body() -> None:
        thread = EngineThread(name="shard 3", stages=Stages())
        try:
            await thread.run(stage, lambda _: None, caller=Caller("ipv4:10.0.0.1:4"))
            thread.pace.serves("unix:7:1")
            assert thread.pace.is_shared == cuts
        finally:
            await thread.close()

    asyncio.run(body())
