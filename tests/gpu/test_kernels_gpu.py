"""The kernels on a CUDA device: the unit tests compiled for the GPU that is here, and what only real sizes show."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mempool import kernels
from mempool.kernels import OptimizerStep, PackedLayout, Paged, RandomRounding

PROJECT = Path(__file__).parents[2]
SUITES = [f"tests/unit/kernels/test_{name}.py" for name in ("bags", "updates", "optimizers", "topk", "bits")]

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.mark.timeout(900)
def test_kernels_on_cuda():
    """In a process of its own, where TRITON_INTERPRET is not set and kernels are really compiled."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *SUITES],
        cwd=PROJECT,
        env=inherited | {"MEMPOOL_TEST_KERNELS": "triton:cuda"},
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def empty_arena(
    num_rows: int, width: int, element: kernels.Element, device: str
) -> tuple[torch.Tensor, PackedLayout | None]:
    if element == "int8" or element == "float8_e4m3fn":
        packed = PackedLayout(element, width, 64)
        return torch.zeros(num_rows, packed.row_bytes, dtype=torch.uint8, device=device), packed
    return torch.zeros(num_rows, width, dtype=getattr(torch, element), device=device), None


@pytest.mark.timeout(300)
@pytest.mark.parametrize("element", ["bfloat16", "int8"])
def test_rows_beyond_2_to_the_31_elements(element):
    """Addresses are int64: the last rows of an arena of more than 2**31 elements are read and written."""
    width, page_shift = 256, 10
    num_pages = (2**31 // width >> page_shift) + 2
    if torch.cuda.mem_get_info()[0] < (num_pages << page_shift) * (width * 2 + 2 * 4) + 2**30:
        pytest.skip("not enough free GPU memory")
    rows, packed = empty_arena(num_pages << page_shift, width, element, "cuda")
    paged = Paged(rows, torch.arange(num_pages, dtype=torch.int32, device="cuda"), page_shift, packed)
    last = (num_pages << page_shift) - 1
    ids = torch.tensor([last, 0, last], device="cuda")
    values = torch.stack([torch.full((width,), value) for value in (1.0, 2.0, 3.0)]).to("cuda", paged.value_dtype)
    kernels.scatter_rows(paged, ids, values)
    torch.testing.assert_close(kernels.gather_rows(paged, ids), values[[2, 1, 2]])
    offsets, bags = torch.tensor([0, 3], device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
    torch.testing.assert_close(kernels.weighted_sum(paged, ids, None, offsets), torch.full((1, width), 8.0).cuda())
    grads = torch.ones(1, width, device="cuda")
    expected = torch.tensor([3.0, 2.0, 3.0], device="cuda") * width
    torch.testing.assert_close(kernels.weight_gradient(paged, ids, offsets, grads), expected)
    state = {"row_sum": torch.zeros(rows.shape[0], width // 64, device="cuda")}
    step = OptimizerStep("rowwise_adagrad", lr=1.0, eps=0.0)
    kernels.fused_step(paged, state, kernels.sort_pairs(paged, ids), None, bags, grads, step)
    torch.testing.assert_close(kernels.gather_rows(paged, ids), values[[2, 1, 2]] - 1.0)
    assert state["row_sum"][last].tolist() == [4.0] * 4
    assert int(state["row_sum"].count_nonzero()) == 8


def zipf_ids(num_slots: int, num_pairs: int, generator: torch.Generator) -> torch.Tensor:
    shares = torch.arange(1, num_slots + 1, dtype=torch.float64).pow(-1.05)
    return torch.multinomial(shares, num_pairs, replacement=True, generator=generator)


def train(
    device: str, element: kernels.Element, algorithm: kernels.Algorithm, *, width: int = 192
) -> list[torch.Tensor]:
    """Everything that some steps under Zipf-distributed ids give, from the same numbers on every device."""
    generator = torch.Generator().manual_seed(11)
    num_slots, num_bags, length = 1 << 12, 256, 64
    rows, packed = empty_arena(num_slots, width, element, device)
    page_table = torch.randperm(num_slots >> 6, generator=generator).to(torch.int32).to(device)
    paged = Paged(rows, page_table, 6, packed)
    everything = torch.arange(num_slots, device=device)
    values = torch.randn(num_slots, width, generator=generator).to(device, paged.value_dtype)
    kernels.scatter_rows(paged, everything, values)
    state = {}
    for name in kernels.STATE_NAMES[algorithm]:
        columns = width // 64 if name in kernels.BLOCK_STATE else width
        state[name] = torch.zeros(num_slots, columns, device=device)
    offsets = torch.arange(0, num_bags * length + 1, length, device=device)
    bags = torch.repeat_interleave(torch.arange(num_bags), length).to(device)
    columns = 64 * torch.arange(width // 64, device=device)
    results = []
    for number in range(1, 4):
        ids = zipf_ids(num_slots, num_bags * length, generator).to(device)
        weights = torch.randn(ids.numel(), generator=generator).to(device)
        grads = torch.randn(num_bags, width, generator=generator).to(device)
        results.append(kernels.weighted_sum(paged, ids, weights, offsets, dtype=torch.bfloat16))
        rounding = RandomRounding(RandomRounding.key_of(seed=1, table=2, step=number), columns)
        step = OptimizerStep(algorithm, lr=0.05, step=number, rounding=rounding)
        kernels.fused_step(paged, state, kernels.sort_pairs(paged, ids), weights, bags, grads, step)
    return [tensor.cpu() for tensor in (*results, kernels.gather_rows(paged, everything), *state.values())]


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", kernels.ALGORITHMS)
@pytest.mark.parametrize("element", kernels.ELEMENTS)
def test_two_runs_with_hot_slots_give_the_same_bits(element, algorithm):
    assert same_bits(train("cuda", element, algorithm), train("cuda", element, algorithm))


@needs_numba
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", ["sgd", "adagrad", "adam", "adamw"])
@pytest.mark.parametrize("element", kernels.ELEMENTS)
def test_training_on_the_gpu_has_the_bits_of_the_cpu(element, algorithm):
    """All but row-wise state, whose mean over a block is added up in another order."""
    assert same_bits(train("cuda", element, algorithm), train("cpu", element, algorithm))


@needs_numba
@pytest.mark.timeout(300)
def test_scores_have_the_bits_of_the_cpu():
    generator = torch.Generator().manual_seed(12)
    queries, keys = torch.randn(300, 4, 256, generator=generator), torch.randn(4, 2, 700, 128, generator=generator)
    on_gpu = kernels.product_indices(queries.cuda(), keys.cuda(), 32)
    assert same_bits([tensor.cpu() for tensor in on_gpu], list(kernels.product_indices(queries, keys, 32)))
    table = torch.randn(1 << 14, 64, generator=generator).to(torch.bfloat16)
    page_table = torch.arange(1 << 6, dtype=torch.int32)
    flat = queries[:, 0, :64].contiguous()
    on_gpu = kernels.flat_topk(flat.cuda(), Paged(table.cuda(), page_table.cuda(), 8), 32, 1 << 14)
    on_cpu = kernels.flat_topk(flat, Paged(table, page_table, 8), 32, 1 << 14)
    assert same_bits([tensor.cpu() for tensor in on_gpu], list(on_cpu))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("num_slots", "width"), [(1 << 20, 256), (1 << 17, 4096)])
def test_a_commit_needs_no_memory_of_the_tables_size(num_slots, width):
    paged = Paged(
        torch.zeros(num_slots, width, device="cuda"),
        torch.arange(num_slots >> 10, dtype=torch.int32, device="cuda"),
        10,
    )
    state = {"row_sum": torch.zeros(num_slots, 4, device="cuda")}
    ids = torch.randint(0, num_slots, (32768,), device="cuda")
    bags, grads = torch.arange(32768, device="cuda") // 128, torch.randn(256, width, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = OptimizerStep("rowwise_adagrad", lr=0.1)
    kernels.fused_step(paged, state, kernels.sort_pairs(paged, ids), None, bags, grads, step)
    # 128 bytes a pair, and a float32 of each column for every LONG_RUN pairs.
    most = 32768 * (128 + 4 * width // kernels.LONG_RUN) + 4 * 2**20
    assert torch.cuda.max_memory_allocated() - before < most
