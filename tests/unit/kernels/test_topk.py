"""Selection and scoring: brute force by (score descending, id ascending), crafted ties, NaN, edges of k, gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close, kernel_settings, make_paged, same_bits

from mempool.kernels import Paged, reference

SPECIAL = (torch.nan, torch.inf, -torch.inf)


def tied_scores(generator, *shape, levels=5):
    """Integer-valued scores of few levels, zeros of both signs among them."""
    scores = torch.randint(-levels, levels, shape, generator=generator).float()
    return torch.where(torch.rand(shape, generator=generator) < 0.5, scores, scores * -1.0)


def sprinkle(generator, scores, share=0.2):
    """NaN and infinities in some places."""
    for value in SPECIAL:
        scores[torch.rand(scores.shape, generator=generator) < share] = value


def assert_selects(under_test, scores, k):
    values, index = under_test.kernels.select_topk(under_test.to(scores), k)
    expected_values, expected_index = reference.select_topk(scores, k)
    assert torch.equal(index.cpu(), expected_index)
    assert same_bits(values, expected_values)


def assert_selects_products(under_test, scores1, scores2, k, stride):
    index1, index2 = under_test.kernels.product_select(under_test.to(scores1), under_test.to(scores2), k, stride)
    expected1, expected2 = reference.product_select(scores1, scores2, k, stride)
    assert torch.equal(index1.cpu(), expected1)
    assert torch.equal(index2.cpu(), expected2)


@kernel_settings
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 20),
    n=st.sampled_from((1, 2, 7, 33, 64, 200, 1000)),
    levels=st.sampled_from((1, 5, 10**6)),
    special=st.booleans(),
    data=st.data(),
)
def test_select_topk_equals_brute_force(under_test, seed, rows, n, levels, special, data):
    k = data.draw(st.sampled_from(sorted({1, min(n, 5), min(n, 32), min(n, 150), min(n, 300), n})))
    generator = torch.Generator().manual_seed(seed)
    scores = tied_scores(generator, rows, n, levels=levels)
    if special:
        sprinkle(generator, scores)
    assert_selects(under_test, scores, k)


@pytest.mark.parametrize("k", [1, 31, 32, 64, 200, 500])
def test_select_topk_of_crafted_rows(under_test, k):
    """Rows of one value only, rising, falling, with the best in one place, with fewer numbers than winners."""
    num_scores = 500
    steps = torch.arange(num_scores).float()
    crowded = torch.zeros(num_scores)
    crowded[100:164] = steps[:64] + 1  # all winners stand side by side
    few = torch.full((num_scores,), torch.nan)
    few[::70] = 1.0
    values = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, torch.finfo(torch.float32).max)
    rows = [*(torch.full((num_scores,), value) for value in values), steps, -steps, crowded, few, steps * 1e-44]
    assert_selects(under_test, torch.stack(rows), k)


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
    levels=st.sampled_from((1, 3, 10**6)),
    special=st.booleans(),
    data=st.data(),
)
def test_product_select_equals_brute_force(under_test, seed, rows, n, levels, special, data):
    k = data.draw(st.sampled_from(sorted({1, min(3, n * n), n, min(n * n, n + 3), n * n})))
    stride = n + data.draw(st.sampled_from((0, 9)))
    generator = torch.Generator().manual_seed(seed)
    scores1, scores2 = (tied_scores(generator, rows, n, levels=levels) for _ in range(2))
    if special:
        sprinkle(generator, scores1)
        sprinkle(generator, scores2)
    assert_selects_products(under_test, scores1, scores2, k, stride)


@pytest.mark.parametrize("levels", [1, 3, 40])
@pytest.mark.parametrize("value", [None, *SPECIAL, 3e38])
def test_product_select_of_many_ties_and_a_special_score(under_test, levels, value):
    """More ties at the last place than any buffer holds, and one score that makes sums infinite or no number."""
    generator = torch.Generator().manual_seed(7)
    num_rows, n, k = (2, 20, 16) if under_test.interpreted else (6, 70, 48)
    scores1, scores2 = (tied_scores(generator, num_rows, n, levels=levels) for _ in range(2))
    if value is not None:
        scores1[::2, 5] = value
        scores2[1:, 3] = -value
    assert_selects_products(under_test, scores1, scores2, k, n)


def test_product_select_equals_brute_force_where_rounding_makes_ties(under_test):
    """Sums of unlike halves that round to the same float32: the smaller id wins although its half scored lower."""
    generator = torch.Generator().manual_seed(1)
    num_rows = 4 if under_test.interpreted else 30
    scores1 = torch.randn(num_rows, 40, generator=generator) * 1e-7
    scores2 = torch.randn(num_rows, 40, generator=generator).round() + 4.0
    assert_selects_products(under_test, scores1, scores2, 32, 40)


@kernel_settings
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 5),
    heads=st.integers(1, 3),
    half_dim=st.sampled_from((1, 3, 8, 18)),
    n=st.sampled_from((1, 4, 17, 40)),
    deterministic=st.booleans(),
    data=st.data(),
)
def test_product_topk_on_integers_equals_brute_force(
    under_test, seed, queries, heads, half_dim, n, deterministic, data
):
    """Integer-valued products are exact in float32, so ties are the same everywhere."""
    k = data.draw(st.sampled_from(sorted({1, min(4, n * n), n, min(n * n, 300)})))
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (queries, heads, 2 * half_dim), generator=generator).float()
    keys = torch.randint(-2, 3, (heads, 2, n, half_dim), generator=generator).float()
    actual = under_test.kernels.product_topk(under_test.to(query), under_test.to(keys), k, deterministic)
    expected = reference.product_topk(query, keys, k)
    assert torch.equal(actual[0].cpu().double(), expected[0])
    assert torch.equal(actual[1].cpu(), expected[1])
    assert torch.equal(actual[2].cpu(), expected[2])


@pytest.mark.parametrize("deterministic", [True, False])
def test_product_topk_scores_equal_reference(under_test, deterministic):
    generator = torch.Generator().manual_seed(2)
    queries, keys = torch.randn(9, 2, 36, generator=generator), torch.randn(2, 2, 50, 18, generator=generator)
    actual = under_test.kernels.product_topk(under_test.to(queries), under_test.to(keys), 16, deterministic)
    expected = reference.product_topk(queries, keys, 16)
    assert_close(actual[0], expected[0])
    assert torch.equal(actual[1].cpu(), expected[1])
    assert torch.equal(actual[2].cpu(), expected[2])


def test_a_key_that_is_not_finite_touches_no_other_score(under_test):
    """Of a codebook with one NaN and one infinite key, the others have the bits that they have without them."""
    generator = torch.Generator().manual_seed(11)
    queries, keys = torch.randn(5, 1, 12, generator=generator), torch.randn(1, 2, 20, 6, generator=generator)
    keys[0, :, -2:] = -100.0 * torch.ones(6)
    queries = queries.abs()  # the last two keys lose
    expected = under_test.kernels.product_topk(under_test.to(queries), under_test.to(keys), 8, True)
    keys[0, :, -2], keys[0, :, -1] = torch.nan, -torch.inf
    actual = under_test.kernels.product_topk(under_test.to(queries), under_test.to(keys), 8, True)
    assert all(map(same_bits, actual, expected))


@kernel_settings
@given(seed=st.integers(0, 2**31), first=st.integers(0, 20), count=st.integers(1, 60), threads=st.sampled_from((1, 2)))
def test_product_topk_does_not_depend_on_the_batch(under_test, seed, first, count, threads):
    """A query has the same bits in any batch, at any place of it, with any number of threads."""
    if under_test.name == "torch":
        pytest.skip("torch.matmul gives a row other bits alone than in a batch")
    generator = torch.Generator().manual_seed(seed)
    num_queries, num_keys = (9, 20) if under_test.interpreted else (70, 100)
    queries = under_test.to(torch.randn(num_queries, 2, 46, generator=generator))
    keys = under_test.to(torch.randn(2, 2, num_keys, 23, generator=generator))
    whole = under_test.kernels.product_topk(queries, keys, 8, True)
    torch.set_num_threads(threads)
    first = min(first, num_queries - 1)
    part = under_test.kernels.product_topk(queries[first : first + count], keys, 8, True)
    assert all(same_bits(one, of[first : first + count]) for one, of in zip(part, whole, strict=True))


def test_cpu_scores_are_one_chain_of_fused_multiply_adds(under_test):
    """The definition that makes a score's bits those of any machine: a float64 product and sum, rounded each time."""
    if under_test.name != "numba":
        pytest.skip("the order and the roundings of the CPU's kernel")
    generator = torch.Generator().manual_seed(13)
    queries, keys = torch.randn(5, 1, 74, generator=generator), torch.randn(1, 2, 33, 37, generator=generator)
    halves = []
    for half in range(2):
        total = torch.zeros(5, 33)
        for dim in range(37):
            product = queries[:, 0, 37 * half + dim, None].double() * keys[0, half, :, dim].double()
            total = (product + total.double()).float()
        halves.append(total)
    scores, index1, index2 = under_test.kernels.product_topk(queries, keys, 6, True)
    assert same_bits(scores[:, 0], halves[0].gather(1, index1[:, 0]) + halves[1].gather(1, index2[:, 0]))


