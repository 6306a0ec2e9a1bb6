"""How wrong data is told: the path, the value, what to do; always as ConfigError."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mempool.config import SGD, Adagrad, ClusterConfig, ProductKeys, RowWiseAdagrad, TableConfig
from mempool.errors import ConfigError

SMALL = {"name": "a", "num_slots": 16, "value_dim": 4}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TableConfig(**SMALL | {"value_dim": -1}), "TableConfig.value_dim = -1 must be at least 1"),
        (lambda: TableConfig(**SMALL | {"num_slots": True}), "TableConfig.num_slots = True is not a whole number"),
        (lambda: TableConfig(**SMALL | {"num_slots": "16"}), "TableConfig.num_slots = '16' is not a whole number"),
        (lambda: TableConfig(**SMALL | {"num_slots": 16.0}), "TableConfig.num_slots = 16.0 is not a whole number"),
        (
            lambda: TableConfig(**SMALL, init_std=float("nan")),
            "TableConfig.init_std = nan must be finite",
        ),
        (lambda: TableConfig(name="a", num_slots=16), "TableConfig.value_dim is missing"),
        (
            lambda: TableConfig(**SMALL, valuedim=3),
            "TableConfig.valuedim = 3 is not a known field; did you mean value_dim?",
        ),
        (
            lambda: TableConfig(**SMALL, dtype="fp16"),
            "TableConfig.dtype = 'fp16' must be 'float32', 'bfloat16', 'float8_e4m3fn' or 'int8'",
        ),
        (
            lambda: TableConfig(**SMALL, optimizer={"type": "adagrd", "lr": 1}),
            "TableConfig.optimizer.type = 'adagrd' must be one of 'sgd', 'adagrad', 'rowwise_adagrad', 'adam', "
            "'adamw', 'rowwise_adam'",
        ),
        (
            lambda: TableConfig(**SMALL, optimizer={"lr": 1}),
            "TableConfig.optimizer.type is missing; give one of: sgd, adagrad, rowwise_adagrad, adam, adamw, "
            "rowwise_adam",
        ),
        (
            lambda: TableConfig(**SMALL, optimizer={"type": "adam", "lr": 1, "betas": [0.1, 1]}),
            "TableConfig.optimizer.betas[1] = 1 must be less than 1",
        ),
        (
            lambda: TableConfig(**SMALL, optimizer={"type": "sgd", "lr": 1, "eps": 1}),
            "TableConfig.optimizer.eps = 1 is not a known field; known here: dampening, decoupled_weight_decay, lr, "
            "max_norm, momentum, nesterov, type, weight_decay",
        ),
        (
            lambda: TableConfig(**SMALL, keys=3),
            "TableConfig.keys = 3 must be a mapping, as {type: product} with its fields beside it, or in Python one of "
            "ProductKeys(...), FlatKeys(...), HierarchicalKeys(...)",
        ),
        (
            lambda: TableConfig(**SMALL, optimizer="adam"),
            "TableConfig.optimizer = 'adam' must be a mapping, as {type: adam} with its fields beside it, or in Python "
            "one of SGD(...), Adagrad(...), RowWiseAdagrad(...), Adam(...), AdamW(...), RowWiseAdam(...)",
        ),
        (
            lambda: TableConfig(**SMALL, dtype=torch.bfloat16),
            "TableConfig.dtype = torch.bfloat16 must be a text: write 'bfloat16'",
        ),
        (
            lambda: TableConfig(**SMALL, dtype=torch.float16),
            "TableConfig.dtype = torch.float16 must be 'float32', 'bfloat16', 'float8_e4m3fn' or 'int8'",
        ),
        (lambda: Adagrad(lr=-1), "Adagrad.lr = -1 must be at least 0"),
        (lambda: SGD(True), "SGD.lr = True is not a number"),
        (lambda: ClusterConfig.model_validate({}), "ClusterConfig.pool is missing"),
        (
            lambda: ClusterConfig.model_validate([1]),
            "ClusterConfig = [1] must be a mapping, with fields of: pool, ray, shard, tables",
        ),
        (
            lambda: ClusterConfig.model_validate(
                {"pool": {"name": "p", "shards": 1}, "tables": [SMALL, {**SMALL, "x": 1}]}
            ),
            "ClusterConfig.tables[1].x = 1 is not a known field; known here: block_dim, dtype, init_std, keys, layout, "
            "master, name, num_slots, optimizer, page_slots, rounding, seed, usage, value_dim",
        ),
    ],
)
def test_a_wrong_value_is_told_by_path_value_and_remedy(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "pydantic's own error would be shown above ours"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TableConfig(name="9", num_slots=0, value_dim=4, seed=-1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems:"
    assert [line.split(" = ")[0] for line in lines[1:]] == [
        f"  TableConfig.{field}" for field in ("name", "num_slots", "seed")
    ]


def test_json_with_a_wrong_field_and_broken_json_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"TableConfig\.seed = -1 must be at least 0"):
        TableConfig.model_validate_json('{"name": "a", "num_slots": 4, "value_dim": 2, "seed": -1}')
    with pytest.raises(ConfigError, match="Invalid JSON"):
        TableConfig.model_validate_json("{")


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ConfigError) as caught:
        TableConfig(name="x" * 100_000, num_slots=4, value_dim=2)
    assert len(str(caught.value)) < 400


def test_numpy_integers_are_whole_numbers() -> None:
    table = TableConfig(name="a", num_slots=np.int64(16), value_dim=np.uint8(4))
    assert table == TableConfig(**SMALL)
    assert type(table.num_slots) is int


@pytest.mark.parametrize(
    "table",
    [
        TableConfig(**SMALL),
        TableConfig(**SMALL, optimizer=RowWiseAdagrad(0.5, eps=1e-3), keys=ProductKeys(heads=2, key_dim=6), seed=7),
    ],
)
def test_models_survive_json_dicts_and_pickle(table: TableConfig) -> None:
    assert TableConfig.model_validate_json(table.model_dump_json()) == table
    assert TableConfig.model_validate(table.model_dump()) == table
    assert pickle.loads(pickle.dumps(table)) == table


def test_models_cannot_be_changed() -> None:
    table = TableConfig(**SMALL)
    with pytest.raises(ValueError, match="frozen"):
        table.seed = 3
    assert table.seed == 0
