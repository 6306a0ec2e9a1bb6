"""Schemas, placements, views and status as messages: the codecs of ``PoolService``. All go through protobuf itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mempool.errors import InvalidRequest
from mempool.placement.changes import KnownView, ViewChange
from mempool.types.pool import (
    CheckpointProgress,
    DropTable,
    ForkTable,
    PinStatus,
    PoolStatus,
    RescaleProgress,
    RestoreTables,
    SavedTable,
    ShardFill,
    ShardInfo,
    ShardLoad,
    ShardStatus,
    StageTime,
    TableCreation,
    TableStatus,
    TableVersion,
    TableView,
    TakeCheckpoint,
)
from mempool.types.schema import (
    Algorithm,
    FlatKeySpec,
    KeySpec,
    Layout,
    OptimizerSpec,
    OwnKeySpec,
    Placement,
    ProductKeySpec,
    Rounding,
    StorageDtype,
    TableSchema,
    TrainedKeySpec,
    default_rounding,
)
from mempool.types.schema_checks import check_schema
from mempool.wire.bodies.tensors import array_from_message, tensor_to_message
from mempool.wire.codecs.codec import MAX_SMALL_BYTES, Only, ProtoCodec
from mempool.wire.codecs.mirror import Choice, Functions, Mirror, Several, checked_text, choice, require
from mempool.wire.v1 import pool_pb2, status_pb2, table_pb2, tensor_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class AskTable:
    """The arguments of ``PoolApi.table``. known: The view that the caller has; None where none."""

    name: str
    known: KnownView | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ToldTable:
    """A view, or in its place what is other in it than in the one that was known."""

    view: TableView | None = None
    change: ViewChange | None = None


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
        usage=value.usage,
    )
    if isinstance(value.keys, ProductKeySpec):
        product = table_pb2.ProductKeySpec(
            heads=value.keys.heads, key_dim=value.keys.key_dim, deterministic=value.keys.deterministic
        )
        message.product_keys.CopyFrom(product)
    elif isinstance(value.keys, TrainedKeySpec):
        trained = table_pb2.TrainedKeySpec(
            key_dim=value.keys.key_dim,
            heads=value.keys.heads,
            product=value.keys.product,
            ways=value.keys.ways,
            groups=value.keys.groups,
            probes=value.keys.probes,
            optimizer=optimizer_message(value.keys.optimizer),
        )
        message.trained_keys.CopyFrom(trained)
    elif isinstance(value.keys, OwnKeySpec):
        own_keys = value.keys
        message.own_keys.CopyFrom(
            table_pb2.OwnKeySpec(
                sections=own_keys.sections, rows=own_keys.rows, ways=own_keys.ways, groups=own_keys.groups
            )
        )
    elif value.keys is not None:
        flat = table_pb2.FlatKeySpec(key_dim=value.keys.key_dim, deterministic=value.keys.deterministic)
        message.flat_keys.CopyFrom(flat)
    return message


def schema_value(message: table_pb2.TableSchema) -> TableSchema:
    """Raises InvalidRequest for whatever ``mempool.config`` would refuse: foreign clients lack that."""
    require(message, "optimizer")
    keys: KeySpec | None = None
    if message.HasField("product_keys"):
        product = message.product_keys
        keys = ProductKeySpec(heads=product.heads, key_dim=product.key_dim, deterministic=_deterministic(product))
    elif message.HasField("flat_keys"):
        flat = message.flat_keys
        keys = FlatKeySpec(key_dim=flat.key_dim, deterministic=_deterministic(flat))
    elif message.HasField("trained_keys"):
        trained = message.trained_keys
        require(trained, "optimizer")
        keys = TrainedKeySpec(
            key_dim=trained.key_dim,
            optimizer=optimizer_value(trained.optimizer),
            product=trained.product,
            heads=trained.heads,
            ways=trained.ways or 2,
            groups=trained.groups,
            probes=trained.probes,
        )
    elif message.HasField("own_keys"):
        own = message.own_keys
        keys = OwnKeySpec(sections=own.sections, rows=own.rows, ways=own.ways or 2, groups=own.groups)
    dtype = choice(_STORAGE_DTYPE_NAMES, message.dtype, "TableSchema.dtype")
    rounding = default_rounding(dtype, master=message.master)
    if message.rounding != table_pb2.ROUNDING_UNSPECIFIED:
        rounding = choice(_ROUNDING_NAMES, message.rounding, "TableSchema.rounding")
    schema = TableSchema(
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
        usage=message.usage,
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


def _whole_view(message: table_pb2.TableView) -> TableView:
    view = _VIEW.from_message(message)
    schema, placement = view.schema, view.placement
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
    return view


def _change_message(value: ViewChange) -> table_pb2.ViewChange:
    message = _CHANGE.to_message(value)
    message.pages.CopyFrom(tensor_to_message(value.pages, "ViewChange.pages"))
    message.key_pages.CopyFrom(tensor_to_message(value.key_pages, "ViewChange.key_pages"))
    return message


def _change_value(message: table_pb2.ViewChange) -> ViewChange:
    require(message, "pages", "key_pages")
    change = _CHANGE.from_message(
        message,
        pages=array_from_message(message.pages, "ViewChange.pages", np.int32, 2).astype(np.int32, copy=False),
        key_pages=array_from_message(message.key_pages, "ViewChange.key_pages", np.int32, 2).astype(
            np.int32, copy=False
        ),
    )
    shapes = change.pages.shape[1], change.key_pages.shape[1]
    if shapes != (3, 2):
        raise InvalidRequest(f"ViewChange.pages and key_pages have {shapes} columns; expected (3, 2)")
    some = change.pages.size + change.key_pages.size
    if change.epoch < change.from_epoch or (change.epoch == change.from_epoch and some):
        raise InvalidRequest(
            f"ViewChange leads from epoch {change.from_epoch} to {change.epoch}: pages change with a higher one only"
        )
    return change


class _ToldTables(Mirror[ToldTable, pool_pb2.GetTableReply]):
    def __init__(self) -> None:
        parts = {"view": VIEW, "change": VIEW_CHANGE}
        super().__init__(pool_pb2.GetTableReply, ToldTable, parts, optional=("view", "change"))

    def from_message(self, message: pool_pb2.GetTableReply, **more: Any) -> ToldTable:
        if not message.HasField("change"):
            require(message, "view")
        return super().from_message(message, **more)


def _extra_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _extra_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"CheckpointRequest.extra is no UTF-8 ({error})") from None


SCHEMA = Functions(schema_message, schema_value)
SHARD_INFO = Mirror(table_pb2.ShardInfo, ShardInfo)
_VIEW = Mirror(
    table_pb2.TableView,
    TableView,
    {
        "schema": SCHEMA,
        "placement": Functions(placement_message, placement_value),
        "shards": Several(SHARD_INFO),
        "saved": Mirror(table_pb2.SavedTable, SavedTable),
    },
    optional=("saved",),
)
VIEW = Functions(_VIEW.to_message, _whole_view)
_CHANGE = Mirror(
    table_pb2.ViewChange,
    ViewChange,
    {"shards": Several(SHARD_INFO), "saved": Mirror(table_pb2.SavedTable, SavedTable)},
    optional=("saved",),
)
KNOWN_VIEW = Mirror(table_pb2.KnownView, KnownView)
VIEW_CHANGE = Functions(_change_message, _change_value)
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
        "tables": Several(
            Mirror(
                status_pb2.TableStatus,
                TableStatus,
                {"pins": Several(Mirror(status_pb2.PinStatus, PinStatus))},
            )
        ),
        "stages": Several(Mirror(status_pb2.StageTime, StageTime)),
    },
)
_CREATION = Mirror(
    status_pb2.TableCreation, TableCreation, {"shards": Several(Mirror(status_pb2.ShardFill, ShardFill))}
)
POOL_STATUS = Mirror(
    status_pb2.PoolStatus,
    PoolStatus,
    {"shards": Several(SHARD_STATUS), "tables": Several(VIEW), "creating": Several(_CREATION)},
)

CREATE_TABLE_REQUEST: ProtoCodec[TableSchema, pool_pb2.CreateTableRequest] = ProtoCodec(
    Only(pool_pb2.CreateTableRequest, "schema", SCHEMA), MAX_SMALL_BYTES
)
CREATE_TABLE_REPLY: ProtoCodec[TableView, pool_pb2.CreateTableReply] = ProtoCodec(
    Only(pool_pb2.CreateTableReply, "view", VIEW)
)
DROP_TABLE_REQUEST: ProtoCodec[DropTable, pool_pb2.DropTableRequest] = ProtoCodec(
    Mirror(pool_pb2.DropTableRequest, DropTable), MAX_SMALL_BYTES
)
DROP_TABLE_REPLY: ProtoCodec[None, pool_pb2.DropTableReply] = ProtoCodec(Only(pool_pb2.DropTableReply))
GET_TABLE_REQUEST: ProtoCodec[AskTable, pool_pb2.GetTableRequest] = ProtoCodec(
    Mirror(pool_pb2.GetTableRequest, AskTable, {"known": KNOWN_VIEW}, optional=("known",)),
    MAX_SMALL_BYTES,
)
GET_TABLE_REPLY: ProtoCodec[ToldTable, pool_pb2.GetTableReply] = ProtoCodec(_ToldTables())
LIST_TABLES_REQUEST: ProtoCodec[None, pool_pb2.ListTablesRequest] = ProtoCodec(
    Only(pool_pb2.ListTablesRequest), MAX_SMALL_BYTES
)
LIST_TABLES_REPLY: ProtoCodec[tuple[TableView, ...], pool_pb2.ListTablesReply] = ProtoCodec(
    Only(pool_pb2.ListTablesReply, "views", Several(VIEW))
)
RESCALE_REQUEST: ProtoCodec[int, pool_pb2.RescaleRequest] = ProtoCodec(
    Only(pool_pb2.RescaleRequest, "shards"), MAX_SMALL_BYTES
)
_RESCALED = Mirror(pool_pb2.RescaleReply, RescaleProgress, {"loads": Several(Mirror(pool_pb2.ShardLoad, ShardLoad))})
RESCALE_REPLY = ProtoCodec(_RESCALED)
REBALANCE_REQUEST: ProtoCodec[bool, pool_pb2.RebalanceRequest] = ProtoCodec(
    Only(pool_pb2.RebalanceRequest, "dry_run"), MAX_SMALL_BYTES
)
REBALANCE_REPLY: ProtoCodec[RescaleProgress, pool_pb2.RebalanceReply] = ProtoCodec(
    Only(pool_pb2.RebalanceReply, "progress", _RESCALED)
)
CHECKPOINT_REQUEST = ProtoCodec(
    Mirror(pool_pb2.CheckpointRequest, TakeCheckpoint, {"extra": Functions(_extra_bytes, _extra_text)})
)
CHECKPOINT_REPLY = ProtoCodec(
    Mirror(
        pool_pb2.CheckpointReply, CheckpointProgress, {"tables": Several(Mirror(pool_pb2.TableVersion, TableVersion))}
    )
)
RESTORE_REQUEST = ProtoCodec(Mirror(pool_pb2.RestoreRequest, RestoreTables, {"schema": SCHEMA}, optional=("schema",)))
RESTORE_REPLY: ProtoCodec[tuple[TableView, ...], pool_pb2.RestoreReply] = ProtoCodec(
    Only(pool_pb2.RestoreReply, "views", Several(VIEW))
)
FORK_TABLE_REQUEST = ProtoCodec(Mirror(pool_pb2.ForkTableRequest, ForkTable), MAX_SMALL_BYTES)
FORK_TABLE_REPLY: ProtoCodec[TableView, pool_pb2.ForkTableReply] = ProtoCodec(
    Only(pool_pb2.ForkTableReply, "view", VIEW)
)
GET_STATUS_REQUEST: ProtoCodec[None, pool_pb2.GetStatusRequest] = ProtoCodec(
    Only(pool_pb2.GetStatusRequest), MAX_SMALL_BYTES
)
GET_STATUS_REPLY: ProtoCodec[PoolStatus, pool_pb2.GetStatusReply] = ProtoCodec(
    Only(pool_pb2.GetStatusReply, "status", POOL_STATUS)
)
