"""Schemas, placements, views and status as messages: the codecs of ``PoolService``. All go through protobuf itself."""

import math
from collections.abc import Mapping

import numpy as np

from mempool.errors import InvalidRequest
from mempool.types.pool import (
    PoolStatus,
    RescaleProgress,
    ShardInfo,
    ShardStatus,
    StageTime,
    TableStatus,
    TableView,
)
from mempool.types.schema import (
    Algorithm,
    FlatKeySpec,
    Layout,
    OptimizerSpec,
    Placement,
    ProductKeySpec,
    Rounding,
    StorageDtype,
    TableSchema,
    default_rounding,
)
from mempool.wire.bodies.tensors import array_from_message, tensor_to_message
from mempool.wire.codecs.codec import MAX_SMALL_BYTES, Only, ProtoCodec
from mempool.wire.codecs.mirror import Choice, Functions, Mirror, Several, checked_text, choice, require
from mempool.wire.v1 import pool_pb2, status_pb2, table_pb2, tensor_pb2

_LAYOUTS: Mapping[Layout, table_pb2.Layout.ValueType] = {
    "auto": table_pb2.LAYOUT_AUTO,
    "columns": table_pb2.LAYOUT_COLUMNS,
    "rows": table_pb2.LAYOUT_ROWS,
    "grid": table_pb2.LAYOUT_GRID,
}
_LAYOUT_NAMES: Mapping[int, Layout] = {number: name for name, number in _LAYOUTS.items()}
_ALGORITHMS: Mapping[Algorithm, table_pb2.Algorithm.ValueType] = {
    "sgd": table_pb2.ALGORITHM_SGD,
    "adagrad": table_pb2.ALGORITHM_ADAGRAD,
    "rowwise_adagrad": table_pb2.ALGORITHM_ROWWISE_ADAGRAD,
    "adam": table_pb2.ALGORITHM_ADAM,
    "adamw": table_pb2.ALGORITHM_ADAMW,
    "rowwise_adam": table_pb2.ALGORITHM_ROWWISE_ADAM,
}
_ALGORITHM_NAMES: Mapping[int, Algorithm] = {number: name for name, number in _ALGORITHMS.items()}
_STORAGE_DTYPES: Mapping[StorageDtype, tensor_pb2.Dtype.ValueType] = {
    "float32": tensor_pb2.DTYPE_FLOAT32,
    "bfloat16": tensor_pb2.DTYPE_BFLOAT16,
    "float8_e4m3fn": tensor_pb2.DTYPE_FLOAT8_E4M3FN,
    "int8": tensor_pb2.DTYPE_INT8,
}
_STORAGE_DTYPE_NAMES: Mapping[int, StorageDtype] = {number: name for name, number in _STORAGE_DTYPES.items()}
_ROUNDINGS: Mapping[Rounding, table_pb2.Rounding.ValueType] = {
    "stochastic": table_pb2.ROUNDING_STOCHASTIC,
    "nearest": table_pb2.ROUNDING_NEAREST,
}
_ROUNDING_NAMES: Mapping[int, Rounding] = {number: name for name, number in _ROUNDINGS.items()}


def optimizer_message(value: OptimizerSpec) -> table_pb2.OptimizerSpec:
    return table_pb2.OptimizerSpec(
        algorithm=_ALGORITHMS[value.algorithm],
        lr=value.lr,
        eps=value.eps,
        beta1=value.beta1,
        beta2=value.beta2,
        lr_decay=value.lr_decay,
        initial_accumulator_value=value.initial_accumulator_value,
        weight_decay=value.weight_decay,
        dense=value.dense,
    )


def optimizer_value(message: table_pb2.OptimizerSpec) -> OptimizerSpec:
    """Raises InvalidRequest where a number is out of ``mempool.config``'s range: foreign clients lack that."""
    given: dict[str, float] = {"lr": message.lr}
    for name in ("eps", "beta1", "beta2", "lr_decay", "initial_accumulator_value", "weight_decay"):
        if message.HasField(name):
            given[name] = getattr(message, name)
    for name, number in given.items():
        below = 1.0 if name.startswith("beta") else math.inf
        if not 0.0 <= number < below or (name == "eps" and number == 0.0):  # NaN neither
            least = "above 0" if name == "eps" else "at least 0"
            wanted = f"{least} and below 1" if below == 1.0 else f"finite and {least}"
            raise InvalidRequest(f"OptimizerSpec.{name} is {number}; it must be {wanted}")
    algorithm = choice(_ALGORITHM_NAMES, message.algorithm, "OptimizerSpec.algorithm")
    return OptimizerSpec(algorithm=algorithm, dense=message.dense, **given)


