"""The tests of this folder on Triton's interpreter, on the CPU, in a process of its own."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.triton_processes import finish, start

HERE = Path(__file__).parent
SUITES = [f"test_{name}.py" for name in ("bags", "ids", "updates", "optimizers", "options", "topk", "bits")]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(900)
def test_kernels_under_the_interpreter():
    """Every comparison with the reference, with Triton's interpreter as the implementation under test."""
    suites = [str(HERE / name) for name in SUITES]
    process = start(["-m", "pytest", "-q", *suites], TRITON_INTERPRET="1", MEMPOOL_TEST_KERNELS="triton:cpu")
    stdout, stderr = finish(process)
    assert process.returncode == 0, stdout[-8000:] + stderr[-2000:]
    assert " passed" in stdout
