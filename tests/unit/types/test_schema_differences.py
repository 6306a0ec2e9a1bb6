"""One comparison of schemas: down into what they hold, and nothing but what they are."""

import inspect
from dataclasses import replace

import pytest

from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec, TableSchema, TrainedKeySpec
from mempool.types.schema_differences import Difference, schema_differences

from .schemas import PLAIN

KEYED = replace(PLAIN, keys=ProductKeySpec(heads=2, key_dim=8))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (PLAIN, []),
        (replace(PLAIN, table_id=9), []),
        (replace(PLAIN, num_slots=64, stride=8, seed=3), [("num_slots", 100, 64), ("seed", 0, 3)]),
        (replace(PLAIN, optimizer=OptimizerSpec(algorithm="sgd", lr=0.1)), [("optimizer.algorithm", "adagrad", "sgd")]),
        (KEYED, [("keys", None, KEYED.keys)]),
    ],
)
def test_each_field_is_named_with_both_values(other: TableSchema, expected: list[tuple[str, object, object]]) -> None:
    found = [(each.path, each.first, each.second) for each in schema_differences(PLAIN, other)]
    assert found == expected


def test_keys_of_one_kind_are_compared_by_field_and_of_two_as_a_whole() -> None:
    wider = replace(KEYED, keys=ProductKeySpec(heads=2, key_dim=16))
    assert list(schema_differences(KEYED, wider)) == [Difference(path="keys.key_dim", first=8, second=16)]
    trained = replace(PLAIN, keys=TrainedKeySpec(key_dim=8, optimizer=PLAIN.optimizer))
    faster = replace(PLAIN, keys=TrainedKeySpec(key_dim=8, optimizer=replace(PLAIN.optimizer, lr=0.2)))
    assert [each.path for each in schema_differences(trained, faster)] == ["keys.optimizer.lr"]
    flat = replace(KEYED, keys=FlatKeySpec(key_dim=8))
    assert list(schema_differences(KEYED, flat)) == [Difference(path="keys", first=KEYED.keys, second=flat.keys)]


def test_what_is_set_aside_does_not_count() -> None:
    assert not list(schema_differences(PLAIN, replace(PLAIN, block_dim=20, seed=1), aside=("block_dim", "seed")))
    assert [each.path for each in schema_differences(PLAIN, replace(PLAIN, table_id=5), aside=())] == ["table_id"]


def test_nobody_else_compares_schemas() -> None:
    """The controller, the config and the client had one each, and each forgot another field."""
    from mempool.client.opening import creation
    from mempool.config import changes as config_changes
    from mempool.controller.saving import alike

    for module in (creation, config_changes, alike):
        assert "schema_differences(" in inspect.getsource(module)
        assert " fields(" not in inspect.getsource(module), module
