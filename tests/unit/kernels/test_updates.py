"""Sorting, segment sums and optimizer steps: against the float64 reference, torch.optim itself, and each other."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Case, assert_close, cases, kernel_settings, make_paged, same_bits

from mempool import kernels
from mempool.kernels import OptimizerStep, Paged, reference


def make_state(paged: Paged, step: OptimizerStep, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Positive state for the owned rows, NaN in the spare ones."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, width = paged.rows.shape
    spare = paged.rows[:, 0].isnan()
    state = {}
    for name in kernels.STATE_NAMES[step.algorithm]:
        columns = kernels.num_blocks(width, step.block_dim) if name == "row_sum" else width
        state[name] = torch.rand(num_rows, columns, generator=generator)
        state[name][spare] = torch.nan
    return state


@st.composite
def steps(draw) -> OptimizerStep:
    return OptimizerStep(
        draw(st.sampled_from(kernels.ALGORITHMS)),
        lr=draw(st.sampled_from((0.1, 1e-3))),
        grad_scale=draw(st.sampled_from((1.0, 0.37))),
        step=draw(st.integers(1, 50)),
        eps=draw(st.sampled_from((1e-8, 0.3))),
        lr_decay=draw(st.sampled_from((0.0, 0.01))),
        block_dim=draw(st.sampled_from((1, 16, 64, 500))),
    )


@kernel_settings
@given(case=cases())
def test_sort_pairs_equals_reference(under_test, case):
    actual = under_test.kernels.sort_pairs(under_test.to(case.paged), under_test.to(case.ids))
    expected = reference.sort_pairs(case.paged, case.ids)
    assert actual.order.tolist() == expected.order.tolist()
    assert actual.rows.tolist() == expected.rows.tolist()
    assert actual.starts.tolist() == expected.starts.tolist()


def test_sort_pairs_is_stable_over_wide_ids(under_test):
    """Ids that differ only in high bits, so that every digit of a radix sort counts."""
    paged = Paged(torch.zeros(1 << 8, 1), torch.full((1 << 12,), -1, dtype=torch.int32), 6)
    here = torch.tensor([0, 1, 700, 4095])
    paged.page_table[here] = torch.arange(4, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    ids = (here[torch.randint(0, 4, (3000,), generator=generator)] << 6) + torch.randint(
        0, 64, (3000,), generator=generator
    )
    actual = under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
    expected = reference.sort_pairs(paged, ids)
    for name in ("order", "rows", "starts"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name))


@kernel_settings
@given(case=cases())
def test_segment_sum_equals_reference(under_test, case):
    expected_pairs = reference.sort_pairs(case.paged, case.ids)
    pairs = under_test.kernels.sort_pairs(under_test.to(case.paged), under_test.to(case.ids))
    actual = under_test.kernels.segment_sum(pairs, *map(under_test.to, (case.weights, case.bags, case.grads)))
    assert_close(actual, reference.segment_sum(expected_pairs, case.weights, case.bags, case.grads))


@kernel_settings
@given(case=cases(), step=steps())
def test_optimizer_step_equals_reference_and_touches_nothing_else(under_test, case, step):
    pairs = reference.sort_pairs(case.paged, case.ids)
    sums = reference.segment_sum(pairs, case.weights, case.bags, case.grads).float()
    state = make_state(case.paged, step)
    expected_values = case.paged.rows.double()
    expected_state = {name: tensor.double() for name, tensor in state.items()}
    reference.optimizer_step(expected_values, expected_state, pairs.rows, sums, step)

    paged, actual_state = under_test.to(case.paged), under_test.to(state)
    under_test.kernels.optimizer_step(paged, actual_state, *map(under_test.to, (pairs.rows, sums)), step)

    touched = torch.zeros(case.paged.rows.shape[0], dtype=torch.bool)
    touched[pairs.rows] = True
    assert same_bits(paged.rows.cpu()[~touched], case.paged.rows[~touched])
    tolerance = 2e-6 if case.paged.rows.dtype == torch.float32 else 2**-8
    assert_close(paged.rows.cpu()[touched], expected_values[touched], tolerance=tolerance)
    for name, tensor in actual_state.items():
        assert same_bits(tensor.cpu()[~touched], state[name][~touched])
        assert_close(tensor.cpu()[touched], expected_state[name][touched])


@kernel_settings
@given(case=cases(), step=steps())
def test_fused_step_is_bitwise_the_two_steps(under_test, case, step):
    state = make_state(case.paged, step)
    paged_two, state_two = under_test.to(case.paged), under_test.to(state)
    paged_one, state_one = under_test.to(case.paged), under_test.to(state)
    weights, bags, grads = map(under_test.to, (case.weights, case.bags, case.grads))
    pairs = under_test.kernels.sort_pairs(paged_two, under_test.to(case.ids))
    sums = under_test.kernels.segment_sum(pairs, weights, bags, grads)
    under_test.kernels.optimizer_step(paged_two, state_two, pairs.rows, sums, step)
    under_test.kernels.fused_step(paged_one, state_one, pairs, weights, bags, grads, step)
    assert same_bits(paged_one.rows, paged_two.rows)
    for name in state:
        assert same_bits(state_one[name], state_two[name])


@pytest.mark.parametrize("algorithm", kernels.ALGORITHMS)
def test_a_block_steps_alike_alone_and_beside_others(under_test, algorithm):
    """Optimizer arithmetic follows the schema's blocks, whichever of them an arena holds side by side."""
    generator = torch.Generator().manual_seed(5)
    step = OptimizerStep(algorithm, lr=0.1, step=3, block_dim=36)
    paged = make_paged(generator, num_pages=3, page_shift=2, width=100, dtype=torch.float32, missing=0.0)
    state = make_state(paged, step)
    ids, bags = torch.randint(0, 12, (40,), generator=generator), torch.randint(0, 6, (40,), generator=generator)
    weights, grads = torch.randn(40, generator=generator), torch.randn(6, 100, generator=generator)

    def run(first: int, end: int) -> list[torch.Tensor]:
        part = under_test.to(Paged(paged.rows[:, first:end].contiguous(), paged.page_table, 2))
        blocks = slice(first // 36, kernels.num_blocks(end, 36))
        columns = {"row_sum": blocks}
        part_state = {
            name: under_test.to(tensor[:, columns.get(name, slice(first, end))].contiguous())
            for name, tensor in state.items()
        }
        pairs = under_test.kernels.sort_pairs(part, under_test.to(ids))
        part_grads = under_test.to(grads[:, first:end].contiguous())
        under_test.kernels.fused_step(
            part, part_state, pairs, under_test.to(weights), under_test.to(bags), part_grads, step
        )
        return [part.rows, *part_state.values()]

    whole = run(0, 100)
    parts = [run(0, 36), run(36, 72), run(72, 100)]
    for number, tensor in enumerate(whole):
        assert same_bits(torch.cat([part[number] for part in parts], dim=1), tensor)


def torch_optimizer(algorithm: str, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    if algorithm == "sgd":
        return torch.optim.SGD([parameter], lr=0.05)
    if algorithm == "adagrad":
        return torch.optim.Adagrad([parameter], lr=0.05, lr_decay=0.01, eps=0.1)
    return torch.optim.SparseAdam([parameter], lr=0.05, betas=(0.8, 0.95), eps=0.1)


@pytest.mark.parametrize("algorithm", ["sgd", "adagrad", "adam"])
def test_many_steps_equal_torchs_own_sparse_training(under_test, algorithm):
    generator = torch.Generator().manual_seed(6)
    num_steps = 8 if under_test.interpreted else 200
    parameter = torch.nn.Parameter(torch.randn(64, 36, generator=generator))
    optimizer = torch_optimizer(algorithm, parameter)
    page_table = torch.tensor([3, 1, 0, 2], dtype=torch.int32)
    paged = Paged(torch.empty(64, 36), page_table, 4)
    reference.scatter_rows(paged, torch.arange(64), parameter.detach())
    paged = under_test.to(paged)
    state = {name: under_test.to(torch.zeros(64, 36)) for name in kernels.STATE_NAMES[algorithm]}
    offsets = torch.arange(0, 41, 8)
    bags = torch.repeat_interleave(torch.arange(5), 8)
    for number in range(1, num_steps + 1):
        ids = torch.randint(0, 64, (40,), generator=generator)
        weights = torch.rand(40, generator=generator)
        grads = torch.randn(5, 36, generator=generator)
        bag_sums = torch.nn.functional.embedding_bag(
            ids, parameter, offsets[:-1], mode="sum", sparse=True, per_sample_weights=weights.clone()
        )
        optimizer.zero_grad()
        bag_sums.backward(grads)
        with torch.sparse.check_sparse_tensor_invariants(True):
            optimizer.step()
        betas = {"beta1": 0.8, "beta2": 0.95} if algorithm == "adam" else {}
        decay = {"lr_decay": 0.01} if algorithm == "adagrad" else {}
        # An eps large enough to tell sqrt(x) + eps from sqrt(x + eps).
        step = OptimizerStep(algorithm, lr=0.05, step=number, eps=0.1, **betas, **decay)
        pairs = under_test.kernels.sort_pairs(paged, under_test.to(ids))
        under_test.kernels.fused_step(paged, state, pairs, *map(under_test.to, (weights, bags, grads)), step)
    actual = reference.gather_rows(Paged(paged.rows.cpu(), page_table, 4), torch.arange(64))
    assert float((actual - parameter.detach()).norm() / parameter.detach().norm()) < 1e-5


def test_division_by_zero_is_what_torch_makes_of_it(under_test):
    """Without eps, a first gradient of zero gives 0 / 0: NaN in that element alone, and no exception."""
    paged = under_test.to(Paged(torch.ones(1, 3), torch.zeros(1, dtype=torch.int32), 0))
    state = under_test.to({"sum": torch.zeros(1, 3)})
    step = OptimizerStep("adagrad", lr=0.5, eps=0.0)
    sums = under_test.to(torch.tensor([[2.0, 0.0, -3.0]]))
    under_test.kernels.optimizer_step(paged, state, under_test.to(torch.tensor([0])), sums, step)
    assert torch.equal(paged.rows.cpu().nan_to_num(nan=-7.0), torch.tensor([[0.5, -7.0, 1.5]]))


def test_bfloat16_is_rounded_to_nearest_even(under_test):
    """Ties, carries into the exponent, and NaN: as torch's own conversion rounds them."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3FFFFFFF, 0x7F7FFFFF, 0x00000001, 0x7FC00001, 0x3F808001]
    )
    wanted = torch.cat([bits.to(torch.int32), (bits.to(torch.int32) | -(2**31))]).view(torch.float32)[None]
    paged = under_test.to(Paged(torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32), 0))
    step = OptimizerStep("sgd", lr=-1.0)
    under_test.kernels.optimizer_step(paged, {}, under_test.to(torch.tensor([0])), under_test.to(wanted), step)
    expected = wanted.to(torch.bfloat16)
    assert torch.equal(paged.rows.isnan().cpu(), expected.isnan())
    assert same_bits(paged.rows.cpu()[~expected.isnan()], expected[~expected.isnan()])


@kernel_settings
@given(
    rows=st.integers(0, 600), width=st.sampled_from((1, 3, 65)), poison=st.sampled_from((None, "nan", "inf", "-inf"))
)
def test_squared_norm(under_test, rows, width, poison):
    generator = torch.Generator().manual_seed(rows)
    sums = torch.randn(rows, width, generator=generator) * 1e20  # squares overflow float32, not float64
    if poison is not None and rows:
        sums[rows // 2, width // 2] = float(poison)
    norm, finite = under_test.kernels.squared_norm(under_test.to(sums))
    expected, expected_finite = reference.squared_norm(sums)
    assert finite == expected_finite
    if finite:
        assert norm == pytest.approx(expected, rel=1e-12)


def test_hot_and_cold_rows_are_deterministic(under_test):
    """One slot with most of the pairs, on one thread and on two: the same bits as adding in order."""
    generator = torch.Generator().manual_seed(7)
    num_pairs = 150 if under_test.interpreted else 20_000
    ids = torch.randint(0, 256, (num_pairs,), generator=generator)
    ids[torch.rand(num_pairs, generator=generator) < 0.8] = 17
    bags, weights = torch.randint(0, 50, (num_pairs,), generator=generator), torch.randn(num_pairs, generator=generator)
    grads = torch.randn(50, 65, generator=generator)
    paged = Paged(torch.zeros(256, 65), torch.arange(16, dtype=torch.int32), 4)
    pairs = under_test.kernels.sort_pairs(under_test.to(paged), under_test.to(ids))
    threads_before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(under_test.kernels.segment_sum(pairs, *map(under_test.to, (weights, bags, grads))))
    finally:
        torch.set_num_threads(threads_before)
    in_order = torch.zeros(65)
    for pair in (ids == 17).nonzero().flatten().tolist():
        in_order += weights[pair] * grads[bags[pair]]
    assert same_bits(results[0], results[1])
    assert same_bits(results[0].cpu()[int((pairs.rows == 17).nonzero())], in_order)


def test_cases_have_what_the_tests_need():
    """The generator of cases itself: spare rows are NaN and owned rows are not."""
    paged = make_paged(torch.Generator().manual_seed(1), num_pages=5, page_shift=2, width=3, dtype=torch.float32)
    empty = torch.empty(0, dtype=torch.int64)
    case = Case(paged, 20, empty, None, torch.zeros(1, dtype=torch.int64), empty, torch.empty(0, 3))
    assert torch.equal(case.owned_rows, ~paged.rows[:, 0].isnan())
    assert dataclasses.replace(case, num_slots=19).num_slots == 19
