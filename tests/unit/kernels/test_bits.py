"""Implementations against each other: what is summed in a fixed order has the same bits on the CPU and on the GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import cases, kernel_settings, make_paged, same_bits

from mempool import kernels
from mempool.kernels import OptimizerStep, Paged


@pytest.fixture(autouse=True)
def not_against_itself(under_test):
    if under_test.name == "numba":
        pytest.skip("the other implementations are compared with this one")


@kernel_settings
@given(case=cases())
def test_sums_have_the_bits_of_the_cpu(under_test, case):
    numba = kernels.implementation("numba")
    paged, ids, weights, offsets, bags, grads = map(
        under_test.to, (case.paged, case.ids, case.weights, case.offsets, case.bags, case.grads)
    )
    actual = under_test.kernels.weighted_sum(paged, ids, weights, offsets)
    assert same_bits(actual, numba.weighted_sum(case.paged, case.ids, case.weights, case.offsets))
    actual = under_test.kernels.segment_sum(under_test.kernels.sort_pairs(paged, ids), weights, bags, grads)
    pairs = numba.sort_pairs(case.paged, case.ids)
    assert same_bits(actual, numba.segment_sum(pairs, case.weights, case.bags, case.grads))


@kernel_settings
@given(case=cases(), algorithm=st.sampled_from(("sgd", "adagrad", "adam")))
def test_optimizer_steps_have_the_bits_of_the_cpu(under_test, case, algorithm):
    """All but row-wise Adagrad, whose mean over a block is added up in another order."""
    if under_test.name == "torch":
        pytest.skip("torch's operations fuse multiply and add where they like")
    step = OptimizerStep(algorithm, lr=0.1, step=7, eps=1e-8, grad_scale=0.5)
    state = {name: torch.full(case.paged.rows.shape, 0.25) for name in kernels.STATE_NAMES[algorithm]}
    results = []
    for to, implementation in (
        (under_test.to, under_test.kernels),
        (lambda value: value.clone() if isinstance(value, torch.Tensor) else value, kernels.implementation("numba")),
    ):
        paged = Paged(to(case.paged.rows), to(case.paged.page_table), case.paged.page_shift)
        own_state = {name: to(tensor) for name, tensor in state.items()}
        pairs = implementation.sort_pairs(paged, to(case.ids))
        weights = None if case.weights is None else to(case.weights)
        implementation.fused_step(paged, own_state, pairs, weights, to(case.bags), to(case.grads), step)
        results.append([paged.rows, *own_state.values()])
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


def test_selection_has_the_bits_of_the_cpu(under_test):
    if under_test.name == "torch":
        pytest.skip("torch.matmul adds in an order of its own")
    numba = kernels.implementation("numba")
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(5, 2, 22, generator=generator), torch.randn(2, 2, 30, 11, generator=generator)
    actual = under_test.kernels.product_topk(under_test.to(queries), under_test.to(keys), 6, 30)
    assert all(map(same_bits, actual, numba.product_topk(queries, keys, 6, 30)))
    paged = make_paged(generator, num_pages=5, page_shift=3, width=22, dtype=torch.bfloat16)
    actual = under_test.kernels.flat_topk(under_test.to(queries[:, 0].contiguous()), under_test.to(paged), 6, 38)
    assert all(map(same_bits, actual, numba.flat_topk(queries[:, 0].contiguous(), paged, 6, 38)))
