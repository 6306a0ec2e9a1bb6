"""Whole pools on seeds: a few runs of many (``make simulate`` makes more), and that a seed is one history."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.run import play

ROOT = Path(__file__).parents[2]
SEEDS = range(1, 13)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore")  # of processes that were killed with calls under way
def test_nothing_happens_that_may_not(seed: int) -> None:
    outcome = play(seed)
    assert not outcome.violations, f"make simulate SEEDS=1 SEED={seed}"


@pytest.mark.filterwarnings("ignore")
def test_a_seed_is_one_history_in_any_process() -> None:
    other_hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    script = "from tests.simulation.run import play; print(play(3).digest)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": other_hashes, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert done.stdout.split()[-1] == play(3).digest
