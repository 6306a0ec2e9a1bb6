"""Tables: what is refused, and the schema that ``resolve`` derives."""

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mempool.config import SGD, Adam, AdamW, FlatKeys, HierarchicalKeys, ProductKeys, TableConfig, resolve
from mempool.errors import ConfigError
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec, TableSchema, TrainedKeySpec


def test_resolve_takes_over_what_is_given() -> None:
    config = TableConfig(
        name="t.1-x_Y",
        num_slots=49,
        value_dim=100,
        dtype="bfloat16",
        seed=2**63 - 1,
        layout="grid",
        keys=ProductKeys(heads=3, key_dim=10, deterministic=False),
        optimizer=Adam(0.5),
        block_dim=7,
        page_slots=4,
        init_std=0.0,
    )
    assert resolve(config) == TableSchema(
        table_id=0,
        name="t.1-x_Y",
        num_slots=49,
        value_dim=100,
        block_dim=7,
        page_slots=4,
        dtype="bfloat16",
        seed=2**63 - 1,
        init_std=0.0,
        stride=7,
        layout="grid",
        optimizer=OptimizerSpec(algorithm="adam", lr=0.5, eps=1e-8),
        keys=ProductKeySpec(heads=3, key_dim=10, deterministic=False),
        rounding="stochastic",
    )


@pytest.mark.parametrize(
    ("value_dim", "block_dim"),
    [(1, 1), (63, 63), (64, 64), (65, 64), (256, 64), (512, 64), (513, 128), (1024, 128), (1025, 192), (4096, 512)],
)
def test_default_block_dim(value_dim: int, block_dim: int) -> None:
    assert resolve(TableConfig(name="a", num_slots=4, value_dim=value_dim)).block_dim == block_dim


@pytest.mark.parametrize(
    ("num_slots", "page_slots"),
    [(1, 16), (1024, 16), (1025, 32), (2048, 32), (65_536, 1024), (262_144, 4096), (262_145, 4096), (10**9, 4096)],
)
def test_default_page_slots(num_slots: int, page_slots: int) -> None:
    assert resolve(TableConfig(name="a", num_slots=num_slots, value_dim=8)).page_slots == page_slots


def test_default_pages_are_small_where_rows_are_wide_and_large_where_they_would_be_too_many() -> None:
    wide = resolve(TableConfig(name="a", num_slots=10**6, value_dim=2**14, optimizer=Adam(0.1)))
    assert wide.page_slots == 256  # of 192 KiB each: 4,096 would be a page of 768 MiB, which no message can carry
    many = resolve(TableConfig(name="a", num_slots=2**40, value_dim=1, optimizer=SGD(0.1)))
    assert (many.page_slots, many.num_row_pages) == (2**20, 2**20)


@settings(deadline=None)
@given(num_slots=st.integers(1, 2**32), value_dim=st.integers(1, 2**14))
def test_defaults_cover_the_table_in_few_pages(num_slots: int, value_dim: int) -> None:
    assume(num_slots * value_dim <= 2**40)  # 4 TiB of values
    schema = resolve(TableConfig(name="a", num_slots=num_slots, value_dim=value_dim))
    assert 1 <= schema.num_blocks <= 8
    assert schema.width(tuple(range(schema.num_blocks))) == value_dim
    assert schema.page_slots == 1 << schema.page_shift
    assert (schema.num_row_pages - 1) * schema.page_slots < num_slots <= schema.num_row_pages * schema.page_slots
    assert schema.init_std == pytest.approx(value_dim**-0.5)
    assert schema.stride**2 == num_slots or (schema.stride == 0 and math.isqrt(num_slots) ** 2 != num_slots)


def test_flat_keys_split_by_rows_unless_told_otherwise() -> None:
    table = {"name": "a", "num_slots": 10, "value_dim": 4, "keys": FlatKeys(key_dim=3)}
    assert resolve(TableConfig(**table)).layout == "rows"
    assert resolve(TableConfig(**table)).keys == FlatKeySpec(key_dim=3)
    assert resolve(TableConfig(**table, layout="columns")).layout == "columns"
    assert resolve(TableConfig(**table | {"keys": None})).layout == "auto"


@pytest.mark.parametrize(
    ("num_slots", "asked", "groups", "probes"),
    [
        (2**20, {}, 2889, 8),  # of 363 slots: about sqrt(8 * 2^20), and none without a slot
        (100, {"probes": 2}, 13, 2),
        (100, {"groups": 5}, 5, 5),
        (3, {}, 3, 3),
        (1, {}, 1, 1),
    ],
)
def test_groups_follow_from_slots(num_slots: int, asked: dict[str, int], groups: int, probes: int) -> None:
    keys = HierarchicalKeys(key_dim=3, optimizer=SGD(0.1), **asked)
    schema = resolve(TableConfig(name="a", num_slots=num_slots, value_dim=4, keys=keys))
    optimizer = OptimizerSpec(algorithm="sgd", lr=0.1)
    assert schema.keys == TrainedKeySpec(key_dim=3, optimizer=optimizer, groups=groups, probes=probes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 51}, r"keys\.groups = 51 of equally many of 100 slots leaves groups empty: give 50"),
        ({"groups": 4, "probes": 5}, r"keys\.probes = 5 is more than there are groups, 4"),
        ({"groups": 0}, r"keys\.groups = 0 must be at least 1"),
        ({"optimizer": None}, r"keys\.optimizer"),
        ({"heads": 2}, r"keys\.heads"),
    ],
)
def test_groups_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    keys = {"type": "hierarchical", "key_dim": 3, "optimizer": {"type": "sgd", "lr": 0.1}} | changes
    with pytest.raises(ConfigError, match=message):
        TableConfig(name="a", num_slots=100, value_dim=4, keys=keys)


