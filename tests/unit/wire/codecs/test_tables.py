"""Schemas, placements and status that say something impossible are refused by name. Round trips: test_methods.py."""

import dataclasses

import numpy as np
import pytest

from mempool.errors import InvalidRequest
from mempool.types import (
    FlatKeySpec,
    OptimizerSpec,
    Placement,
    ProductKeySpec,
    ShardInfo,
    ShardStatus,
    StorageDtype,
    TableSchema,
    TableView,
)
from mempool.wire.codecs import pages, tables
from mempool.wire.codecs.pages import SetView
from mempool.wire.v1 import pool_pb2, shard_pb2, table_pb2

SCHEMA = TableSchema(
    table_id=1,
    name="facts",
    num_slots=100,
    value_dim=20,
    block_dim=10,
    page_slots=16,
    dtype="float32",
    seed=0,
    init_std=0.1,
    stride=10,
    layout="auto",
    optimizer=OptimizerSpec(algorithm="adagrad", lr=0.1),
)
VIEW = TableView(
    schema=SCHEMA,
    placement=Placement(table_id=1, epoch=1, owners=np.zeros((7, 2), np.int32), key_owners=np.zeros(0, np.int32)),
    shards=(ShardInfo(shard=0, address="127.0.0.1:1", incarnation=1),),
)


def create(change: dict[str, object]) -> bytes:
    schema = tables.schema_message(SCHEMA)
    for name, value in change.items():
        if value is None:
            schema.ClearField(name)  # type: ignore[arg-type]
        else:
            setattr(schema, name, value)
    return pool_pb2.CreateTableRequest(schema=schema).SerializeToString()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 0}, r"TableSchema\.num_slots = 0 must be at least 1"),
        ({"block_dim": 0}, r"TableSchema\.block_dim = 0 must be at least 1"),
        ({"page_slots": 0}, r"TableSchema\.page_slots = 0 must be at least 1"),
        ({"dtype": 5}, r"TableSchema\.dtype is 5; expected one of 1 \(float32\), 2 \(bfloat16\)"),
        ({"dtype": 8}, r"TableSchema\.dtype is 8; expected one of .*, 9 \(float8_e4m3fn\), 10 \(int8\)"),
        ({"rounding": 3}, r"TableSchema\.rounding is 3; expected one of 1 \(stochastic\), 2 \(nearest\)"),
        ({"layout": 0}, r"TableSchema\.layout is 0; expected one of 1 \(auto\)"),
        ({"layout": 77}, r"TableSchema\.layout is 77"),
        ({"optimizer": None}, r"TableSchema\.optimizer is missing"),
    ],
)
def test_a_wrong_schema_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tables.CREATE_TABLE_REQUEST.decode(create(change))


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSpec(algorithm="sgd", lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1, max_norm=2.0),
        OptimizerSpec(algorithm="sgd", lr=0.1, momentum=0.9, nesterov=True),
        OptimizerSpec(algorithm="adam", lr=0.1, corrected_eps=True, weight_decay=0.1, decoupled_weight_decay=True),
    ],
)
def test_options_of_an_optimizer_travel(optimizer: OptimizerSpec) -> None:
    assert tables.optimizer_value(tables.optimizer_message(optimizer)) == optimizer


