"""Optimizers: one meaning however they are written, torch's defaults, what travels to the shards."""

import inspect
from typing import Any

import pytest
import torch

from mempool.config import SGD, Adagrad, Adam, AdamW, RowWiseAdagrad, RowWiseAdam, TableConfig
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
    [(Adagrad, torch.optim.Adagrad), (Adam, torch.optim.SparseAdam), (AdamW, torch.optim.AdamW)],
    ids=["adagrad", "adam", "adamw"],
)
def test_defaults_are_torchs(ours: Any, torchs: Any) -> None:
    theirs = inspect.signature(torchs).parameters
    for field, info in ours.model_fields.items():
        if field not in ("type", "lr", "dense"):
            assert info.default == theirs[field].default, field


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
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(f"{field} = ")


def test_a_mistyped_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="epsilon"):
        Adagrad(0.1, epsilon=1e-8)
