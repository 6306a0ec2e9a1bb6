"""A short form of every attack; the long ones are commands (see each module)."""

import asyncio
from pathlib import Path

import pytest

from tests.hostile import fuzz, soak
from tests.hostile.raw import METHODS
from tests.hostile.target import Target

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "target.log"


def test_mutated_frames_change_nothing_and_kill_nobody(log: Path) -> None:
    with Target(shards=2, token="fuzz", log=log) as target:
        results = asyncio.run(fuzz.fuzz(target, frames=100, seed=20261128))
    assert {found.method.label for found in results} == set(METHODS)
    for found in results:
        assert not found.problems, f"{found.method.label}: {found.problems[0]}"
        assert found.statuses["INVALID_ARGUMENT"], f"{found.method.label} refused nothing: {found.statuses}"
    assert "Traceback" not in log.read_text()


def test_killed_clients_leave_nothing(log: Path) -> None:
    with Target(shards=1, token=soak.TOKEN, log=log) as target:
        said = asyncio.run(soak.recorded(target))
        soak.killed_clients(target, said, 60, seed=1)
        before = soak.settled(target)
        soak.killed_clients(target, said, 120, seed=2)
        after = soak.settled(target)
    assert after.descriptors <= before.descriptors + 5
    assert after.threads <= before.threads + 2
    assert after.resident <= before.resident + 64 * 2**20


def test_refused_calls_leave_nothing_where_no_collector_runs(log: Path) -> None:
    with Target(shards=1, token=soak.TOKEN, options=("--no-collector",), log=log) as target:
        asyncio.run(soak.refused_calls(target, 4))
        before = soak.settled(target)
        assert asyncio.run(soak.refused_calls(target, 12)) == {"ABORTED": 12}
        after = soak.settled(target)
    assert after.resident <= before.resident + 2 * soak.REFUSED_BYTES  # twelve were 720 MiB