def test_absent_hyper_parameters_have_their_defaults() -> None:
    message = table_pb2.OptimizerSpec(algorithm=table_pb2.ALGORITHM_ADAM, lr=0.5, beta1=0.0)
    assert tables.optimizer_value(message) == OptimizerSpec(algorithm="adam", lr=0.5, beta1=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta1": 1.0}, r"TableSchema\.optimizer\.beta1 = 1\.0 must be less than 1"),
        ({"beta2": -0.5}, r"TableSchema\.optimizer\.beta2 = -0\.5 must be at least 0"),
        ({"lr": float("nan")}, r"TableSchema\.optimizer\.lr = nan must be finite"),
        ({"weight_decay": float("inf")}, r"TableSchema\.optimizer\.weight_decay = inf must be at most"),
        ({"eps": 0.0}, r"TableSchema\.optimizer\.eps = 0\.0 must be at least 1e-37"),
        ({"lr_decay": 0.5}, r"TableSchema\.optimizer\.lr_decay = 0\.5 means nothing to adamw; .* of adagrad"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    given = {"algorithm": table_pb2.ALGORITHM_ADAMW, "lr": 0.5, "dense": True}
    schema = tables.schema_message(SCHEMA)
    schema.optimizer.CopyFrom(table_pb2.OptimizerSpec(**given | change))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=message):
        tables.schema_value(schema)


def test_a_master_is_for_narrow_values() -> None:
    wrong = dataclasses.replace(SCHEMA, dtype="float32", master=True)
    with pytest.raises(InvalidRequest, match="master = True has nothing to add: values of dtype float32 are their own"):
        tables.schema_value(tables.schema_message(wrong))


@pytest.mark.parametrize(
    ("dtype", "master"),
    [(dtype, False) for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int8")] + [("bfloat16", True)],
)
def test_rounding_that_is_not_told_is_stochastic_where_steps_would_be_lost(dtype: StorageDtype, master: bool) -> None:
    message = tables.schema_message(dataclasses.replace(SCHEMA, dtype=dtype, master=master))
    message.ClearField("rounding")
    schema = tables.schema_value(message)
    assert (schema.dtype, schema.master) == (dtype, master)
    assert schema.rounding == ("nearest" if dtype == "float32" or master else "stochastic")


def test_scoring_is_deterministic_unless_told() -> None:
    for keys in (ProductKeySpec(heads=2, key_dim=4), FlatKeySpec(key_dim=4)):
        for deterministic in (True, False):
            schema = dataclasses.replace(SCHEMA, keys=dataclasses.replace(keys, deterministic=deterministic))
            message = tables.schema_message(schema)
            assert tables.schema_value(message) == schema
            (message.product_keys if message.HasField("product_keys") else message.flat_keys).ClearField(
                "deterministic"
            )
            found = tables.schema_value(message).keys
            assert found is not None
            assert found.deterministic


def test_a_view_whose_placement_is_of_another_shape_is_refused() -> None:
    placement = dataclasses.replace(VIEW.placement, owners=np.zeros((7, 3), np.int32))
    frame = pages.SET_VIEW_REQUEST.encode(SetView(view=dataclasses.replace(VIEW, placement=placement), token=""))
    with pytest.raises(
        InvalidRequest, match=r"owners \(\(7, 3\), \(0,\)\); the schema of 'facts' has \(\(7, 2\), \(0,\)\)"
    ):
        pages.SET_VIEW_REQUEST.decode(frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table_id": 2}, r"placement is of table 2; the schema of 'facts' of 1"),
        ({"owners": np.full((7, 2), -1, np.int32)}, r"placement of 'facts' names shard -1"),
    ],
)
def test_a_view_whose_placement_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    frame = pages.SET_VIEW_REQUEST.encode(
        SetView(
            view=dataclasses.replace(VIEW, placement=dataclasses.replace(VIEW.placement, **change)),  # type: ignore[arg-type]
            token="",
        )
    )
    with pytest.raises(InvalidRequest, match=message):
        pages.SET_VIEW_REQUEST.decode(frame)


def test_an_unknown_state_is_not_sent() -> None:
    with pytest.raises(InvalidRequest, match="'asleep' is none of ready, starting, unreachable"):
        pages.STATUS_REPLY.encode(ShardStatus(info=VIEW.shards[0], state="asleep"))


def test_a_missing_view_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"SetViewRequest\.view is missing"):
        pages.SET_VIEW_REQUEST.decode(shard_pb2.SetViewRequest().SerializeToString())