def winners(generator, queries, heads, half_dim, n, k):
    """Random winners, some half-keys among them often and some never, with gradients."""
    query = torch.randn(queries, heads, 2 * half_dim, generator=generator)
    keys = torch.randn(heads, 2, n, half_dim, generator=generator)
    index1, index2 = (torch.randint(0, max(1, n - 1), (queries, heads, k), generator=generator) for _ in range(2))
    return query, keys, index1, index2, torch.randn(queries, heads, k, generator=generator)


@kernel_settings
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 9),
    heads=st.integers(1, 3),
    half_dim=st.sampled_from((1, 3, 18, 64, 70)),
    n=st.sampled_from((1, 4, 17)),
    k=st.sampled_from((1, 5, 8)),
)
def test_product_gradient_equals_reference(under_test, seed, queries, heads, half_dim, n, k):
    case = winners(torch.Generator().manual_seed(seed), queries, heads, half_dim, n, k)
    actual = under_test.kernels.product_gradient(*map(under_test.to, case))
    for one, other in zip(actual, reference.product_gradient(*case), strict=True):
        assert_close(one, other, tolerance=4e-6)
    if n > 1:
        assert not actual[1][:, :, n - 1].any()  # never chosen


def test_product_gradient_adds_in_a_fixed_order(under_test):
    """Twice the same bits, with any number of threads; a query's alone; a half-key's by (query, rank)."""
    if under_test.name == "torch":
        pytest.skip("torch.nn.functional.embedding_bag promises no order")
    generator = torch.Generator().manual_seed(17)
    num_queries = 6 if under_test.interpreted else 200
    case = [under_test.to(tensor) for tensor in winners(generator, num_queries, 2, 33, 5, 8)]
    gradient = under_test.kernels.product_gradient
    query_grads, key_grads = gradient(*case)
    torch.set_num_threads(2)
    assert all(map(same_bits, gradient(*case), (query_grads, key_grads)))
    queries, keys, *rest = case
    alone, _ = gradient(queries[3:4], keys, *(tensor[3:4] for tensor in rest))
    assert same_bits(alone, query_grads[3:4])
    # A pair that is first and another that is last in the order: NaN comes of either, and of nothing else.
    grads = rest[2].clone()
    grads[0, 0, 0] = torch.nan
    _, touched = gradient(queries, keys, rest[0], rest[1], grads)
    assert set(touched.isnan().any(-1).nonzero()[:, 2].tolist()) == {int(rest[0][0, 0, 0]), int(rest[1][0, 0, 0])}


