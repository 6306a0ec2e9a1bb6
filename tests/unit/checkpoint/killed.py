"""Kills a process (SIGKILL) in the n-th thing that it asks of the system, in two checkpoints and two removals in a
folder, for every ``step``-th n, and looks each time at what is left. A process of its own: it forks.

    python -m tests.unit.checkpoint.killed FOLDER STEP
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from mempool.checkpoint.looking import checkpoints
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.removal import keep_newest
from mempool.checkpoint.stores.local import LocalStore
from tests.unit.checkpoint.contents import write
from tests.unit.checkpoint.test_crashes import MOMENTS, check, scenario, take

CALLS = ("mkdir", "write", "fsync", "replace", "unlink", "rmdir")


def die_at(number: int) -> None:
    """Let this process be killed in the n-th call from now on; of a write, half is done."""
    count = 0

    def counted(name: str, real: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                if name == "write":
                    real(given[0], given[1][: len(given[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def killed(place: Path, number: int) -> bool:
    """Whether the scenario was killed before its end."""
    child = os.fork()
    if not child:
        die_at(number)
        scenario(LocalStore(place), [])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


def main(folder: Path, step: int) -> None:
    torch.set_num_threads(1)  # no threads to lose in a fork
    before = LocalStore(folder / "before")
    take(before, 0)
    take(before, 1)
    kills = 0
    for number in itertools.count(1, step):
        place = folder / f"{number}"
        shutil.copytree(before.root, place)
        if not killed(place, number):
            break
        kills += 1
        store = LocalStore(place)
        assert all("problem" not in found for found in checkpoints(store))
        assert check(store, {}), f"killed in call {number}: nothing is left"
        write(store, MOMENTS[3], shards=1)
        keep_newest(store, 1)
        assert check(store, {}) == [3]
        left = {path.partition("/")[0] for path in store.list()}
        assert left == {Checkpoint(store).manifest.name}, f"killed in call {number}: {left} is left"
        shutil.rmtree(place)
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
