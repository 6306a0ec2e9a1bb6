"""torch's own operations in chunks: what bounds their memory changes no result, wherever the chunks end."""

import dataclasses
import math

import pytest
import torch
from kernel_cases import assert_close, make_paged, same_bits

from mempool.kernels import reference, torch_ops
from mempool.kernels.torch_ops import bags as torch_bags

WIDTH = 5
NUM_PAIRS = 23


@pytest.fixture(params=[WIDTH, 4 * WIDTH, 22 * WIDTH, 23 * WIDTH])
def chunk_elements(request, monkeypatch):
    """Chunks of one pair, of a few, of all but one, of all."""
    monkeypatch.setattr(torch_bags, "_CHUNK_ELEMENTS", request.param)
    return request.param


@pytest.fixture(params=["float32", "int8"])
def case(request):
    element = request.param
    generator = torch.Generator().manual_seed(2)
    paged = make_paged(generator, num_pages=4, page_shift=2, width=WIDTH, element=element, missing=0.3)
    ids = torch.randint(0, 16, (NUM_PAIRS,), generator=generator)
    assert (paged.page_table < 0).any()
    assert len({*ids.tolist()}) < NUM_PAIRS
    weights = torch.randn(NUM_PAIRS, generator=generator)
    offsets = torch.tensor([0, 9, 9, 14, NUM_PAIRS])
    return paged, ids, weights, offsets, torch.randn(4, WIDTH, generator=generator)


@pytest.mark.usefixtures("chunk_elements")
def test_bags_in_chunks_equal_reference(case):
    paged, ids, weights, offsets, grads = case
    assert_close(
        torch_ops.weighted_sum(paged, ids, weights, offsets), reference.weighted_sum(paged, ids, weights, offsets)
    )
    assert_close(
        torch_ops.weight_gradient(paged, ids, offsets, grads), reference.weight_gradient(paged, ids, offsets, grads)
    )


@pytest.mark.usefixtures("chunk_elements")
def test_rows_in_chunks_have_the_bits_of_reference(case):
    paged, ids, *_ = case
    assert same_bits(torch_ops.gather_rows(paged, ids, torch.float32), reference.gather_rows(paged, ids, torch.float32))
    values = torch.randn(NUM_PAIRS, WIDTH, generator=torch.Generator().manual_seed(5))
    expected = dataclasses.replace(paged, rows=paged.rows.clone())
    reference.scatter_rows(expected, ids, values)
    torch_ops.scatter_rows(paged, ids, values)
    assert same_bits(paged.rows, expected.rows)


@pytest.mark.usefixtures("chunk_elements")
def test_sums_and_norms_in_chunks_equal_reference(case):
    paged, ids, weights, offsets, grads = case
    bags = torch_bags.bag_of_pairs(offsets, NUM_PAIRS)
    pairs = torch_ops.sort_pairs(paged, ids)
    sums = torch_ops.segment_sum(pairs, weights, bags, grads)
    assert_close(sums, reference.segment_sum(pairs, weights, bags, grads))
    expected, _ = reference.squared_norm(sums)
    norm, finite = torch_ops.squared_norm(sums)
    assert finite
    assert norm == pytest.approx(expected, rel=1e-12)
    sums[0, 0] = math.inf
    assert not torch_ops.squared_norm(sums)[1]


@pytest.mark.usefixtures("chunk_elements")
def test_initial_values_in_chunks_have_the_bits_of_reference():
    slice_ = {"slots_start": 7, "num_slots": NUM_PAIRS, "column_start": 3, "num_columns": WIDTH, "std": 0.5}
    assert same_bits(torch_ops.initial_values(4, **slice_), reference.initial_values(4, **slice_))
