"""What a GPU's compiler makes of the kernels, compiled ahead for a GPU that is not here. Needs none of the CPU's."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from tests.support.triton_processes import finish, start

# Every width with elements that are packed and that are not; all of them in `make test-long`.
ROWS = (
    [(element, width) for width in (64, 1024, 4096) for element in ("float32", "bfloat16", "float8_e4m3fn", "int8")]
    if os.environ.get("MEMPOOL_TEST_LONG")
    else [
        *(("float32", 64), ("int8", 64), ("bfloat16", 1024), ("float8_e4m3fn", 1024)),
        *(("float32", 4096), ("int8", 4096)),
    ]
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled(pytestconfig) -> list[dict]:
    """What a GPU's compiler made of each kernel, which refuses what the interpreter lets pass. It is kept, by sources
    and options, where pytest keeps what it remembers."""
    script, cache = str(Path(__file__).parent / "compile_for_sm90.py"), str(pytestconfig.cache.mkdir("triton"))
    process = start([script, *(f"{element}:{width}" for element, width in ROWS)], TRITON_CACHE_DIR=cache)
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
    assert len(sums) >= len(ROWS)
    assert [line["case"] for line in sums if not line["fused"]] in ([], ["odd"]), (
        "bfloat16 without weights has no product"
    )


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("element", "width"), ROWS)
def test_rows_are_read_and_written_16_bytes_at_a_time(compiled, element, width):
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