def integer_keys(generator, *, num_pages, page_shift, width, element="float32", missing=0.3):
    """Keys of small whole numbers, whose scores are exact; rows of no page are NaN."""
    paged = make_paged(generator, num_pages=num_pages, page_shift=page_shift, width=width, missing=missing)
    return Paged((paged.rows * 2).round().to(getattr(torch, element)), paged.page_table, page_shift)


def assert_finds(under_test, query, keys, k, num_slots, *, deterministic=True):
    scores, ids = under_test.kernels.flat_topk(under_test.to(query), under_test.to(keys), k, num_slots, deterministic)
    expected_scores, expected_ids = reference.flat_topk(query, keys, k, num_slots)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(scores.cpu().double(), expected_scores)


@kernel_settings
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 4),
    dim=st.sampled_from((1, 3, 36)),
    element=st.sampled_from(("float32", "bfloat16")),
    k=st.sampled_from((1, 5, 40)),
    missing=st.sampled_from((0.0, 0.5, 1.0)),
    spare=st.integers(0, 3),
    deterministic=st.booleans(),
)
def test_flat_topk_on_integers_equals_brute_force(
    under_test, seed, queries, dim, element, k, missing, spare, deterministic
):
    generator = torch.Generator().manual_seed(seed)
    keys = integer_keys(generator, num_pages=6, page_shift=2, width=dim, element=element, missing=missing)
    query = torch.randint(-2, 3, (queries, dim), generator=generator).float()
    assert_finds(under_test, query, keys, k, 24 - spare, deterministic=deterministic)