@settings(deadline=None)
@given(num_slots=st.integers(1, 2**32))
def test_product_keys_want_a_square_and_name_the_nearest(num_slots: int) -> None:
    table = {"name": "a", "value_dim": 4, "keys": {"type": "product", "heads": 1, "key_dim": 2}}
    root = math.isqrt(num_slots)
    if root * root == num_slots:
        assert resolve(TableConfig(**table, num_slots=num_slots)).stride == root
        return
    with pytest.raises(ConfigError) as caught:
        TableConfig(**table, num_slots=num_slots)
    assert f"num_slots = {num_slots:_} is not a square; product keys need n * n." in str(caught.value)
    for near in (root, root + 1):
        assert f"{near * near:_} ({near}^2)" in str(caught.value)
        assert resolve(TableConfig(**table, num_slots=near * near)).stride == near


@settings(deadline=None)
@given(page_slots=st.integers(1, 2**20))
def test_page_slots_are_powers_of_two_and_errors_name_some(page_slots: int) -> None:
    try:
        assert TableConfig(name="a", num_slots=9, value_dim=1, page_slots=page_slots).page_slots == page_slots
        assert page_slots.bit_count() == 1
    except ConfigError as error:
        assert page_slots.bit_count() > 1
        near = [int(number) for number in str(error).rstrip(".").split("Nearest: ")[1].split(" or ")]
        assert all(n.bit_count() == 1 for n in near)
        assert near[0] < page_slots < near[1]


@pytest.mark.parametrize("name", ["", "9a", "a b", "a/b", "a\n", "é", "a" * 64, "-a"])
def test_names_that_would_hurt_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must begin with a letter"):
        TableConfig(name=name, num_slots=1, value_dim=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keys": {"type": "product", "heads": 2, "key_dim": 5}}, r"keys\.key_dim = 5 is odd.* Nearest: 4 or 6\."),
        (
            {"keys": {"type": "product", "heads": 2, "key_dim": 6, "ways": 3}},
            r"keys\.ways = 3 is of keys that are trained in the pool: give them an optimizer, or leave it out",
        ),
        (
            {"keys": {"type": "product", "heads": 2, "key_dim": 8, "ways": 3, "optimizer": {"type": "sgd", "lr": 1.0}}},
            r"keys\.key_dim = 8 is no multiple of 3; a query is cut into as many parts\. Nearest: 6 or 9\.",
        ),
        ({"keys": {"type": "flat", "key_dim": 0}}, r"keys\.key_dim = 0 must be at least 1"),
        ({"keys": {"type": "product", "heads": 0, "key_dim": 2}}, r"keys\.heads = 0 must be at least 1"),
        ({"seed": 2**63}, r"seed = 9_223_372_036_854_775_808 must be at most"),
        ({"block_dim": 0}, r"block_dim = 0 must be at least 1"),
        ({"num_slots": 2**62}, r"num_slots = .* must be at most 1_099_511_627_776"),
        ({"num_slots": 2**30, "page_slots": 1}, r"a table may have 1_048_576\. Give a larger page_slots"),
        ({"value_dim": 2**20, "block_dim": 1}, r"block_dim = 1 makes 1_048_576 column blocks.* Give at least 4_096"),
        ({"block_dim": 5}, r"block_dim = 5 is wider than a value; give at most value_dim, 4"),
        (
            {"page_slots": 2**20, "value_dim": 64},
            r"page_slots = .* makes pages of 512\.0 MiB.* at most 262_144\.",
        ),
        ({"init_std": 1e300}, r"init_std = 1e\+300 must be at most 1000000\.0"),
    ],
)
def test_impossible_tables_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TableConfig(**{"name": "a", "num_slots": 16, "value_dim": 4, **fields})


@pytest.mark.parametrize(
    ("fields", "rounding"),
    [
        ({}, "nearest"),
        ({"dtype": "bfloat16"}, "stochastic"),
        ({"dtype": "int8"}, "stochastic"),
        ({"dtype": "int8", "rounding": "nearest"}, "nearest"),
        ({"dtype": "float8_e4m3fn", "master": True}, "nearest"),
        ({"rounding": "nearest"}, "nearest"),
    ],
)
def test_values_in_few_bits_are_rounded_stochastically(fields: dict[str, Any], rounding: str) -> None:
    schema = resolve(TableConfig(name="a", num_slots=4, value_dim=8, **fields))
    assert (schema.rounding, schema.master) == (rounding, fields.get("master", False))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"master": True}, "TableConfig.master = True has nothing to add: values of dtype float32 are their own"),
        ({"rounding": "stochastic"}, "TableConfig.rounding = 'stochastic' has nothing to round with dtype float32"),
        (
            {"dtype": "int8", "master": True, "rounding": "stochastic"},
            "TableConfig.rounding = 'stochastic' has nothing to round with a master of float32",
        ),
        (
            {"dtype": "bfloat16", "optimizer": AdamW(0.1, dense=True)},
            "TableConfig.optimizer.dense = True needs float32 values, and dtype is 'bfloat16'",
        ),
        ({"dtype": "int8", "master": "yes"}, "TableConfig.master = 'yes' is not true or false"),
    ],
)
def test_rounding_and_masters_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TableConfig(name="a", num_slots=4, value_dim=8, **fields)
    assert str(caught.value).startswith(message)


def test_a_dense_optimizer_takes_float32_values_or_a_master() -> None:
    for fields in ({}, {"dtype": "int8", "master": True}):
        config = TableConfig(name="a", num_slots=4, value_dim=8, optimizer=AdamW(0.1, dense=True), **fields)
        assert resolve(config).optimizer.dense
