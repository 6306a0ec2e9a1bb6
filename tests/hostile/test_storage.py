"""A short form of the crash points of a shard's folder; `python -m tests.hostile.storage_crashes` has all."""

import shutil
from pathlib import Path

import pytest

from tests.hostile.storage_crashes import CALLS, calls_of_one_run, check


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_a_real_disk_that_fails_and_processes_that_die_lose_nothing(tmp_path: Path) -> None:
    try:
        calls = calls_of_one_run(tmp_path)
    except AssertionError as error:
        pytest.skip(f"strace may not trace here: {error}")
    assert set(calls) == set(CALLS)
    for call, how in (("fdatasync", "EIO"), ("pwritev2", "ENOSPC"), ("rename", "kill"), ("fsync", "kill")):
        assert check(tmp_path, call, how, calls[call] * 2 // 3) == []
