"""Short forms of `tests.hostile.storage_crashes` and `shard_crashes` (every crash point of a journal, of a shard), and
of `memory_kills` (of a whole pool)."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mempool.shard.durable.store import Store
from tests.hostile.storage_crashes import CALLS, calls_of_one_run, check
from tests.support.memory_lives import JOURNAL_LIMIT_BYTES, Undisturbed, compare, live


def _can_trace() -> bool:
    """strace is there, and may trace (in a container it may not)."""
    return (
        shutil.which("strace") is not None
        and subprocess.run(["strace", "-o", "/dev/null", "true"], check=False, timeout=20).returncode == 0
    )


needs_strace = pytest.mark.skipif(not _can_trace(), reason="no strace here that may trace: apt install strace")


@needs_strace
def test_a_real_disk_that_fails_and_processes_that_die_lose_nothing(tmp_path: Path) -> None:
    calls = calls_of_one_run(tmp_path)
    assert set(calls) == set(CALLS)
    for call, how in (("fdatasync", "EIO"), ("pwritev2", "ENOSPC"), ("rename", "kill"), ("fsync", "kill")):
        assert check(tmp_path, call, how, calls[call] * 2 // 3) == []


@needs_strace
def test_a_shard_that_dies_or_whose_disk_fails_at_any_call_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hostile.shard_crashes", str(tmp_path), "--every", "800"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no violation" in done.stdout


def test_a_pool_whose_process_is_killed_again_and_again_is_as_one_that_never_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Store.__init__.__kwdefaults__, "journal_limit", JOURNAL_LIMIT_BYTES)
    oracle, dice, stands = Undisturbed(), random.Random(1), 0
    try:
        for _ in range(2):
            stands = live(tmp_path, oracle=oracle, dice=dice, known=stands, longest_s=1.0).stood
        compare(tmp_path, oracle, at_least=stands)
    finally:
        oracle.close()