def test_flat_topk_over_many_tiles(under_test):
    """More slots than a tile holds, missing pages between, a NaN key that is no candidate."""
    generator = torch.Generator().manual_seed(4)
    num_pages = 4 if under_test.interpreted else 80
    keys = integer_keys(generator, num_pages=num_pages, page_shift=9, width=4)
    first_page = int(keys.page_table[keys.page_table >= 0][0])
    keys.rows[(first_page << 9) + 5, 2] = torch.nan
    queries = torch.randint(-3, 4, (3, 4), generator=generator).float()
    torch.set_num_threads(2)
    assert_finds(under_test, queries, keys, 7 if under_test.interpreted else 50, (num_pages << 9) - 100)


@pytest.mark.parametrize("direction", [1.0, -1.0, 0.0])
def test_flat_topk_of_keys_in_order(under_test, direction):
    """Scores that rise with the slot, so that every one is taken for a while; that fall; that are all the same."""
    num_slots = 128 if under_test.interpreted else 4096
    rows = direction * torch.arange(num_slots).float()[:, None]
    keys = Paged(rows, torch.arange(num_slots >> 5, dtype=torch.int32), 5)
    queries = torch.tensor([[1.0], [-2.0], [0.0], [torch.inf], [torch.nan]])
    assert_finds(under_test, queries, keys, 9, num_slots)


def test_flat_topk_with_infinite_scores(under_test):
    """An infinite score is a candidate of either sign, more of them than winners too."""
    rows = torch.randn(160, 1, generator=torch.Generator().manual_seed(6))
    rows[::3], rows[1::3] = torch.inf, -torch.inf
    keys = Paged(rows, torch.arange(10, dtype=torch.int32), 4)
    for k in (3, 100, 170):
        assert_finds(under_test, torch.tensor([[1.0], [-1.0]]), keys, k, 160)


def test_flat_topk_of_many_queries(under_test):
    generator = torch.Generator().manual_seed(8)
    num_queries = 5 if under_test.interpreted else 1100
    keys = integer_keys(generator, num_pages=3, page_shift=4, width=3)
    assert_finds(under_test, torch.randint(-3, 4, (num_queries, 3), generator=generator).float(), keys, 6, 48)


@kernel_settings
@given(seed=st.integers(0, 2**31), owned=st.lists(st.booleans(), min_size=10, max_size=10), data=st.data())
def test_flat_topk_merged_over_two_arenas_equals_one(under_test, seed, owned, data):
    """Pages cut over two arenas in any way, a query alone: merged winners have the bits of one arena and a batch."""
    if under_test.name == "torch":
        pytest.skip("torch.matmul gives other bits for keys cut otherwise")
    element = data.draw(st.sampled_from(("float32", "bfloat16")))
    generator = torch.Generator().manual_seed(seed)
    page_shift = 2 if under_test.interpreted else 5
    num_slots = 10 << page_shift
    keys = make_paged(generator, num_pages=10, page_shift=page_shift, width=47, element=element, missing=0.0)
    queries = torch.randn(5, 47, generator=generator)
    flat_topk = under_test.kernels.flat_topk
    whole_scores, whole_ids = flat_topk(under_test.to(queries), under_test.to(keys), 7, num_slots, True)
    parts = []
    for mine in (torch.tensor(owned), ~torch.tensor(owned)):
        table = torch.where(mine, keys.page_table, -1).to(torch.int32)
        part = under_test.to(Paged(keys.rows, table, page_shift))
        parts.append(flat_topk(under_test.to(queries[2:3]), part, 7, num_slots, True))
    scores, ids = (torch.cat([part[which][0] for part in parts]).cpu() for which in range(2))
    by_id = ids.argsort()
    best = scores[by_id].sort(descending=True, stable=True)
    assert same_bits(best.values[:7], whole_scores[2])
    assert torch.equal(ids[by_id][best.indices[:7]], whole_ids[2].cpu())
