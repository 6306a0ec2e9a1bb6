"""Options of the rules: against torch.optim where torch has them, and FBGEMM's formulas in float64 where it has not."""

import math

import pytest
import torch
from kernel_cases import assert_close, make_paged, moved, pairs_of, same_bits

from mempool import kernels
from mempool.kernels import OptimizerStep, Paged, reference

ROWS, WIDTH = 16, 36
STEPS = 12


def train(under_test, values: torch.Tensor, options: dict, touched: list[torch.Tensor], grads: list[torch.Tensor]):
    """The values after as many steps as there are gradients, each of the rows touched, and the state."""
    page_table = torch.zeros(1, dtype=torch.int32)
    paged = under_test.to(Paged(values.clone(), page_table, 4))
    step = OptimizerStep(lr=0.05, block_dim=WIDTH, **options)
    initial = {"momentum_buffer": kernels.NO_MOMENTUM}
    state = {
        name: torch.full((ROWS, 1 if name in kernels.BLOCK_STATE else WIDTH), initial.get(name, 0.0))
        for name in kernels.STATE_NAMES[step.algorithm]
    }
    state = under_test.to(state)
    for number, (rows, sums) in enumerate(zip(touched, grads, strict=True), 1):
        step = OptimizerStep(lr=0.05, block_dim=WIDTH, step=number, **options)
        under_test.kernels.optimizer_step(paged, state, moved(under_test, pairs_of(rows)), under_test.to(sums), step)
    return paged.rows.cpu(), {name: tensor.cpu() for name, tensor in state.items()}


def random_steps(share: float, seed: int = 3):
    """Values, the rows of each step, and their gradients."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ROWS, WIDTH, generator=generator)
    touched = [(torch.rand(ROWS, generator=generator) < share).nonzero()[:, 0] for _ in range(STEPS)]
    return values, touched, [torch.randn(len(rows), WIDTH, generator=generator) for rows in touched]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.8, "weight_decay": 0.1},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_sgd_is_torchs_of_each_row_that_has_a_gradient(under_test, options):
    """torch's parameters are single rows: one without a gradient keeps its value and its momentum, as here."""
    values, touched, grads = random_steps(0.4)
    parameters = [torch.nn.Parameter(row.clone()) for row in values]
    optimizer = torch.optim.SGD(parameters, lr=0.05, **options)
    for rows, sums in zip(touched, grads, strict=True):
        optimizer.zero_grad()
        for row, grad in zip(rows.tolist(), sums, strict=True):
            parameters[row].grad = grad
        optimizer.step()
    own = {"algorithm": "sgd_momentum" if "momentum" in options else "sgd", "l2": True} | options
    actual, state = train(under_test, values, own, touched, grads)
    assert relative_error(actual, torch.stack(list(parameters)).detach()) < 1e-6
    for row, parameter in enumerate(parameters) if state else ():
        expected = optimizer.state[parameter].get("momentum_buffer")
        assert_close(state["momentum_buffer"][row], torch.zeros(WIDTH) if expected is None else expected)


def test_a_first_gradient_is_not_dampened_also_where_it_is_minus_zero(under_test):
    values, first = torch.ones(ROWS, WIDTH), torch.full((1, WIDTH), -0.0)
    rows = [torch.tensor([2])] * 2
    options = {"algorithm": "sgd_momentum", "momentum": 0.5, "dampening": 0.25}
    _, state = train(under_test, values, options, rows, [first, torch.ones(1, WIDTH)])
    assert torch.equal(state["momentum_buffer"][2], torch.full((WIDTH,), 0.75))
    assert same_bits(state["momentum_buffer"][3], torch.full((WIDTH,), -0.0))  # no gradient yet


@pytest.mark.parametrize(
    ("torchs", "options"),
    [
        (lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1), {"algorithm": "adagrad", "eps": 1e-10}),
        (
            lambda p: torch.optim.Adam(p, lr=0.05, eps=0.1, weight_decay=0.1),
            {"algorithm": "adam", "eps": 0.1, "corrected_eps": True},
        ),
        (
            lambda p: torch.optim.AdamW(p, lr=0.05, eps=0.1, weight_decay=0.1),
            {"algorithm": "adam", "eps": 0.1, "corrected_eps": True, "l2": False},
        ),
    ],
    ids=["adagrad", "adam", "adamw"],
)
def test_weight_decay_and_corrected_eps_are_torchs(under_test, torchs, options):
    """Every row has a gradient in every step: torch counts its steps for all rows together."""
    values, touched, grads = random_steps(2.0)
    parameter = torch.nn.Parameter(values.clone())
    optimizer = torchs([parameter])
    for sums in grads:
        parameter.grad = sums
        optimizer.step()
    actual, _ = train(under_test, values, {"l2": True, "weight_decay": 0.1} | options, touched, grads)
    assert relative_error(actual, parameter.detach()) < 1e-6


