"""Updates and commits equal torch's own sparse training, whatever the placement."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mempool.kernels import pack_rows, unpack_rows
from mempool.types import OptimizerSpec
from mempool.types.norms import joined_norm

from .bags import Bags, make_bags, reference_sums, relative_error
from .driver import Driver, make_schema, same
from .layouts import LAYOUTS
from .oracle import Oracle

OPTIMIZERS = {
    "sgd": OptimizerSpec(algorithm="sgd", lr=0.1),
    "adagrad": OptimizerSpec(algorithm="adagrad", lr=0.1, lr_decay=0.05, initial_accumulator_value=0.1),
    "rowwise_adagrad": OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1),
    "adam": OptimizerSpec(algorithm="adam", lr=0.1, eps=1e-8),
    "adamw": OptimizerSpec(algorithm="adamw", lr=0.1, eps=1e-8, weight_decay=0.1),
    "dense adamw": OptimizerSpec(algorithm="adamw", lr=0.1, eps=1e-8, beta1=0.7, weight_decay=0.1, dense=True),
    "rowwise_adam": OptimizerSpec(algorithm="rowwise_adam", lr=0.1, eps=1e-8),
}


OPTIONS = {
    "momentum": (
        OptimizerSpec(algorithm="sgd", lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1),
        {},
    ),
    "nesterov": (
        OptimizerSpec(algorithm="sgd", lr=0.1, momentum=0.8, nesterov=True, max_norm=1.2),
        {"block_dim": 10},
    ),
    "adam": (
        OptimizerSpec(algorithm="adam", lr=0.1, eps=0.1, weight_decay=0.1, corrected_eps=True),
        {},
    ),
    "whole rows": (
        OptimizerSpec(
            algorithm="rowwise_adam",
            lr=0.1,
            eps=0.1,
            weight_decay=0.3,
            decoupled_weight_decay=True,
            corrected_eps=True,
            max_norm=1.2,
        ),
        {"block_dim": 10},
    ),
    "l2": (OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1, weight_decay=0.1), {}),
}


# A slot's arithmetic is that of its blocks, whichever lie beside them (the kernels' tests): each rule where shards have
# pages of different blocks, and each layout under a rule of elements and one of whole blocks.
@pytest.mark.parametrize(
    ("algorithm", "layout"),
    sorted(
        {(algorithm, "mixed") for algorithm in OPTIMIZERS}
        | {(algorithm, layout) for algorithm in ("adagrad", "rowwise_adam") for layout in LAYOUTS}
    ),
)
def test_equals_torch(driver: Driver, algorithm: str, layout: str) -> None:
    driver.create(make_schema(optimizer=OPTIMIZERS[algorithm]), layout)
    _train_beside_the_oracle(driver)


@pytest.mark.parametrize(("options", "layout"), list(zip(OPTIONS, itertools.cycle(["rows", "mixed"]))))
def test_options_equal_their_formulas(driver: Driver, options: str, layout: str) -> None:
    spec, changes = OPTIONS[options]
    schema = make_schema(optimizer=spec, **changes)
    owners = [row[: schema.num_blocks] for row in LAYOUTS[layout]]
    driver.create(schema, owners)
    _train_beside_the_oracle(driver)


def _require_near(got: Tensor, expected: Tensor, step: int) -> None:
    """As relative_error, and says where they differ."""
    error = relative_error(got, expected)
    apart = (got.double() - expected.detach().double()).abs()
    where = [(slot, column, float(apart[slot, column])) for slot, column in (apart > 1e-5).nonzero().tolist()]
    assert error < 1e-5, (
        f"{error:.3g} after step {step}; of {apart.numel()} elements differ (slot, column, by): {where}"
    )


def _train_beside_the_oracle(driver: Driver) -> None:
    oracle = Oracle(driver.schema, driver.read())
    sequences, generator = itertools.count(), torch.Generator().manual_seed(11)
    for step in range(1, 7):
        lr, grad_scale, want_norm = 0.1 / step, (1.0, 0.25)[step % 2], bool(step % 3)
        pushed = []
        for _ in range(1 + step % 2):
            bags = make_bags(100 * step + len(pushed), weighted=step != 3)
            grads = torch.randn(bags.num_bags, 10, generator=generator)
            assert relative_error(driver.gather(bags), reference_sums(oracle.values, bags)) < 1e-5
            sequence = next(sequences)
            weight_grad = driver.update(step, sequence, grads)
            assert relative_error(weight_grad, oracle.backward(bags, grads)) < 1e-5
            pushed.append(sequence)
        replies = driver.prepare(step, pushed, want_norm=want_norm)
        gradient = oracle.values.grad
        assert gradient is not None
        norm = sum(reply.squared_norm for reply in replies.values())
        expected = float(gradient.coalesce().values().square().sum()) if want_norm else 0.0
        assert norm == pytest.approx(expected, rel=1e-5)
        for order in (1.0, 3.5, math.inf) if step == 2 else ():
            replies = driver.prepare(step, pushed, norm_order=order)
            norm = joined_norm([reply.norm for reply in replies.values()], order)
            assert norm == pytest.approx(float(torch.linalg.vector_norm(gradient.to_dense(), order)), rel=1e-5)
            assert driver.prepare(step, pushed) == {shard: replace(reply, norm=0.0) for shard, reply in replies.items()}
        driver.commit(step, pushed, lr=lr, grad_scale=grad_scale)
        oracle.step(lr, grad_scale)
        _require_near(driver.read(), oracle.values, step)
    assert {driver.status(shard).version for shard in driver.owners} == {6}


# The kernels' tests have every rule in one pass and in two.
@pytest.mark.parametrize("algorithm", ["adagrad", "rowwise_adam", "dense adamw"])
def test_asking_for_the_norm_changes_no_bit(driver: Driver, algorithm: str) -> None:
    results = []
    for want_norm in (True, False):
        driver.create(make_schema(optimizer=OPTIMIZERS[algorithm]), "mixed")
        for step in (1, 2):
            bags = make_bags(step, lengths=(30, 4, 0, 9))
            grads = torch.randn(4, 10, generator=torch.Generator().manual_seed(step))
            driver.train(step, {step: (bags, grads)}, want_norm=want_norm)
        results.append(driver.contents())
        driver.drop()
    assert same(*results)


@pytest.mark.parametrize("layout", ["one", "columns", "mixed"])
def test_the_order_of_arrival_changes_no_bit(driver: Driver, layout: str) -> None:
    lookups = {
        sequence: (make_bags(sequence), torch.randn(4, 10, generator=torch.Generator().manual_seed(sequence)))
        for sequence in range(3)
    }
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        driver.create(make_schema(), layout)
        driver.train(1, {sequence: lookups[sequence] for sequence in order})
        results.append(driver.contents())
        driver.drop()
    assert same(*results)


@pytest.mark.parametrize("want_norm", [False, True])
def test_sums_are_made_in_order_of_sequence_bag_and_pair(driver: Driver, want_norm: bool) -> None:
    driver.create(make_schema(optimizer=OPTIMIZERS["sgd"]), "columns")
    driver.write("values", torch.tensor([3]), torch.zeros(1, 10))
    # Numbers whose float32 sum depends on the order: sequence 4, then 5, its bags, their pairs.
    weights = {4: [1e8, 1.0, 3.0], 5: [-1e8, 0.5, 1e-3, 7.0]}
    ids = torch.tensor([3])
    for sequence in (5, 4):
        pairs = len(weights[sequence])
        bags = Bags(ids.expand(pairs), torch.tensor(weights[sequence]), torch.tensor([0, 2, pairs]))
        driver.update(1, sequence, torch.ones(2, 10), bags=bags)
    driver.prepare(1, [5, 4], want_norm=want_norm)
    driver.commit(1, [5, 4], lr=1.0)
    total = torch.zeros(())
    for weight in weights[4] + weights[5]:
        total = total + torch.tensor(weight)
    assert torch.equal(driver.read("values", ids), (-total).expand(1, 10))


def test_bfloat16_storage_trains_in_float32(driver: Driver) -> None:
    driver.create(make_schema(dtype="bfloat16", optimizer=OPTIMIZERS["adagrad"]), "columns")
    oracle = Oracle(driver.schema, driver.read())
    for step in range(1, 4):
        bags, grads = make_bags(step), torch.randn(4, 10)
        driver.train(step, {step: (bags, grads)})
        oracle.backward(bags, grads)
        oracle.step(0.1, 1.0)
    assert driver.read().dtype == torch.bfloat16
    assert relative_error(driver.read(), oracle.values) < 1e-2
    assert driver.read("values.sum").dtype == torch.float32


def test_short_gradients(driver: Driver) -> None:
    bags, grads = make_bags(1), torch.randn(4, 10).to(torch.bfloat16)
    driver.create(make_schema(), "columns")
    driver.train(1, {0: (bags, grads)})
    short = driver.read()
    driver.drop()
    driver.create(make_schema(), "columns")
    driver.train(1, {0: (bags, grads.float())})
    assert torch.equal(driver.read(), short)


def test_packed_gradients_are_what_they_stand_for(driver: Driver) -> None:
    bags, grads = make_bags(1), torch.randn(4, 10)
    driver.create(make_schema(), "columns")
    driver.gather(bags)
    weight_grad = torch.zeros(())
    meant = torch.zeros(4, 10)
    for shard in driver.owners:
        request = driver.update_request(shard, 1, 0, grads)
        packed = pack_rows(driver.packed(shard), request.grads)
        meant[:, driver.columns(request.blocks)] = unpack_rows(driver.packed(shard), packed)
        reply = driver.call(driver.host(shard).update(replace(request, grads=packed)))
        weight_grad = weight_grad + reply.weight_grad
    driver.prepare(1, [0])
    driver.commit(1, [0])
    found = driver.read()
    driver.drop()
    driver.create(make_schema(), "columns")
    driver.gather(bags)
    assert torch.equal(driver.update(1, 0, meant), weight_grad)
    driver.prepare(1, [0])
    driver.commit(1, [0])
    assert torch.equal(driver.read(), found)


def test_a_step_without_updates_counts(driver: Driver) -> None:
    """Every owner gets every commit, and one may have had no pairs at all."""
    driver.create(make_schema(), "columns")
    before = driver.read()
    driver.train(1, {})
    assert torch.equal(driver.read(), before)
    assert {driver.status(shard).version for shard in driver.owners} == {1}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_told(driver: Driver, bad: float) -> None:
    driver.create(make_schema(), "columns")
    grads = torch.ones(4, 10)
    grads[0, 1] = bad  # block 0 alone
    driver.gather(make_bags(1))
    driver.update(1, 0, grads)
    finite = {shard: reply.finite for shard, reply in driver.prepare(1, [0]).items()}
    assert finite == {0: False, 1: True}
    before = driver.read()
    driver.discard(1)
    assert torch.equal(driver.read(), before)
