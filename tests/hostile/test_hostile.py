"""A short form of every attack; the long ones are commands (see each module)."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile import fuzz, soak
from tests.hostile.raw import METHODS
from tests.hostile.target import Target

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "target.log"


@pytest.fixture(scope="module")
def target(log: Path) -> Iterator[Target]:
    """One for those that attack it in ways that it must outlive."""
    with Target(shards=2, token=soak.TOKEN, log=log) as target:
        yield target


def test_mutated_frames_change_nothing_and_kill_nobody(target: Target, log: Path) -> None:
    results = asyncio.run(fuzz.fuzz(target, frames=60, seed=20261128))
    assert {found.method.label for found in results} == set(METHODS)
    for found in results:
        assert not found.problems, f"{found.method.label}: {found.problems[0]}"
        assert found.statuses["INVALID_ARGUMENT"], f"{found.method.label} refused nothing: {found.statuses}"
    assert "Traceback" not in log.read_text()


def test_killed_clients_leave_nothing(target: Target) -> None:
    said = asyncio.run(soak.recorded(target))
    soak.killed_clients(target, said, 24, seed=1)
    before = soak.settled(target)
    soak.killed_clients(target, said, 48, seed=2)
    after = soak.settled(target)
    assert after.descriptors <= before.descriptors + 5
    assert after.threads <= before.threads + 2
    assert after.resident <= before.resident + 64 * 2**20


def test_refused_calls_leave_nothing_where_no_collector_runs(tmp_path: Path) -> None:
    with Target(shards=1, token=soak.TOKEN, options=("--no-collector",), log=tmp_path / "target.log") as target:
        asyncio.run(soak.refused_calls(target, 2))
        before = soak.settled(target)
        assert asyncio.run(soak.refused_calls(target, 6)) == {"ABORTED": 6}
        most = before.resident + 2 * soak.REFUSED_BYTES  # six were 360 MiB
        after = soak.settled(target, resident=most)
    assert after.resident <= most
