"""Optimizer steps and missed steps: against the float64 reference, torch.optim itself, and each other to the bit."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    INTERPRETED,
    assert_close,
    cases,
    column_slice,
    fitted,
    kernel_settings,
    make_paged,
    make_state,
    moved,
    pairs_of,
    same_bits,
    steps,
)

from mempool import kernels
from mempool.kernels import DenseSchedule, OptimizerStep, Paged, RandomRounding, num_blocks, reference

MASTERS = pytest.mark.parametrize("master", [False, True], ids=["plain", "master"])


@kernel_settings
@given(case=cases(elements=("float32",)), step=steps(), master=st.booleans())
def test_optimizer_step_equals_reference_and_touches_nothing_else(under_test, case, step, master):
    step = fitted(step, case)
    pairs = reference.sort_pairs(case.paged, case.ids)
    sums = reference.segment_sum(pairs, case.weights, case.bags, case.grads).float()
    state = make_state(case.paged, step, master=master)
    expected = {name: tensor.double() for name, tensor in {"values": case.paged.rows, **state}.items()}
    values = expected["master" if master else "values"]
    reference.optimizer_step(values, expected, pairs.rows, sums, step)

    paged, actual_state = under_test.to(case.paged), under_test.to(state)
    under_test.kernels.optimizer_step(paged, actual_state, moved(under_test, pairs), under_test.to(sums), step)

    touched = torch.zeros(case.paged.rows.shape[0], dtype=torch.bool)
    touched[pairs.rows] = True
    assert_close(paged.rows.cpu()[touched], values[touched])
    assert same_bits(paged.rows.cpu()[~touched], case.paged.rows[~touched])
    for name, tensor in actual_state.items():
        assert same_bits(tensor.cpu()[~touched], state[name][~touched])
        assert_close(tensor.cpu()[touched], expected[name][touched])


@kernel_settings
@given(case=cases(), step=steps(), master=st.booleans(), randomly=st.booleans())
def test_stored_elements_are_the_float32_result_rounded(under_test, case, step, master, randomly):
    """The step of any element is, to the bit, that of float32 rows with the same values, rounded as defined."""
    width, block_dim = case.paged.width, case.block_dim
    columns = 1000 + 3 * block_dim * torch.arange(num_blocks(width, block_dim))
    rounding = RandomRounding(RandomRounding.key_of(seed=1, table=2, step=step.step), columns) if randomly else None
    step = fitted(step, case, rounding=rounding)
    own_step = step
    if rounding is not None:
        own_step = dataclasses.replace(step, rounding=RandomRounding(rounding.key, under_test.to(columns)))
    pairs = reference.sort_pairs(case.paged, case.ids)
    state = make_state(case.paged, step, master=master)
    pairs_here, gradients = moved(under_test, pairs), map(under_test.to, (case.weights, case.bags, case.grads))
    sums = under_test.kernels.segment_sum(pairs_here, *gradients)

    start = state["master"] if master else reference.read_values(case.paged).float()
    plain = under_test.to(Paged(start, case.paged.page_table, case.paged.page_shift))
    plain_state = under_test.to({name: tensor for name, tensor in state.items() if name != "master"})
    under_test.kernels.optimizer_step(plain, plain_state, pairs_here, sums, own_step)
    expected = Paged(case.paged.rows.clone(), case.paged.page_table, case.paged.page_shift, case.paged.packed)
    random = None
    if rounding is not None and not master:
        table_columns = reference.table_columns(rounding, width, block_dim)
        assert table_columns[-1] == columns[-1] + (width - 1) % block_dim
        random = reference.random_bits(rounding.key, pairs.slots, table_columns)
    reference.write_values(expected, pairs.rows, plain.rows.cpu()[pairs.rows], random)

    paged, actual_state = under_test.to(case.paged), under_test.to(state)
    under_test.kernels.optimizer_step(paged, actual_state, pairs_here, sums, own_step)
    assert same_bits(paged.rows, expected.rows)
    for name, tensor in plain_state.items():
        assert same_bits(actual_state[name], tensor)
    if master:
        assert same_bits(actual_state["master"], plain.rows)


@kernel_settings
@given(case=cases(), step=steps(), master=st.booleans())
def test_fused_step_is_bitwise_the_two_steps(under_test, case, step, master):
    columns = under_test.to(torch.arange(num_blocks(case.paged.width, case.block_dim)))
    step = fitted(step, case, rounding=RandomRounding(7, columns))
    state = make_state(case.paged, step, master=master)
    paged_two, state_two = under_test.to(case.paged), under_test.to(state)
    paged_one, state_one = under_test.to(case.paged), under_test.to(state)
    weights, bags, grads = map(under_test.to, (case.weights, case.bags, case.grads))
    pairs = under_test.kernels.sort_pairs(paged_two, under_test.to(case.ids))
    sums = under_test.kernels.segment_sum(pairs, weights, bags, grads)
    under_test.kernels.optimizer_step(paged_two, state_two, pairs, sums, step)
    under_test.kernels.fused_step(paged_one, state_one, pairs, weights, bags, grads, step)
    assert same_bits(paged_one.rows, paged_two.rows)
    for name in state:
        assert same_bits(state_one[name], state_two[name])


# Under the interpreter each rule, and each way of storing, once beside each other.
@pytest.mark.parametrize(
    ("algorithm", "element", "master"),
    [
        (algorithm, element, master)
        for algorithm in kernels.ALGORITHMS
        for element in kernels.ELEMENTS
        for master in (False, True)
        if not INTERPRETED or algorithm == "rowwise_adam" or (element, master) == ("bfloat16", False)
    ],
)
def test_a_block_steps_alike_alone_and_beside_others(under_test, algorithm, element, master):
    """Optimizer arithmetic follows the schema's blocks, whichever of them an arena holds side by side."""
    generator = torch.Generator().manual_seed(5)
    columns = torch.tensor([36, 0, 72])
    step = OptimizerStep(algorithm, lr=0.1, step=3, weight_decay=0.1, block_dim=36, rounding=RandomRounding(9, columns))
    page_shift, num_pairs = (0, 10) if under_test.interpreted else (2, 40)
    paged = make_paged(
        generator, num_pages=3, page_shift=page_shift, width=100, element=element, block_dim=36, missing=0.0
    )
    state = make_state(paged, step, master=master)
    ids = torch.randint(0, 3 << page_shift, (num_pairs,), generator=generator)
    bags = torch.randint(0, 6, (num_pairs,), generator=generator)
    weights, grads = torch.randn(num_pairs, generator=generator), torch.randn(6, 100, generator=generator)

    def run(first: int, end: int) -> tuple[Paged, dict[str, torch.Tensor]]:
        part = under_test.to(column_slice(paged, first, end))
        blocks = slice(first // 36, num_blocks(end, 36))
        part_state = {
            name: under_test.to(tensor[:, blocks if name in kernels.BLOCK_STATE else slice(first, end)].contiguous())
            for name, tensor in state.items()
        }
        own_step = dataclasses.replace(step, rounding=RandomRounding(9, under_test.to(columns[blocks])))
        pairs = under_test.kernels.sort_pairs(part, under_test.to(ids))
        part_grads = under_test.to(grads[:, first:end].contiguous())
        under_test.kernels.fused_step(
            part, part_state, pairs, under_test.to(weights), under_test.to(bags), part_grads, own_step
        )
        return part, part_state

    whole, whole_state = run(0, 100)
    on_cpu = Paged(whole.rows.cpu(), whole.page_table.cpu(), whole.page_shift, whole.packed)
    cuts = [(0, 36), (36, 72), (72, 100)]
    parts = [run(*cut) for cut in cuts]
    for cut, (part, _) in zip(cuts, parts, strict=True):
        assert same_bits(part.rows, column_slice(on_cpu, *cut).rows)
    for name, tensor in whole_state.items():
        assert same_bits(torch.cat([part_state[name] for _, part_state in parts], dim=1), tensor)


def torch_optimizer(algorithm: str, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    if algorithm == "sgd":
        return torch.optim.SGD([parameter], lr=0.05)
    if algorithm == "adagrad":
        return torch.optim.Adagrad([parameter], lr=0.05, lr_decay=0.01, eps=0.1)
    if algorithm == "adamw":
        return torch.optim.AdamW([parameter], lr=0.05, betas=(0.8, 0.95), eps=0.1, weight_decay=0.3)
    return torch.optim.SparseAdam([parameter], lr=0.05, betas=(0.8, 0.95), eps=0.1)


@MASTERS
@pytest.mark.parametrize("algorithm", ["sgd", "adagrad", "adam", "adamw"])
def test_many_steps_equal_torchs_own_training(under_test, algorithm, master):
    """Sparse training; of AdamW, which torch has for dense gradients alone, with every row in every step."""
    generator = torch.Generator().manual_seed(6)
    num_steps = 8 if under_test.interpreted else 200
    dense = algorithm == "adamw"
    parameter = torch.nn.Parameter(torch.randn(64, 36, generator=generator))
    optimizer = torch_optimizer(algorithm, parameter)
    page_table = torch.tensor([3, 1, 0, 2], dtype=torch.int32)
    paged = Paged(torch.empty(64, 36), page_table, 4)
    reference.scatter_rows(paged, torch.arange(64), parameter.detach())
    paged = under_test.to(paged)
    state = {name: under_test.to(torch.zeros(64, 36)) for name in kernels.STATE_NAMES[algorithm]}
    if master:
        state["master"] = paged.rows.clone()
    offsets = torch.arange(0, 105 if dense else 41, 8)
    bags = torch.repeat_interleave(torch.arange(len(offsets) - 1), 8)
    for number in range(1, num_steps + 1):
        ids = torch.randint(0, 64, (len(bags),), generator=generator)
        if dense:
            ids[:64] = torch.randperm(64, generator=generator)
        weights = torch.rand(len(bags), generator=generator)
        grads = torch.randn(len(offsets) - 1, 36, generator=generator)
        bag_sums = torch.nn.functional.embedding_bag(
            ids, parameter, offsets[:-1], mode="sum", sparse=not dense, per_sample_weights=weights.clone()
        )
        optimizer.zero_grad()
        bag_sums.backward(grads)
        with torch.sparse.check_sparse_tensor_invariants(True):
            optimizer.step()
        betas = {"beta1": 0.8, "beta2": 0.95} if algorithm in ("adam", "adamw") else {}
        decay = {"adagrad": {"lr_decay": 0.01}, "adamw": {"weight_decay": 0.3}}.get(algorithm, {})
        # An eps large enough to tell sqrt(x) + eps from sqrt(x + eps).
        step = OptimizerStep(algorithm, lr=0.05, step=number, eps=0.1, **betas, **decay)
        pairs = under_test.kernels.sort_pairs(paged, under_test.to(ids))
        under_test.kernels.fused_step(paged, state, pairs, *map(under_test.to, (weights, bags, grads)), step)
    actual = reference.gather_rows(Paged(paged.rows.cpu(), page_table, 4), torch.arange(64))
    assert float((actual - parameter.detach()).norm() / parameter.detach().norm()) < 1e-5


@pytest.mark.parametrize("algorithm", ["rowwise_adagrad", "rowwise_adam"])
def test_many_steps_of_rowwise_rules_equal_the_formulas(under_test, algorithm):
    """What torch does not have, in float64."""
    generator = torch.Generator().manual_seed(6)
    paged = Paged(torch.randn(16, 36, generator=generator), torch.arange(1, dtype=torch.int32), 4)
    shapes = {"row_sum": 3, "exp_avg": 36, "row_exp_avg_sq": 3}
    state = {name: torch.zeros(16, shapes[name]) for name in kernels.STATE_NAMES[algorithm]}
    values, expected_state = paged.rows.double(), {name: tensor.double() for name, tensor in state.items()}
    actual, actual_state = under_test.to(paged), under_test.to(state)
    for number in range(1, 5 if under_test.interpreted else 100):
        step = OptimizerStep(algorithm, lr=0.05, step=number, eps=1e-3, beta1=0.8, beta2=0.95, block_dim=16)
        pairs = pairs_of(torch.randperm(16, generator=generator)[:5])
        sums = torch.randn(5, 36, generator=generator)
        reference.optimizer_step(values, expected_state, pairs.rows, sums, step)
        under_test.kernels.optimizer_step(actual, actual_state, moved(under_test, pairs), under_test.to(sums), step)
    assert float((actual.rows.cpu() - values).norm() / values.norm()) < 1e-5


def test_division_by_zero_is_what_torch_makes_of_it(under_test):
    """Without eps, a first gradient of zero gives 0 / 0: NaN in that element alone, and no exception."""
    paged = under_test.to(Paged(torch.ones(1, 3), torch.zeros(1, dtype=torch.int32), 0))
    state = under_test.to({"sum": torch.zeros(1, 3)})
    step = OptimizerStep("adagrad", lr=0.5, eps=0.0)
    sums = under_test.to(torch.tensor([[2.0, 0.0, -3.0]]))
    under_test.kernels.optimizer_step(paged, state, moved(under_test, pairs_of(torch.tensor([0]))), sums, step)
    assert torch.equal(paged.rows.cpu().nan_to_num(nan=-7.0), torch.tensor([[0.5, -7.0, 1.5]]))


def schedule_of(settings: dict[str, float], rates: list[float], device: str = "cpu") -> DenseSchedule:
    schedule = DenseSchedule(**settings, device=device)
    for rate in rates:
        schedule.append(rate)
    return schedule


schedule_settings = st.fixed_dictionaries(
    {
        "first_step": st.integers(1, 3),
        "beta1": st.sampled_from((0.9, 0.1, 0.0)),
        "beta2": st.sampled_from((0.999, 0.9)),
        "eps": st.sampled_from((1e-8, 0.1)),
        "weight_decay": st.sampled_from((0.0, 0.1, 3.0)),
    }
)


@kernel_settings
@given(
    case=cases(widths=(1, 36, 65)),
    settings=schedule_settings,
    rates=st.lists(st.sampled_from((0.1, 0.02, 0.5)), max_size=30),
    master=st.booleans(),
    data=st.data(),
)
def test_catch_up_equals_reference_and_touches_nothing_else(under_test, case, settings, rates, master, data):
    """Momentum shorter than the gap (beta1 0 and 0.1) and longer; decays with no logarithm (0.5 * 3 >= 1)."""
    schedule = schedule_of(settings, rates)
    if case.paged.element != "float32":
        master = True
    blocks = num_blocks(case.paged.width, case.block_dim)
    state = make_state(case.paged, OptimizerStep("adamw", lr=0.1, block_dim=case.block_dim), master=master)
    state["exp_avg"][::3] *= 0.0
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    to = data.draw(st.integers(schedule.first_step - 1, schedule.last_step))
    span = (schedule.first_step - 1, schedule.last_step + 1)
    state["last_step"] = torch.randint(*span, (case.paged.rows.shape[0], blocks), generator=generator).int()
    rows = reference.sort_pairs(case.paged, case.ids).rows
    rows = rows[torch.randperm(len(rows), generator=generator)]
    expected_state = {name: tensor.double() for name, tensor in state.items()}
    values = expected_state["master"] if master else case.paged.rows.double()
    reference.catch_up(values, expected_state, rows, schedule, to, case.block_dim)

    paged, actual = under_test.to(case.paged), under_test.to(state)
    schedule = schedule_of(settings, rates, under_test.device)
    under_test.kernels.catch_up(paged, actual, under_test.to(rows), schedule, to, case.block_dim)

    touched = torch.zeros(case.paged.rows.shape[0], dtype=torch.bool)
    touched[rows] = True
    behind = touched[:, None] & (state["last_step"] < to)
    assert torch.equal(actual["last_step"].cpu(), torch.where(behind, to, state["last_step"]))
    columns = behind.repeat_interleave(case.block_dim, dim=1)[:, : case.paged.width]
    before = {"values": state["master"] if master else case.paged.rows, **state}
    after = {"values": actual["master"] if master else paged.rows, **actual}
    for name, expected in (("values", values), *((name, expected_state[name]) for name in ("exp_avg", "exp_avg_sq"))):
        assert same_bits(after[name].cpu()[~columns], before[name][~columns])
        assert_close(after[name].cpu()[columns], expected[columns], tolerance=2e-5)
    if master:
        stored = Paged(case.paged.rows.clone(), case.paged.page_table, case.paged.page_shift, case.paged.packed)
        reference.write_values(stored, rows, actual["master"].cpu()[rows])
        for block in range(blocks):
            cut = block * case.block_dim, min((block + 1) * case.block_dim, case.paged.width)
            new, old, now = (column_slice(one, *cut).rows for one in (stored, case.paged, on_cpu(paged)))
            assert same_bits(now[behind[:, block]], new[behind[:, block]])
            assert same_bits(now[~behind[:, block]], old[~behind[:, block]])


def on_cpu(paged: Paged) -> Paged:
    return Paged(paged.rows.cpu(), paged.page_table.cpu(), paged.page_shift, paged.packed)


@pytest.mark.parametrize(
    ("betas", "weight_decay", "rate", "share"),
    [
        pytest.param((0.9, 0.999), 0.1, 0.02, 0.1, id="usual"),
        pytest.param((0.9, 0.99), 0.0, 0.02, 0.1, id="no-decay"),
        pytest.param((0.5, 0.9), 0.05, 0.02, 0.01, id="gaps-beyond-the-horizon"),
        pytest.param((0.0, 0.99), 0.1, 0.02, 0.1, id="no-momentum"),
        pytest.param((0.9, 0.99), 50.0, 0.02, 0.1, id="decay-to-zero"),
        pytest.param((0.9, 0.99), 70.0, 0.02, 0.1, id="decay-turns-the-sign"),
    ],
)
@MASTERS
def test_caught_up_rows_equal_dense_adamw_of_torch(under_test, betas, weight_decay, rate, share, master):
    """Rows are touched at random under changing learning rates, and caught up first; at the end all are caught up."""
    generator = torch.Generator().manual_seed(3)
    num_steps = 12 if under_test.interpreted else 120
    parameter = torch.nn.Parameter(torch.randn(64, 40, generator=generator))
    optimizer = torch.optim.AdamW([parameter], lr=rate, betas=betas, weight_decay=weight_decay)
    paged = under_test.to(Paged(parameter.detach(), torch.zeros(1, dtype=torch.int32), 6))
    state = {name: under_test.to(torch.zeros(64, 40)) for name in ("exp_avg", "exp_avg_sq")}
    state["last_step"] = under_test.to(torch.zeros(64, 3, dtype=torch.int32))
    if master:
        state["master"] = paged.rows.clone()
    settings = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-8, "weight_decay": weight_decay}
    schedule = DenseSchedule(first_step=1, **settings, device=under_test.device)
    for number in range(1, num_steps + 1):
        lr = rate * (0.2 + 0.8 * float(torch.rand((), generator=generator)))
        if number % 50 == 0:
            lr = rate
        optimizer.param_groups[0]["lr"] = lr
        touched = (torch.rand(64, generator=generator) < share).nonzero().squeeze(1)
        parameter.grad = torch.zeros(64, 40)
        sums = torch.randn(len(touched), 40, generator=generator)
        parameter.grad[touched] = sums
        optimizer.step()
        schedule.append(lr)
        rows = under_test.to(touched)
        under_test.kernels.catch_up(paged, state, rows, schedule, number - 1, 16)
        step = OptimizerStep("adamw", lr=lr, step=number, block_dim=16, **settings)
        under_test.kernels.optimizer_step(paged, state, moved(under_test, pairs_of(touched)), under_test.to(sums), step)
        state["last_step"][rows] = number
    under_test.kernels.catch_up(paged, state, under_test.to(torch.arange(64)), schedule, num_steps, 16)
    assert float((paged.rows.cpu() - parameter.detach()).norm() / parameter.detach().norm()) < 1e-5
    if master:
        assert same_bits(state["master"], paged.rows)