def schema_message(value: TableSchema) -> table_pb2.TableSchema:
    message = table_pb2.TableSchema(
        table_id=value.table_id,
        name=value.name,
        num_slots=value.num_slots,
        value_dim=value.value_dim,
        block_dim=value.block_dim,
        page_slots=value.page_slots,
        dtype=_STORAGE_DTYPES[value.dtype],
        seed=value.seed,
        init_std=value.init_std,
        stride=value.stride,
        layout=_LAYOUTS[value.layout],
        optimizer=optimizer_message(value.optimizer),
        rounding=_ROUNDINGS[value.rounding],
        master=value.master,
    )
    if isinstance(value.keys, ProductKeySpec):
        product = table_pb2.ProductKeySpec(
            heads=value.keys.heads, key_dim=value.keys.key_dim, deterministic=value.keys.deterministic
        )
        message.product_keys.CopyFrom(product)
    elif value.keys is not None:
        flat = table_pb2.FlatKeySpec(key_dim=value.keys.key_dim, deterministic=value.keys.deterministic)
        message.flat_keys.CopyFrom(flat)
    return message


def schema_value(message: table_pb2.TableSchema) -> TableSchema:
    require(message, "optimizer")
    # Whoever computes with a schema divides by these.
    for name in ("num_slots", "value_dim", "block_dim", "page_slots"):
        if not getattr(message, name):
            raise InvalidRequest(f"TableSchema.{name} is missing or 0; it must be at least 1")
    keys: ProductKeySpec | FlatKeySpec | None = None
    if message.HasField("product_keys"):
        product = message.product_keys
        keys = ProductKeySpec(heads=product.heads, key_dim=product.key_dim, deterministic=_deterministic(product))
    elif message.HasField("flat_keys"):
        flat = message.flat_keys
        keys = FlatKeySpec(key_dim=flat.key_dim, deterministic=_deterministic(flat))
    dtype = choice(_STORAGE_DTYPE_NAMES, message.dtype, "TableSchema.dtype")
    rounding = default_rounding(dtype, master=message.master)
    if message.rounding != table_pb2.ROUNDING_UNSPECIFIED:
        rounding = choice(_ROUNDING_NAMES, message.rounding, "TableSchema.rounding")
    if message.master and dtype == "float32":
        raise InvalidRequest("TableSchema.master is true with float32 values; they are their own master")
    return TableSchema(
        table_id=message.table_id,
        name=checked_text(message.name, "TableSchema", "name"),
        num_slots=message.num_slots,
        value_dim=message.value_dim,
        block_dim=message.block_dim,
        page_slots=message.page_slots,
        dtype=dtype,
        seed=message.seed,
        init_std=message.init_std,
        stride=message.stride,
        layout=choice(_LAYOUT_NAMES, message.layout, "TableSchema.layout"),
        optimizer=optimizer_value(message.optimizer),
        keys=keys,
        rounding=rounding,
        master=message.master,
    )


def _deterministic(keys: table_pb2.ProductKeySpec | table_pb2.FlatKeySpec) -> bool:
    return keys.deterministic if keys.HasField("deterministic") else True


def placement_message(value: Placement) -> table_pb2.Placement:
    return table_pb2.Placement(
        table_id=value.table_id,
        epoch=value.epoch,
        owners=tensor_to_message(value.owners, "Placement.owners"),
        key_owners=tensor_to_message(value.key_owners, "Placement.key_owners"),
    )


def placement_value(message: table_pb2.Placement) -> Placement:
    require(message, "owners", "key_owners")
    owners = array_from_message(message.owners, "Placement.owners", np.int32, 2)
    key_owners = array_from_message(message.key_owners, "Placement.key_owners", np.int32, 1)
    return Placement(
        table_id=message.table_id,
        epoch=message.epoch,
        owners=owners.astype(np.int32, copy=False),
        key_owners=key_owners.astype(np.int32, copy=False),
    )


