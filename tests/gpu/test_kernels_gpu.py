"""The unit tests of the kernels on a CUDA device: the same comparisons, compiled by Triton for the GPU that is here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[2]
SUITES = [f"tests/unit/kernels/test_{name}.py" for name in ("bags", "updates", "topk", "bits")]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.mark.timeout(600)
def test_kernels_on_cuda():
    """In a process of its own, where TRITON_INTERPRET is not set and kernels are really compiled."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *SUITES],
        cwd=PROJECT,
        env=inherited | {"MEMPOOL_TEST_KERNELS": "triton:cuda"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.timeout(120)
def test_rows_beyond_2_to_the_31_elements():
    """Addresses are int64: the last rows of an arena of more than 2**31 elements are read and written."""
    from mempool import kernels
    from mempool.kernels import Paged

    width, page_shift = 256, 10
    num_pages = (2**31 // width >> page_shift) + 2
    if torch.cuda.mem_get_info()[0] < (num_pages << page_shift) * width * 2 + 2**30:
        pytest.skip("not enough free GPU memory")
    rows = torch.zeros(num_pages << page_shift, width, dtype=torch.bfloat16, device="cuda")
    paged = Paged(rows, torch.arange(num_pages, dtype=torch.int32, device="cuda"), page_shift)
    last = (num_pages << page_shift) - 1
    ids = torch.tensor([last, 0, last], device="cuda")
    values = torch.stack([torch.full((width,), value) for value in (1.0, 2.0, 3.0)]).to("cuda", torch.bfloat16)
    kernels.scatter_rows(paged, ids, values)
    assert rows[last].eq(3.0).all()
    assert rows[0].eq(2.0).all()
    offsets = torch.tensor([0, 3], device="cuda")
    assert kernels.weighted_sum(paged, ids, None, offsets).eq(8.0).all()
    grads = torch.ones(1, width, device="cuda")
    assert kernels.weight_gradient(paged, ids, offsets, grads).tolist() == [3.0 * width, 2.0 * width, 3.0 * width]
