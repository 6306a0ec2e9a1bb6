"""What a rescale waits for is said once, while nothing is heard of it."""

import threading

import pytest

from mempool.cli import waiting
from mempool.cli.waiting import told_waits
from mempool.errors import PoolUnreachable
from mempool.types import PoolStatus, RescaleProgress

REPORT = RescaleProgress(
    shards_before=1, shards_after=2, pages_moved=0, pages_total=0, bytes_moved=0, bytes_total=0, table="", done=False
)


def test_each_thing_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_QUIET_S", 0.001)
    waits = ["", "a", "a", "away", "a", "b"]
    asked_all = threading.Event()
    said: list[str] = []
    seen: list[RescaleProgress] = []

    def ask() -> PoolStatus:
        wait = waits.pop(0) if waits else "b"
        if not waits:
            asked_all.set()
        if wait == "away":
            raise PoolUnreachable("the controller is away")
        return PoolStatus(name="p", shards=(), tables=(), rescaling=True, waiting_for=wait)

    def say(line: str) -> None:
        said.append(line)
        if line.endswith("b"):
            told.set()

    told = threading.Event()
    with told_waits(ask, say=say, progress=seen.append) as report:
        report(REPORT)
        assert asked_all.wait(20)
        assert told.wait(20)
    assert said == ["waiting for a", "waiting for b"]
    assert seen == [REPORT]
