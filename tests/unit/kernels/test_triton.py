"""The tests of this folder on Triton: under its interpreter on the CPU, and compiled ahead for a GPU that is not here.

Both in processes of their own: Triton reads TRITON_INTERPRET once, when it is imported.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROJECT = HERE.parents[2]
SUITES = [f"test_{name}.py" for name in ("bags", "ids", "updates", "optimizers", "options", "topk", "bits")]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "MEMPOOL_TEST_"))}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env=inherited | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=880)
    finally:
        process.kill()


@needs_triton
@pytest.mark.timeout(900)
def test_kernels_under_the_interpreter():
    """Every comparison with the reference, with Triton's interpreter as the implementation under test."""
    suites = [str(HERE / name) for name in SUITES]
    process = start(["-m", "pytest", "-q", *suites], TRITON_INTERPRET="1", MEMPOOL_TEST_KERNELS="triton:cpu")
    stdout, stderr = finish(process)
    assert process.returncode == 0, stdout[-8000:] + stderr[-2000:]
    assert " passed" in stdout


@pytest.fixture(scope="module")
def compiled(pytestconfig) -> list[dict]:
    """What a GPU's compiler made of each kernel, which refuses what the interpreter lets pass. It is kept, by sources
    and options, where pytest keeps what it remembers."""
    script, cache = str(HERE / "compile_for_sm90.py"), str(pytestconfig.cache.mkdir("triton"))
    process = start([script], TRITON_CACHE_DIR=cache)
    stdout, stderr = finish(process)
    if process.returncode == 3:
        pytest.skip(stdout)
    assert process.returncode == 0, stdout[-1000:] + stderr[-8000:]
    return [json.loads(line) for line in stdout.splitlines()]


@needs_triton
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_a_gpu(compiled):
    assert {
        *("weighted_sum_kernel", "gather_rows_kernel", "scatter_rows_kernel", "weight_gradient_kernel"),
        *("sort_keys_kernel", "run_heads_kernel", "runs_kernel", "sum_pieces_kernel", "segment_sum_kernel"),
        *("step_kernel", "catch_up_kernel", "squared_norm_kernel"),
        *("select_kernel", "product_scores_kernel", "flat_scores_kernel"),
    } <= {line["kernel"] for line in compiled}


@needs_triton
@pytest.mark.timeout(900)
def test_no_kernel_spills_registers(compiled):
    assert [line for line in compiled if line["spilled"]] == []


@needs_triton
@pytest.mark.timeout(900)
def test_strict_kernels_hold_no_fused_multiply_add(compiled):
    """But for weighted sums, whose products are added by nothing else."""
    strict = [line for line in compiled if line["strict"] and line["kernel"] != "weighted_sum_kernel"]
    assert [line for line in strict if line["fused"]] == []
    assert {line["kernel"] for line in strict} >= {"segment_sum_kernel", "step_kernel"}
    sums = [line for line in compiled if line["kernel"] == "weighted_sum_kernel"]
    assert len(sums) >= 12
    assert [line["case"] for line in sums if not line["fused"]] in ([], ["odd"]), (
        "bfloat16 without weights has no product"
    )


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("width", [64, 1024, 4096])
@pytest.mark.parametrize("element", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_rows_are_read_and_written_16_bytes_at_a_time(compiled, width, element):
    """What is read narrower are ids, pages, weights and scales: 4 or 8 bytes each."""
    lines = {line["kernel"]: line for line in compiled if line["case"] == f"{element} {width}"}
    for kernel in ("weighted_sum_kernel", "gather_rows_kernel", "weight_gradient_kernel", "step_kernel"):
        line = lines[kernel]
        assert set(line["load"]) <= {"4", "8", "16"}, line
        assert line["load"]["16"] >= 1, line
        assert set(line["store"]) <= {"4", "16"}, line
        if kernel != "weight_gradient_kernel":
            assert line["store"]["16"] >= 1, line
    # Enough of them for one thread before it adds the first.
    assert lines["weighted_sum_kernel"]["load"]["16"] >= 8
    assert lines["weight_gradient_kernel"]["load"]["16"] >= 2
