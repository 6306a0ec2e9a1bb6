"""A short form of the crash points of a shard's folder; `python -m tests.hostile.storage_crashes` has all."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.hostile.storage_crashes import CALLS, calls_of_one_run, check


def _can_trace() -> bool:
    """strace is there, and may trace (in a container it may not)."""
    return (
        shutil.which("strace") is not None
        and subprocess.run(["strace", "-o", "/dev/null", "true"], check=False, timeout=20).returncode == 0
    )


@pytest.mark.skipif(not _can_trace(), reason="no strace here that may trace")
def test_a_real_disk_that_fails_and_processes_that_die_lose_nothing(tmp_path: Path) -> None:
    calls = calls_of_one_run(tmp_path)
    assert set(calls) == set(CALLS)
    for call, how in (("fdatasync", "EIO"), ("pwritev2", "ENOSPC"), ("rename", "kill"), ("fsync", "kill")):
        assert check(tmp_path, call, how, calls[call] * 2 // 3) == []
