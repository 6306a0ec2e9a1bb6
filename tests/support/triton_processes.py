"""Processes of their own for Triton, which reads TRITON_INTERPRET once, when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

_PROJECT = Path(__file__).parents[2]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "MEMPOOL_TEST_"))}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=_PROJECT,
        env=inherited | {"PYTHONPATH": str(_PROJECT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=880)
    finally:
        process.kill()
