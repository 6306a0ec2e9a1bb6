"""Optimizers: one meaning however they are written, torch's defaults, what travels to the shards."""

import inspect
from typing import Any

import pytest
import torch

from mempool.config import SGD, Adagrad, Adam, AdamW, RowWiseAdagrad, RowWiseAdam, TableConfig, resolve
from mempool.errors import ConfigError
from mempool.types import OptimizerSpec

ALL = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": Adam,
    "adamw": AdamW,
    "rowwise_adam": RowWiseAdam,
}


def from_mapping(data: dict[str, Any]) -> Any:
    return TableConfig(name="a", num_slots=4, value_dim=2, optimizer=data).optimizer


@pytest.mark.parametrize(("name", "made"), ALL.items())
def test_the_constructor_has_the_same_defaults_as_a_file(name: str, made: Any) -> None:
    assert from_mapping({"type": name, "lr": 0.25}) == made(0.25) == made(lr=0.25)
    assert made(0.25).spec().algorithm == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Adagrad", "adagrad"),
        ("SGD", "sgd"),
        ("RowWiseAdagrad", "rowwise_adagrad"),
        ("rowwise-adagrad", "rowwise_adagrad"),
        ("ROWWISE_ADAGRAD", "rowwise_adagrad"),
        ("Adam", "adam"),
        ("AdamW", "adamw"),
        ("RowWiseAdam", "rowwise_adam"),
    ],
)
def test_the_type_is_read_in_any_case(written: str, name: str) -> None:
    assert from_mapping({"type": written, "lr": 1}) == ALL[name](1)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (SGD, torch.optim.SGD),
        (Adagrad, torch.optim.Adagrad),
        (Adam, torch.optim.SparseAdam),
        (Adam, torch.optim.Adam),
        (AdamW, torch.optim.AdamW),
    ],
    ids=["sgd", "adagrad", "sparse_adam", "adam", "adamw"],
)
def test_defaults_are_torchs(ours: Any, torchs: Any) -> None:
    theirs = inspect.signature(torchs).parameters
    shared = [field for field in ours.model_fields if field in theirs and field != "lr"]
    assert len(shared) >= 2
    for field in shared:
        assert ours.model_fields[field].default == theirs[field].default, field


def test_specs_carry_every_hyper_parameter() -> None:
    assert SGD(0.5).spec() == OptimizerSpec(algorithm="sgd", lr=0.5)
    assert Adagrad(0.5, eps=1e-3, lr_decay=0.1, initial_accumulator_value=2).spec() == OptimizerSpec(
        algorithm="adagrad", lr=0.5, eps=1e-3, lr_decay=0.1, initial_accumulator_value=2.0
    )
    assert RowWiseAdagrad(0.5, eps=1e-3).spec() == OptimizerSpec(algorithm="rowwise_adagrad", lr=0.5, eps=1e-3)
    assert Adam(0.5, betas=(0.1, 0.2), eps=1e-3).spec() == OptimizerSpec(
        algorithm="adam", lr=0.5, eps=1e-3, beta1=0.1, beta2=0.2
    )
    assert AdamW(0.5, betas=(0.1, 0.2), eps=1e-3, weight_decay=0.3, dense=True).spec() == OptimizerSpec(
        algorithm="adamw", lr=0.5, eps=1e-3, beta1=0.1, beta2=0.2, weight_decay=0.3, dense=True
    )
    assert RowWiseAdam(0.5, betas=(0.1, 0.2), eps=1e-3).spec() == OptimizerSpec(
        algorithm="rowwise_adam", lr=0.5, eps=1e-3, beta1=0.1, beta2=0.2
    )


