"""Implementations against each other: what is summed in a fixed order has the same bits on the CPU and on the GPU."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_cases import UnderTest, cases, kernel_settings, make_paged, make_state, same_bits, steps

from mempool import kernels
from mempool.kernels import RUN_PIECE, Paged, RandomRounding


@pytest.fixture(autouse=True)
def not_against_itself(under_test):
    if under_test.name == "numba":
        pytest.skip("the other implementations are compared with this one")


@kernel_settings
@given(case=cases())
def test_sums_have_the_bits_of_the_cpu(under_test, case):
    """Of torch's operations, only sums of gradients: weighted sums fuse multiply and add elsewhere."""
    numba = kernels.implementation("numba")
    paged, ids, weights, offsets, bags, grads = map(
        under_test.to, (case.paged, case.ids, case.weights, case.offsets, case.bags, case.grads)
    )
    for dtype in () if under_test.name == "torch" else (torch.float32, torch.bfloat16):
        actual = under_test.kernels.weighted_sum(paged, ids, weights, offsets, dtype)
        assert same_bits(actual, numba.weighted_sum(case.paged, case.ids, case.weights, case.offsets, dtype))
    actual = under_test.kernels.segment_sum(under_test.kernels.sort_pairs(paged, ids), weights, bags, grads)
    pairs = numba.sort_pairs(case.paged, case.ids)
    assert same_bits(actual, numba.segment_sum(pairs, case.weights, case.bags, case.grads))


def test_sums_of_hot_rows_have_the_bits_of_the_cpu(under_test):
    """Runs of several pieces: exactly one, just over one (which test_updates.py has too), just over two."""
    numba = kernels.implementation("numba")
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([RUN_PIECE, 1, RUN_PIECE + 1, 2 * RUN_PIECE + 2])
    if under_test.interpreted:
        sizes[2] = 3
    ids = torch.repeat_interleave(torch.arange(4), sizes)
    ids = ids[torch.randperm(len(ids), generator=generator)]
    paged = Paged(torch.zeros(4, 3), torch.tensor([0], dtype=torch.int32), 2)
    weights, bags = torch.randn(len(ids), generator=generator), torch.randint(0, 9, (len(ids),), generator=generator)
    grads = torch.randn(9, 3, generator=generator)
    pairs = under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
    actual = under_test.kernels.segment_sum(pairs, *map(under_test.to, (weights, bags, grads)))
    assert same_bits(actual, numba.segment_sum(numba.sort_pairs(paged, ids), weights, bags, grads))


@kernel_settings
@given(case=cases(), step=steps(), master=st.booleans(), randomly=st.booleans())
def test_optimizer_steps_have_the_bits_of_the_cpu(under_test, case, step, master, randomly):
    """All but the row-wise rules and bounds of norms, whose sums over a block are added up in another order."""
    if under_test.name == "torch":
        pytest.skip("torch's operations fuse multiply and add where they like")
    assume(not kernels.BLOCK_STATE & set(kernels.STATE_NAMES[step.algorithm]))
    columns = 7 + torch.arange(kernels.num_blocks(case.paged.width, case.block_dim))
    state = make_state(case.paged, step, master=master)
    results = []
    for to, implementation in (
        (under_test.to, under_test.kernels),
        (UnderTest("numba", "cpu").to, kernels.implementation("numba")),
    ):
        rounding = RandomRounding(-5, to(columns)) if randomly else None
        one = dataclasses.replace(step, block_dim=case.block_dim, max_norm=math.inf, rounding=rounding)
        paged, own_state = to(case.paged), to(state)
        pairs = implementation.sort_pairs(paged, to(case.ids))
        gradients = to(case.weights), to(case.bags), to(case.grads)
        implementation.fused_step(paged, own_state, pairs, *gradients, one)
        results.append([paged.rows, *own_state.values()])
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


def test_selection_has_the_bits_of_the_cpu(under_test):
    if under_test.name == "torch":
        pytest.skip("torch.matmul adds in an order of its own")
    if under_test.interpreted:
        pytest.skip("Triton's interpreter multiplies matrices with numpy, a GPU by chains of fused multiply-adds")
    numba = kernels.implementation("numba")
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(5, 2, 22, generator=generator), torch.randn(2, 2, 30, 11, generator=generator)
    actual = under_test.kernels.product_topk(under_test.to(queries), under_test.to(keys), 6, True)
    assert all(map(same_bits, actual, numba.product_topk(queries, keys, 6, True)))
    paged = make_paged(generator, num_pages=5, page_shift=3, width=22, element="bfloat16")
    queries = queries[:, 0].contiguous()
    actual = under_test.kernels.flat_topk(under_test.to(queries), under_test.to(paged), 6, 38, True)
    assert all(map(same_bits, actual, numba.flat_topk(queries, paged, 6, 38, True)))
