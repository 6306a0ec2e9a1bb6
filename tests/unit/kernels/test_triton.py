"""The tests of this folder on Triton: under its interpreter on the CPU, and compiled ahead for a GPU that is not here.

Both in processes of their own: Triton reads TRITON_INTERPRET once, when it is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROJECT = HERE.parents[2]
SUITES = [f"test_{name}.py" for name in ("bags", "updates", "topk", "bits")]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "MEMPOOL_TEST_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env=inherited | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )


@needs_triton
@pytest.mark.timeout(240)
def test_kernels_under_the_interpreter():
    """Every comparison with the reference, with Triton's interpreter as the implementation under test."""
    suites = [str(HERE / name) for name in SUITES]
    result = run(["-m", "pytest", "-q", *suites], TRITON_INTERPRET="1", MEMPOOL_TEST_KERNELS="triton:cpu")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@needs_triton
@pytest.mark.timeout(240)
def test_kernels_compile_for_sm90(tmp_path):
    """A GPU's compiler refuses what the interpreter lets pass, and strict kernels hold no fused multiply-add."""
    result = run([str(HERE / "compile_for_sm90.py")], TRITON_CACHE_DIR=str(tmp_path))
    if result.returncode == 3:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[-8000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {"weighted_sum_kernel", "step_kernel", "select_kernel", "flat_scores_kernel"} <= {line[0] for line in lines}
    for name, stored, cubin_bytes, num_fused in lines:
        assert int(cubin_bytes) > 0, (name, stored)
        assert int(num_fused) == 0, (name, stored)