def _whole_view(message: table_pb2.TableView) -> TableView:
    view = _VIEW.from_message(message)
    schema, placement = view.schema, view.placement
    expected = (schema.num_row_pages, schema.num_blocks), (schema.num_key_pages,)
    found = placement.owners.shape, placement.key_owners.shape
    if found != expected:
        raise InvalidRequest(f"TableView.placement has owners {found}; the schema of {schema.name!r} has {expected}")
    return view


SCHEMA = Functions(schema_message, schema_value)
SHARD_INFO = Mirror(table_pb2.ShardInfo, ShardInfo)
_VIEW = Mirror(
    table_pb2.TableView,
    TableView,
    {"schema": SCHEMA, "placement": Functions(placement_message, placement_value), "shards": Several(SHARD_INFO)},
)
VIEW = Functions(_VIEW.to_message, _whole_view)
_STATES = Choice(
    {
        "ready": status_pb2.SHARD_STATE_READY,
        "starting": status_pb2.SHARD_STATE_STARTING,
        "unreachable": status_pb2.SHARD_STATE_UNREACHABLE,
    }
)
SHARD_STATUS = Mirror(
    status_pb2.ShardStatus,
    ShardStatus,
    {
        "info": SHARD_INFO,
        "state": _STATES,
        "tables": Several(Mirror(status_pb2.TableStatus, TableStatus)),
        "stages": Several(Mirror(status_pb2.StageTime, StageTime)),
    },
)
POOL_STATUS = Mirror(status_pb2.PoolStatus, PoolStatus, {"shards": Several(SHARD_STATUS), "tables": Several(VIEW)})

CREATE_TABLE_REQUEST: ProtoCodec[TableSchema, pool_pb2.CreateTableRequest] = ProtoCodec(
    Only(pool_pb2.CreateTableRequest, "schema", SCHEMA), MAX_SMALL_BYTES
)
CREATE_TABLE_REPLY: ProtoCodec[TableView, pool_pb2.CreateTableReply] = ProtoCodec(
    Only(pool_pb2.CreateTableReply, "view", VIEW)
)
DROP_TABLE_REQUEST: ProtoCodec[str, pool_pb2.DropTableRequest] = ProtoCodec(
    Only(pool_pb2.DropTableRequest, "name"), MAX_SMALL_BYTES
)
DROP_TABLE_REPLY: ProtoCodec[None, pool_pb2.DropTableReply] = ProtoCodec(Only(pool_pb2.DropTableReply))
GET_TABLE_REQUEST: ProtoCodec[str, pool_pb2.GetTableRequest] = ProtoCodec(
    Only(pool_pb2.GetTableRequest, "name"), MAX_SMALL_BYTES
)
GET_TABLE_REPLY: ProtoCodec[TableView, pool_pb2.GetTableReply] = ProtoCodec(Only(pool_pb2.GetTableReply, "view", VIEW))
LIST_TABLES_REQUEST: ProtoCodec[None, pool_pb2.ListTablesRequest] = ProtoCodec(
    Only(pool_pb2.ListTablesRequest), MAX_SMALL_BYTES
)
LIST_TABLES_REPLY: ProtoCodec[tuple[TableView, ...], pool_pb2.ListTablesReply] = ProtoCodec(
    Only(pool_pb2.ListTablesReply, "views", Several(VIEW))
)
RESCALE_REQUEST: ProtoCodec[int, pool_pb2.RescaleRequest] = ProtoCodec(
    Only(pool_pb2.RescaleRequest, "shards"), MAX_SMALL_BYTES
)
RESCALE_REPLY = ProtoCodec(Mirror(pool_pb2.RescaleReply, RescaleProgress))
GET_STATUS_REQUEST: ProtoCodec[None, pool_pb2.GetStatusRequest] = ProtoCodec(
    Only(pool_pb2.GetStatusRequest), MAX_SMALL_BYTES
)
GET_STATUS_REPLY: ProtoCodec[PoolStatus, pool_pb2.GetStatusReply] = ProtoCodec(
    Only(pool_pb2.GetStatusReply, "status", POOL_STATUS)
)
