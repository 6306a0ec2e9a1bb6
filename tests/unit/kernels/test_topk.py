"""Selection: brute force by (score descending, id ascending), exact ties by integer-valued scores, NaN, edges of k."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close, kernel_settings, make_paged, same_bits

from mempool import kernels
from mempool.kernels import Paged, reference


def tied_scores(generator, *shape, levels=5):
    """Integer-valued scores of few levels, zeros of both signs among them."""
    scores = torch.randint(-levels, levels, shape, generator=generator).float()
    return torch.where(torch.rand(shape, generator=generator) < 0.5, scores, scores * -1.0)


@kernel_settings
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 20),
    n=st.sampled_from((1, 2, 7, 33, 200, 5000)),
    special=st.booleans(),
    data=st.data(),
)
def test_select_topk_equals_brute_force(under_test, seed, rows, n, special, data):
    k = data.draw(st.sampled_from(sorted({1, min(n, 5), min(n, 32), min(n, 150), min(n, 300)})))
    generator = torch.Generator().manual_seed(seed)
    scores = tied_scores(generator, rows, n)
    if special:
        for value in (torch.nan, torch.inf, -torch.inf):
            scores[torch.rand(rows, n, generator=generator) < 0.2] = value
    values, index = under_test.kernels.select_topk(under_test.to(scores), k)
    expected_values, expected_index = reference.select_topk(scores, k)
    assert torch.equal(index.cpu(), expected_index)
    assert same_bits(values, expected_values)


def test_select_topk_on_distinct_scores_equals_torch(under_test):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 1024, generator=generator)
    values, index = under_test.kernels.select_topk(under_test.to(scores), 32)
    expected = torch.topk(scores, 32)
    assert torch.equal(values.cpu(), expected.values)
    assert torch.equal(index.cpu(), expected.indices)


@kernel_settings
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 6),
    n=st.sampled_from((1, 2, 5, 13)),
    special=st.booleans(),
    data=st.data(),
)
def test_product_select_equals_brute_force(under_test, seed, rows, n, special, data):
    k = data.draw(st.sampled_from(sorted({1, min(3, n * n), n, min(n * n, n + 3), n * n})))
    stride = n + data.draw(st.sampled_from((0, 9)))
    generator = torch.Generator().manual_seed(seed)
    scores1, scores2 = tied_scores(generator, rows, n, levels=3), tied_scores(generator, rows, n, levels=3)
    if special:
        for scores in (scores1, scores2):
            for value in (torch.nan, torch.inf, -torch.inf):
                scores[torch.rand(rows, n, generator=generator) < 0.2] = value
    index1, index2 = under_test.kernels.product_select(under_test.to(scores1), under_test.to(scores2), k, stride)
    expected1, expected2 = reference.product_select(scores1, scores2, k, stride)
    assert torch.equal(index1.cpu(), expected1)
    assert torch.equal(index2.cpu(), expected2)


def test_product_select_equals_brute_force_where_rounding_makes_ties(under_test):
    """Sums of unlike halves that round to the same float32: the smaller id wins although its half scored lower."""
    generator = torch.Generator().manual_seed(1)
    num_rows = 4 if under_test.interpreted else 30
    scores1 = torch.randn(num_rows, 40, generator=generator) * 1e-7
    scores2 = torch.randn(num_rows, 40, generator=generator).round() + 4.0
    index1, index2 = under_test.kernels.product_select(under_test.to(scores1), under_test.to(scores2), 32, 40)
    expected1, expected2 = reference.product_select(scores1, scores2, 32, 40)
    assert torch.equal(index1.cpu(), expected1)
    assert torch.equal(index2.cpu(), expected2)


@kernel_settings
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 5),
    heads=st.integers(1, 3),
    half_dim=st.sampled_from((1, 3, 8, 18)),
    n=st.sampled_from((1, 4, 17)),
    data=st.data(),
)
def test_product_topk_on_integers_equals_brute_force(under_test, seed, queries, heads, half_dim, n, data):
    """Integer-valued products are exact in float32, so ties are the same everywhere."""
    k = data.draw(st.sampled_from(sorted({1, min(4, n * n), n, n * n})))
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (queries, heads, 2 * half_dim), generator=generator).float()
    keys = torch.randint(-2, 3, (heads, 2, n, half_dim), generator=generator).float()
    scores, ids = under_test.kernels.product_topk(under_test.to(query), under_test.to(keys), k, n + 2)
    expected_scores, expected_ids = reference.product_topk(query, keys, k, n + 2)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(scores.cpu().double(), expected_scores)


def test_product_topk_scores_equal_reference(under_test):
    generator = torch.Generator().manual_seed(2)
    queries, keys = torch.randn(9, 2, 36, generator=generator), torch.randn(2, 2, 50, 18, generator=generator)
    scores, ids = under_test.kernels.product_topk(under_test.to(queries), under_test.to(keys), 16, 50)
    expected_scores, expected_ids = reference.product_topk(queries, keys, 16, 50)
    assert_close(scores, expected_scores)
    assert torch.equal(ids.cpu(), expected_ids)


def test_product_topk_does_not_depend_on_the_batch(under_test):
    if under_test.name == "torch":
        pytest.skip("torch.matmul gives a row other bits alone than in a batch")
    generator = torch.Generator().manual_seed(3)
    queries = under_test.to(torch.randn(21, 2, 128, generator=generator))
    keys = under_test.to(torch.randn(2, 2, 70, 64, generator=generator))
    scores, ids = under_test.kernels.product_topk(queries, keys, 8, 70)
    for row in (0, 7, 20):
        alone_scores, alone_ids = under_test.kernels.product_topk(queries[row : row + 1], keys, 8, 70)
        assert same_bits(alone_scores[0], scores[row])
        assert torch.equal(alone_ids[0], ids[row])


@kernel_settings
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 4),
    dim=st.sampled_from((1, 3, 36)),
    dtype=st.sampled_from(kernels.STORAGE_DTYPES),
    k=st.sampled_from((1, 5, 40)),
    missing=st.sampled_from((0.0, 0.5, 1.0)),
    spare=st.integers(0, 3),
)
def test_flat_topk_on_integers_equals_brute_force(under_test, seed, queries, dim, dtype, k, missing, spare):
    generator = torch.Generator().manual_seed(seed)
    paged = make_paged(generator, num_pages=6, page_shift=2, width=dim, dtype=torch.float32, missing=missing)
    keys = Paged((paged.rows * 2).round().to(dtype), paged.page_table, 2)
    query = torch.randint(-2, 3, (queries, dim), generator=generator).float()
    num_slots = 24 - spare
    scores, ids = under_test.kernels.flat_topk(under_test.to(query), under_test.to(keys), k, num_slots)
    expected_scores, expected_ids = reference.flat_topk(query, keys, k, num_slots)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(scores.cpu().double(), expected_scores)


def test_flat_topk_over_many_tiles(under_test):
    """More slots than a tile holds, missing pages between, a NaN key that is no candidate."""
    generator = torch.Generator().manual_seed(4)
    num_pages = 4 if under_test.interpreted else 80
    paged = make_paged(generator, num_pages=num_pages, page_shift=9, width=4, dtype=torch.float32)
    keys = Paged((paged.rows * 3).round(), paged.page_table, 9)
    first_page = int(keys.page_table[keys.page_table >= 0][0])
    keys.rows[(first_page << 9) + 5, 2] = torch.nan
    queries = torch.randint(-3, 4, (3, 4), generator=generator).float()
    num_slots = (num_pages << 9) - 100
    k = 7 if under_test.interpreted else 50
    scores, ids = under_test.kernels.flat_topk(under_test.to(queries), under_test.to(keys), k, num_slots)
    expected_scores, expected_ids = reference.flat_topk(queries, keys, k, num_slots)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(scores.cpu().double(), expected_scores)


def test_flat_topk_scores_do_not_depend_on_where_pages_lie(under_test):
    if under_test.name == "torch":
        pytest.skip("torch.matmul gives other bits for keys cut otherwise")
    generator = torch.Generator().manual_seed(5)
    page_shift = 2 if under_test.interpreted else 5
    num_slots = 10 << page_shift
    keys = make_paged(generator, num_pages=10, page_shift=page_shift, width=48, dtype=torch.float32, missing=0.0)
    queries = torch.randn(5, 48, generator=generator)
    whole_scores, whole_ids = under_test.kernels.flat_topk(
        under_test.to(queries), under_test.to(keys), num_slots, num_slots
    )
    score_of = [dict(zip(i, s, strict=True)) for i, s in zip(whole_ids.tolist(), whole_scores.tolist(), strict=True)]
    few = keys.page_table.clone()
    few[[0, 3, 4, 8]] = -1
    part = under_test.to(Paged(keys.rows, few, page_shift))
    scores, ids = under_test.kernels.flat_topk(under_test.to(queries[2:3]), part, 7, num_slots)
    assert scores[0].tolist() == [score_of[2][slot] for slot in ids[0].tolist()]
