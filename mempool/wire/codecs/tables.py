"""Schemas, placements, views and status as messages: the codecs of ``PoolService``. All go through protobuf itself."""

from collections.abc import Mapping

import numpy as np

from mempool.errors import InvalidRequest
from mempool.types.pool import (
    PoolStatus,
    RescaleProgress,
    ShardFill,
    ShardInfo,
    ShardStatus,
    StageTime,
    TableCreation,
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
from mempool.types.schema_checks import check_schema
from mempool.wire.bodies.tensors import array_from_message, tensor_to_message
from mempool.wire.codecs.codec import ProtoCodec, choice, require
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
_STATES: Mapping[str, status_pb2.ShardState.ValueType] = {
    "ready": status_pb2.SHARD_STATE_READY,
    "starting": status_pb2.SHARD_STATE_STARTING,
    "unreachable": status_pb2.SHARD_STATE_UNREACHABLE,
}
_STATE_NAMES: Mapping[int, str] = {number: name for name, number in _STATES.items()}


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
        momentum=value.momentum,
        dampening=value.dampening,
        nesterov=value.nesterov,
        decoupled_weight_decay=value.decoupled_weight_decay,
        corrected_eps=value.corrected_eps,
        max_norm=value.max_norm,
    )


def optimizer_value(message: table_pb2.OptimizerSpec) -> OptimizerSpec:
    given: dict[str, float] = {"lr": message.lr}
    for name in (
        "eps",
        "beta1",
        "beta2",
        "lr_decay",
        "initial_accumulator_value",
        "weight_decay",
        "momentum",
        "dampening",
        "max_norm",
    ):
        if message.HasField(name):
            given[name] = getattr(message, name)
    algorithm = choice(_ALGORITHM_NAMES, message.algorithm, "OptimizerSpec.algorithm")
    return OptimizerSpec(
        algorithm=algorithm,
        dense=message.dense,
        nesterov=message.nesterov,
        decoupled_weight_decay=message.decoupled_weight_decay,
        corrected_eps=message.corrected_eps,
        **given,
    )


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
    """Raises InvalidRequest for whatever ``mempool.config`` would refuse: foreign clients lack that."""
    require(message, "optimizer")
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
    schema = TableSchema(
        table_id=message.table_id,
        name=message.name,
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
    check_schema(schema)
    return schema


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


def shard_info_message(value: ShardInfo) -> table_pb2.ShardInfo:
    return table_pb2.ShardInfo(shard=value.shard, address=value.address, incarnation=value.incarnation)


def shard_info_value(message: table_pb2.ShardInfo) -> ShardInfo:
    return ShardInfo(shard=message.shard, address=message.address, incarnation=message.incarnation)


def view_message(value: TableView) -> table_pb2.TableView:
    return table_pb2.TableView(
        schema=schema_message(value.schema),
        placement=placement_message(value.placement),
        shards=map(shard_info_message, value.shards),
    )


def view_value(message: table_pb2.TableView) -> TableView:
    require(message, "schema", "placement")
    schema, placement = schema_value(message.schema), placement_value(message.placement)
    expected = (schema.num_row_pages, schema.num_blocks), (schema.num_key_pages,)
    found = placement.owners.shape, placement.key_owners.shape
    if found != expected:
        raise InvalidRequest(f"TableView.placement has owners {found}; the schema of {schema.name!r} has {expected}")
    if placement.table_id != schema.table_id:
        raise InvalidRequest(
            f"TableView.placement is of table {placement.table_id}; the schema of {schema.name!r} of {schema.table_id}"
        )
    lowest = min(int(placement.owners.min()), int(placement.key_owners.min(initial=0)))
    if lowest < 0:
        raise InvalidRequest(f"TableView.placement of {schema.name!r} names shard {lowest}; shards count from 0")
    return TableView(schema=schema, placement=placement, shards=tuple(map(shard_info_value, message.shards)))


def table_status_message(value: TableStatus) -> status_pb2.TableStatus:
    return status_pb2.TableStatus(
        table_id=value.table_id,
        name=value.name,
        epoch=value.epoch,
        version=value.version,
        pages=value.pages,
        lost_pages=value.lost_pages,
        num_bytes=value.num_bytes,
        updates_held=value.updates_held,
        updates_applied=value.updates_applied,
        lookups=value.lookups,
        frozen=value.frozen,
        bytes_to_fill=value.bytes_to_fill,
    )


def table_status_value(message: status_pb2.TableStatus) -> TableStatus:
    return TableStatus(
        table_id=message.table_id,
        name=message.name,
        epoch=message.epoch,
        version=message.version,
        pages=message.pages,
        lost_pages=message.lost_pages,
        num_bytes=message.num_bytes,
        updates_held=message.updates_held,
        updates_applied=message.updates_applied,
        lookups=message.lookups,
        frozen=message.frozen,
        bytes_to_fill=message.bytes_to_fill,
    )


def stage_message(value: StageTime) -> status_pb2.StageTime:
    return status_pb2.StageTime(stage=value.stage, count=value.count, total_s=value.total_s)


def stage_value(message: status_pb2.StageTime) -> StageTime:
    return StageTime(stage=message.stage, count=message.count, total_s=message.total_s)


def shard_status_message(value: ShardStatus) -> status_pb2.ShardStatus:
    if value.state not in _STATES:
        raise InvalidRequest(f"ShardStatus.state is {value.state!r}; expected one of {', '.join(_STATES)}")
    return status_pb2.ShardStatus(
        info=shard_info_message(value.info),
        state=_STATES[value.state],
        device=value.device,
        num_bytes=value.num_bytes,
        context_bytes=value.context_bytes,
        held_bytes=value.held_bytes,
        queued_bytes=value.queued_bytes,
        queued_calls=value.queued_calls,
        kept_bytes=value.kept_bytes,
        client_limit_bytes=value.client_limit_bytes,
        page_limit_bytes=value.page_limit_bytes,
        uptime_s=value.uptime_s,
        tables=map(table_status_message, value.tables),
        stages=map(stage_message, value.stages),
    )


def shard_status_value(message: status_pb2.ShardStatus) -> ShardStatus:
    require(message, "info")
    return ShardStatus(
        info=shard_info_value(message.info),
        state=choice(_STATE_NAMES, message.state, "ShardStatus.state"),
        device=message.device,
        num_bytes=message.num_bytes,
        context_bytes=message.context_bytes,
        held_bytes=message.held_bytes,
        queued_bytes=message.queued_bytes,
        queued_calls=message.queued_calls,
        kept_bytes=message.kept_bytes,
        client_limit_bytes=message.client_limit_bytes,
        page_limit_bytes=message.page_limit_bytes,
        uptime_s=message.uptime_s,
        tables=tuple(map(table_status_value, message.tables)),
        stages=tuple(map(stage_value, message.stages)),
    )


def creation_message(value: TableCreation) -> status_pb2.TableCreation:
    fills = (
        status_pb2.ShardFill(shard=fill.shard, bytes_done=fill.bytes_done, bytes_total=fill.bytes_total)
        for fill in value.shards
    )
    return status_pb2.TableCreation(
        table=value.table,
        table_id=value.table_id,
        waiting_for=value.waiting_for,
        spent_s=value.spent_s,
        shards=fills,
    )


def creation_value(message: status_pb2.TableCreation) -> TableCreation:
    return TableCreation(
        table=message.table,
        table_id=message.table_id,
        waiting_for=message.waiting_for,
        spent_s=message.spent_s,
        shards=tuple(
            ShardFill(shard=fill.shard, bytes_done=fill.bytes_done, bytes_total=fill.bytes_total)
            for fill in message.shards
        ),
    )


def pool_status_message(value: PoolStatus) -> status_pb2.PoolStatus:
    return status_pb2.PoolStatus(
        name=value.name,
        shards=map(shard_status_message, value.shards),
        tables=map(view_message, value.tables),
        rescaling=value.rescaling,
        wanted_shards=value.wanted_shards,
        waiting_for=value.waiting_for,
        unfinished=value.unfinished,
        creating=map(creation_message, value.creating),
    )


def pool_status_value(message: status_pb2.PoolStatus) -> PoolStatus:
    return PoolStatus(
        name=message.name,
        shards=tuple(map(shard_status_value, message.shards)),
        tables=tuple(map(view_value, message.tables)),
        rescaling=message.rescaling,
        wanted_shards=message.wanted_shards,
        waiting_for=message.waiting_for,
        unfinished=message.unfinished,
        creating=tuple(map(creation_value, message.creating)),
    )


def required_schema(message: pool_pb2.CreateTableRequest) -> TableSchema:
    require(message, "schema")
    return schema_value(message.schema)


def required_view(message: pool_pb2.CreateTableReply | pool_pb2.GetTableReply) -> TableView:
    require(message, "view")
    return view_value(message.view)


def required_status(message: pool_pb2.GetStatusReply) -> PoolStatus:
    require(message, "status")
    return pool_status_value(message.status)


def _pack_progress(value: RescaleProgress) -> pool_pb2.RescaleReply:
    return pool_pb2.RescaleReply(
        shards_before=value.shards_before,
        shards_after=value.shards_after,
        pages_moved=value.pages_moved,
        pages_total=value.pages_total,
        bytes_moved=value.bytes_moved,
        bytes_total=value.bytes_total,
        table=value.table,
        done=value.done,
    )


def _unpack_progress(message: pool_pb2.RescaleReply) -> RescaleProgress:
    return RescaleProgress(
        shards_before=message.shards_before,
        shards_after=message.shards_after,
        pages_moved=message.pages_moved,
        pages_total=message.pages_total,
        bytes_moved=message.bytes_moved,
        bytes_total=message.bytes_total,
        table=message.table,
        done=message.done,
    )


def _nothing(_: object) -> None:
    return None


CREATE_TABLE_REQUEST = ProtoCodec(
    pool_pb2.CreateTableRequest,
    lambda schema: pool_pb2.CreateTableRequest(schema=schema_message(schema)),
    required_schema,
)
CREATE_TABLE_REPLY = ProtoCodec(
    pool_pb2.CreateTableReply, lambda view: pool_pb2.CreateTableReply(view=view_message(view)), required_view
)
DROP_TABLE_REQUEST = ProtoCodec(
    pool_pb2.DropTableRequest, lambda name: pool_pb2.DropTableRequest(name=name), lambda message: message.name
)
DROP_TABLE_REPLY = ProtoCodec(pool_pb2.DropTableReply, lambda _: pool_pb2.DropTableReply(), _nothing)
GET_TABLE_REQUEST = ProtoCodec(
    pool_pb2.GetTableRequest, lambda name: pool_pb2.GetTableRequest(name=name), lambda message: message.name
)
GET_TABLE_REPLY = ProtoCodec(
    pool_pb2.GetTableReply, lambda view: pool_pb2.GetTableReply(view=view_message(view)), required_view
)
LIST_TABLES_REQUEST = ProtoCodec(pool_pb2.ListTablesRequest, lambda _: pool_pb2.ListTablesRequest(), _nothing)
LIST_TABLES_REPLY = ProtoCodec(
    pool_pb2.ListTablesReply,
    lambda views: pool_pb2.ListTablesReply(views=map(view_message, views)),
    lambda message: tuple(map(view_value, message.views)),
)
RESCALE_REQUEST = ProtoCodec(
    pool_pb2.RescaleRequest, lambda shards: pool_pb2.RescaleRequest(shards=shards), lambda message: message.shards
)
RESCALE_REPLY = ProtoCodec(pool_pb2.RescaleReply, _pack_progress, _unpack_progress)
GET_STATUS_REQUEST = ProtoCodec(pool_pb2.GetStatusRequest, lambda _: pool_pb2.GetStatusRequest(), _nothing)
GET_STATUS_REPLY = ProtoCodec(
    pool_pb2.GetStatusReply,
    lambda status: pool_pb2.GetStatusReply(status=pool_status_message(status)),
    required_status,
)