def fbgemm_formulas(values, options, touched, grads):
    """FBGEMM's row-wise Adagrad and partial row-wise Adam as its documentation and sources have them, in float64."""
    values, lr, eps = values.double(), 0.05, options["eps"]
    decay, l2 = options.get("weight_decay", 0.0), options.get("l2", False)
    max_norm = options.get("max_norm", math.inf)
    row_state, moments = torch.zeros(ROWS, 1, dtype=torch.float64), torch.zeros_like(values)
    for number, (rows, sums) in enumerate(zip(touched, grads, strict=True), 1):
        grad = sums.double() + (decay * values[rows] if l2 else 0.0)
        square = grad.square().mean(dim=1, keepdim=True)
        if options["algorithm"] == "rowwise_adagrad":
            row_state[rows] += square
            update = grad / (row_state[rows].sqrt() + eps)
        else:
            moments[rows] = 0.9 * moments[rows] + 0.1 * grad
            row_state[rows] = 0.999 * row_state[rows] + 0.001 * square
            corrected = row_state[rows] / (1 - 0.999**number)
            update = moments[rows] / (1 - 0.9**number) / (corrected.sqrt() + eps)
        values[rows] -= lr * (update + (0.0 if l2 else decay * values[rows]))
        norm = values[rows].norm(dim=1, keepdim=True)
        values[rows] = torch.where(norm > max_norm, values[rows] * max_norm / norm, values[rows])
    return values, row_state


@pytest.mark.parametrize("algorithm", ["rowwise_adagrad", "rowwise_adam"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "l2": True}, {"max_norm": 4.0}],
    ids=["plain", "decoupled", "l2", "max_norm"],
)
def test_row_wise_rules_are_those_of_fbgemm(under_test, algorithm, options):
    values, touched, grads = random_steps(0.5)
    own = {"algorithm": algorithm, "eps": 1e-2, "corrected_eps": algorithm == "rowwise_adam"} | options
    actual, state = train(under_test, values, own, touched, grads)
    expected, row_state = fbgemm_formulas(values, own, touched, grads)
    assert relative_error(actual, expected) < 1e-6
    assert relative_error(state[kernels.STATE_NAMES[algorithm][-1]], row_state) < 1e-6
    if "max_norm" in options:
        assert float(actual[torch.cat(touched)].norm(dim=1).max()) < 4.0 * (1 + 1e-6)
        assert float(values.norm(dim=1).max()) > 4.0


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("EXACT_SGD", "sgd"), ("EXACT_ADAGRAD", "adagrad"), ("EXACT_ROWWISE_ADAGRAD", "rowwise_adagrad")],
)
def test_rules_are_those_of_fbgemms_build(under_test, name, algorithm):
    """What its build for the CPU has: neither Adam nor bounds of norms, and 1.8.0 leaves weight decay out."""
    tbe = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    values, touched, grads = random_steps(0.5)
    bags = tbe.SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, WIDTH, common.EmbeddingLocation.HOST, tbe.ComputeDevice.CPU)],
        optimizer=getattr(tbe.OptimType, name),
        learning_rate=0.05,
        eps=1e-2,
    )
    bags.split_embedding_weights()[0].copy_(values)
    for rows, sums in zip(touched, grads, strict=True):
        bags(rows, torch.arange(len(rows) + 1)).backward(sums)
    actual, _ = train(under_test, values, {"algorithm": algorithm, "eps": 1e-2}, touched, grads)
    assert relative_error(actual, bags.split_embedding_weights()[0]) < 1e-6


def test_step_refuses_options_that_a_rule_has_not():
    for options in ({"momentum": 0.9}, {"nesterov": True}):
        with pytest.raises(ValueError, match="momentum is of sgd_momentum alone"):
            OptimizerStep("adagrad", lr=0.1, **options)
    with pytest.raises(ValueError, match="decoupled"):
        OptimizerStep("adamw", lr=0.1, l2=True)
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        OptimizerStep("sgd", lr=0.1, max_norm=float("nan"))


def test_max_norm_needs_rows_of_one_block():
    paged = make_paged(torch.Generator().manual_seed(0), num_pages=1, page_shift=2, width=65, missing=0.0)
    pairs = reference.sort_pairs(paged, torch.tensor([1]))
    with pytest.raises(ValueError, match="max_norm is of whole rows, of one block"):
        kernels.optimizer_step(paged, {}, pairs, torch.ones(1, 65), OptimizerStep("sgd", lr=0.1, max_norm=1.0))