def test_specs_carry_every_option() -> None:
    assert SGD(0.5, momentum=0.9, dampening=0.1, weight_decay=0.2, max_norm=3).spec() == OptimizerSpec(
        algorithm="sgd", lr=0.5, momentum=0.9, dampening=0.1, weight_decay=0.2, max_norm=3.0
    )
    assert SGD(0.5, momentum=0.9, nesterov=True, decoupled_weight_decay=True).spec() == OptimizerSpec(
        algorithm="sgd", lr=0.5, momentum=0.9, nesterov=True, decoupled_weight_decay=True
    )
    decay = {"weight_decay": 0.2, "decoupled_weight_decay": True, "max_norm": 2.0}
    for optimizer in (Adagrad, RowWiseAdagrad, Adam, RowWiseAdam):
        spec = optimizer(0.5, **decay).spec()  # type: ignore[arg-type]
        assert {name: getattr(spec, name) for name in decay} == decay
    assert AdamW(0.5, max_norm=2).spec().max_norm == 2.0
    assert Adam(0.5, corrected_eps=True).spec().corrected_eps
    assert RowWiseAdam(0.5, corrected_eps=True).spec().corrected_eps


@pytest.mark.parametrize(
    "optimizer", [RowWiseAdagrad(0.1, rowwise="row"), RowWiseAdam(0.1, rowwise="row"), SGD(0.1, max_norm=1)]
)
def test_an_optimizer_of_whole_rows_gives_the_table_one_block(optimizer: Any) -> None:
    schema = resolve(TableConfig(name="a", num_slots=64, value_dim=1000, optimizer=optimizer))
    assert (schema.block_dim, schema.num_blocks, schema.layout) == (1000, 1, "rows")
    assert resolve(TableConfig(name="a", num_slots=64, value_dim=1000)).num_blocks > 1
    with pytest.raises(ConfigError, match=r"block_dim = 64 cuts slots in several blocks, and .* needs"):
        TableConfig(name="a", num_slots=64, value_dim=1000, optimizer=optimizer, block_dim=64)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SGD(float("inf")), "SGD.lr"),
        (lambda: Adagrad(0.1, eps=0), "Adagrad.eps"),
        (lambda: Adagrad(0.1, lr_decay=-1), "Adagrad.lr_decay"),
        (lambda: RowWiseAdagrad(0.1, eps=-1), "RowWiseAdagrad.eps"),
        (lambda: Adam(0.1, betas=(0.9, 1.0)), "Adam.betas[1]"),
        (lambda: Adam(0.1, betas=(-0.1, 0.9)), "Adam.betas[0]"),
        (lambda: AdamW(0.1, weight_decay=-1), "AdamW.weight_decay"),
        (lambda: AdamW(0.1, dense=1), "AdamW.dense"),  # type: ignore[arg-type]
        (lambda: RowWiseAdam(0.1, eps=0), "RowWiseAdam.eps"),
        (lambda: SGD(0.1, momentum=1.0), "SGD.momentum"),
        (lambda: SGD(0.1, max_norm=0), "SGD.max_norm"),
        (lambda: RowWiseAdam(0.1, rowwise="slot"), "RowWiseAdam.rowwise"),  # type: ignore[arg-type]
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(f"{field} = ")


def test_a_mistyped_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="epsilon"):
        Adagrad(0.1, epsilon=1e-8)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (SGD(0.1, nesterov=True), r"optimizer\.nesterov = True needs a momentum above 0 and no dampening"),
        (SGD(0.1, momentum=0.9, nesterov=True, dampening=0.1), r"optimizer\.nesterov = True needs a momentum above 0"),
        (SGD(0.1, dampening=0.1), r"optimizer\.dampening = 0\.1 dampens a momentum, which is 0"),
        (AdamW(0.1, dense=True, max_norm=1), r"optimizer\.max_norm = 1\.0 bounds slots when they have a gradient"),
    ],
)
def test_options_that_contradict_each_other_are_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TableConfig(name="a", num_slots=4, value_dim=2, optimizer=optimizer)


def test_whoever_gives_parameters_as_to_torchs_optimizers_is_told_what_these_are() -> None:
    with pytest.raises(TypeError, match=r"^Adam takes its arguments by name: lr, betas, .*PoolOptimizer\(model\)"):
        Adam([torch.zeros(1)], lr=0.1)  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"^SGD takes its arguments by name: lr, momentum"):
        SGD([torch.zeros(1)], 0.1)  # type: ignore[misc]
    assert SGD(0.1) == SGD(lr=0.1)
