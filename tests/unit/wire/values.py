"""Values of every message of every call, drawn at random: what ``test_methods`` sends and reads."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from google.protobuf.message import Message
from hypothesis import strategies as st
from torch import Tensor

from mempool import types
from mempool.placement.changes import KnownView, ViewChange
from mempool.types.usage import UsageReply, UsageRequest
from mempool.wire import methods
from mempool.wire.codecs.lines import OpenedLine, OpenLine
from mempool.wire.codecs.lookup import LookupReply, LookupRequest
from mempool.wire.codecs.pages import AttachView, ForgetTable, FreezeTable, SetView, ThawTable
from mempool.wire.codecs.tables import AskTable, ToldTable
from mempool.wire.methods import Method
from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2
from tests.unit.wire.meeting_values import MEETINGS
from tests.unit.wire.right_schemas import U64, schemas
from tests.unit.wire.statuses import SECONDS, SHARD_INFO, SHARD_STATUS, TEXT, U32, U64S, build

DOUBLE = st.floats(allow_nan=False)
U32S = st.lists(U32, max_size=5).map(tuple)
FLOAT32 = st.just(torch.float32)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])


@st.composite
def tensors(draw: st.DrawFn, dims: int, dtypes: st.SearchStrategy[torch.dtype] = FLOAT32) -> Tensor:
    dtype = draw(dtypes)
    shape = draw(st.lists(st.integers(0, 5), min_size=dims, max_size=dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if dtype.is_floating_point:
        tensor = torch.randn(shape, generator=generator).to(dtype)
    else:
        tensor = torch.randint(0, 2**31 - 1, shape, generator=generator).to(dtype)
    return tensor.transpose(0, 1) if dims > 1 and draw(st.booleans()) else tensor


GROUPS = {"groups": st.none() | tensors(2, st.just(torch.int64)), "group_scores": st.none() | tensors(2)}
INT64 = tensors(1, st.just(torch.int64))
IDS = tensors(1, st.sampled_from([torch.int64, torch.uint32]))
BAGS = tensors(2, st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
ROWS = tensors(
    2, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8])
)
PER_HEAD = tensors(3)
NUMPY_IDS = st.lists(st.integers(0, 2**40), max_size=5).map(lambda ids: np.array(ids, np.int64))


ENVELOPE = build(types.Envelope, table_id=U64, epoch=U64, incarnation=U64, table_version=U64)
STAMP = build(types.Stamp, shard=U32, incarnation=U64, epoch=U64, table_version=U64, writes=U64)
STEP_ID = build(types.StepId, group=TEXT, rank=U32, step=U64, generation=U64)
WRITE_ID = st.none() | build(types.WriteId, writer=U64, number=U64, open=U64S)
REPLY_DTYPE = st.sampled_from(["float32", "bfloat16"])
SUMS_DTYPE = st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"])
SCHEMA = schemas()
SAVED = st.none() | build(types.SavedTable, url=TEXT, checkpoint=TEXT, table=TEXT, version=U64, taken=U64)


@st.composite
def views(draw: st.DrawFn) -> types.TableView:
    schema = draw(SCHEMA)
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    placement = types.Placement(
        table_id=schema.table_id,
        epoch=draw(U64),
        owners=random.integers(0, 2**31, (schema.num_row_pages, schema.num_blocks), np.int32),
        key_owners=random.integers(0, 2**31, schema.num_key_pages, np.int32),
    )
    return types.TableView(
        schema=schema,
        placement=placement,
        shards=tuple(draw(st.lists(SHARD_INFO, max_size=3))),
        controller=draw(TEXT),
        saved=draw(SAVED),
    )


@st.composite
def view_changes(draw: st.DrawFn) -> ViewChange:
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    from_epoch = draw(st.integers(0, 2**63))
    return ViewChange(
        table_id=draw(U64),
        from_epoch=from_epoch,
        epoch=from_epoch + draw(st.integers(1, 2**62)),
        shards=tuple(draw(st.lists(SHARD_INFO, max_size=3))),
        gone=tuple(draw(st.lists(U32, max_size=3))),
        controller=draw(TEXT),
        saved=draw(SAVED),
        digest=draw(U64),
        pages=random.integers(0, 2**31, (draw(st.integers(0, 3)), 3), np.int32),
        key_pages=random.integers(0, 2**31, (draw(st.integers(0, 3)), 2), np.int32),
    )


VIEWS = st.lists(views(), max_size=2).map(tuple)
KNOWN = build(KnownView, table_id=U64, epoch=U64, digest=U64)
DECIDED = build(
    types.DecidedStep, table_id=U64, version=U64, step_id=STEP_ID, lr=DOUBLE, grad_scale=DOUBLE, sequences=U64S
)
DECIDED_STEPS = st.lists(DECIDED, max_size=3).map(tuple)
OF_A_GENERATION = {"generation": U64, "step": U64, "version": U64, "dropped": U64, "others": DECIDED_STEPS}
OLDER = st.none() | build(types.LedgerEntry, **OF_A_GENERATION)
ENTRY = build(types.LedgerEntry, older=OLDER, **OF_A_GENERATION)
HISTORY: Mapping[str, st.SearchStrategy[Any]] = {
    "version": U64,
    "updates_applied": U64,
    "entries": st.dictionaries(st.tuples(TEXT, U32), ENTRY, max_size=3),
    "step_offset": st.integers(-(2**63), 2**63 - 1),
}
LEDGER = build(types.Ledger, **HISTORY)
_COUNTS = ("pages_moved", "pages_total", "bytes_moved", "bytes_total")
LOADS = st.lists(build(types.ShardLoad, shard=U32, before=SECONDS, after=SECONDS), max_size=3).map(tuple)
RESCALED = build(
    types.RescaleProgress,
    shards_before=U32, shards_after=U32, table=TEXT, done=st.booleans(), loads=LOADS, **dict.fromkeys(_COUNTS, U64),
)  # fmt: skip
CREATION = build(
    types.TableCreation,
    table=TEXT,
    table_id=U64,
    waiting_for=TEXT,
    spent_s=SECONDS,
    shards=st.lists(build(types.ShardFill, shard=U32, bytes_done=U64, bytes_total=U64), max_size=2).map(tuple),
)
PAGES: Mapping[str, st.SearchStrategy[Any]] = {
    "table_id": U64,
    "row_pages": NUMPY_IDS,
    "blocks": U32S,
    "key_pages": U32S,
}
STAMPED = {"stamp": STAMP}
STEP = {"envelope": ENVELOPE, "step_id": STEP_ID}
TOKEN = {"token": TEXT}


def parts(cls: type, **fields: Any) -> dict[str, st.SearchStrategy[Any]]:
    return {"parts": st.lists(build(cls, **fields), max_size=3).map(tuple)}


# Method -> generated classes of request and reply, values of both.
Case = tuple[type[Message], st.SearchStrategy[Any], type[Message], st.SearchStrategy[Any]]
CASES: dict[Method[Any, Any], Case] = {
    **MEETINGS,
    methods.GATHER: (
        data_pb2.GatherRequest,
        build(
            types.GatherRequest,
            envelope=ENVELOPE,
            lookup_id=U64,
            ids=IDS,
            weights=st.none() | tensors(1, FLOATS),
            offsets=INT64,
            remember=st.booleans(),
            release=U64S,
            reply_dtype=SUMS_DTYPE,
            pin=TEXT,
        ),
        data_pb2.GatherReply,
        build(types.GatherReply, **STAMPED, blocks=U32S, values=BAGS),
    ),
    methods.UPDATE: (
        data_pb2.UpdateRequest,
        build(
            types.UpdateRequest,
            **STEP,
            sequence=U64,
            lookup_id=U64,
            blocks=U32S,
            grads=BAGS,
            hold=st.booleans(),
            want_weight_grad=st.booleans(),
            ids=st.none() | IDS,
            weights=st.none() | tensors(1, FLOATS),
            offsets=st.none() | INT64,
        ),
        data_pb2.UpdateReply,
        build(types.UpdateReply, **STAMPED, weight_grad=st.none() | tensors(1)),
    ),
    methods.PREPARE: (
        data_pb2.PrepareRequest,
        build(
            types.PrepareRequest,
            **parts(types.PreparePart, **STEP, sequences=U64S),
            want_norm=st.booleans(),
            decider_table=U64,
            decider_step=U64,
            wait=st.booleans(),
            norm_order=DOUBLE,
            attempt=U64,
        ),
        data_pb2.PrepareReply,
        build(
            types.PrepareReply,
            **parts(
                types.PreparedPart,
                **STAMPED,
                missing=U64S,
                squared_norm=DOUBLE,
                norm=DOUBLE,
                finite=st.booleans(),
                applied=st.booleans(),
                held_off=st.booleans(),
            ),
        ),
    ),
    methods.COMMIT: (
        data_pb2.CommitRequest,
        build(
            types.CommitRequest,
            **parts(types.CommitPart, **STEP, lr=DOUBLE, grad_scale=DOUBLE, sequences=U64S, version=U64),
            decided=st.booleans(),
            one_phase=st.booleans(),
        ),
        data_pb2.CommitReply,
        build(types.CommitReply, **parts(types.CommittedPart, **STAMPED, missing=U64S, version=U64)),
    ),
    methods.DISCARD: (
        data_pb2.DiscardRequest,
        build(types.DiscardRequest, **parts(types.DiscardPart, **STEP), keep_updates=st.booleans(), attempt=U64),
        data_pb2.DiscardReply,
        build(types.DiscardReply, discarded=U64),
    ),
    methods.HEARTBEAT: (
        data_pb2.HeartbeatRequest,
        build(types.HeartbeatRequest, incarnation=U64, group=TEXT, rank=U32),
        data_pb2.HeartbeatReply,
        build(types.HeartbeatReply, lease_s=SECONDS, updates_held=U64),
    ),
    methods.SCORE: (
        data_pb2.ScoreRequest,
        build(types.ScoreRequest, envelope=ENVELOPE, queries=PER_HEAD, topk=U32, pin=TEXT, **GROUPS),
        data_pb2.ScoreReply,
        build(types.ScoreReply, **STAMPED, heads=U32S, scores=PER_HEAD, ids=tensors(3, st.just(torch.int64))),
    ),
    methods.LOOKUP: (
        data_pb2.LookupRequest,
        build(LookupRequest, table=TEXT, queries=tensors(2) | PER_HEAD, topk=U32, reply_dtype=REPLY_DTYPE),
        data_pb2.LookupReply,
        build(
            LookupReply,
            **STAMPED,
            newest_table_version=U64,
            ids=tensors(3, st.just(torch.int64)),
            scores=PER_HEAD,
            weights=PER_HEAD,
            values=tensors(2, st.sampled_from([torch.float32, torch.bfloat16])),
        ),
    ),
    methods.STEP_COUNT: (
        data_pb2.StepCountRequest,
        build(types.StepCountRequest, envelope=ENVELOPE, set=st.none() | U64, at_version=U64, write_id=WRITE_ID),
        data_pb2.StepCountReply,
        build(types.StepCountReply, **STAMPED, count=U64),
    ),
    methods.USAGE: (
        data_pb2.UsageRequest,
        build(UsageRequest, envelope=ENVELOPE, older_than=U64),
        data_pb2.UsageReply,
        build(
            UsageReply,
            **STAMPED,
            outdated=U64,
            most=U64,
            log_sum=DOUBLE,
            histogram=tensors(2, st.just(torch.int64)).map(lambda counts: counts.numpy()),
        ),
    ),
    methods.PIN: (
        data_pb2.PinRequest,
        build(
            types.PinRequest,
            envelope=ENVELOPE,
            do=st.sampled_from(["arm", "settle", "attach", "renew", "release"]),
            pin=TEXT,
            version=U64,
            name=TEXT,
            lease_s=SECONDS,
            beside=st.none() | U64,
        ),
        data_pb2.PinReply,
        build(types.PinReply, **STAMPED, version=U64),
    ),
    methods.OPEN_LINE: (
        data_pb2.OpenLineRequest,
        build(OpenLine, version=U32, client=U64),
        data_pb2.OpenLineReply,
        build(OpenedLine, port=U32, ticket=st.binary(max_size=40), answer=st.binary(max_size=40), why=TEXT),
    ),
    methods.READ_ROWS: (
        data_pb2.ReadRowsRequest,
        build(types.ReadRowsRequest, envelope=ENVELOPE, array=TEXT, ids=IDS, pin=TEXT),
        data_pb2.ReadRowsReply,
        build(types.ReadRowsReply, **STAMPED, blocks=U32S, rows=ROWS),
    ),
    methods.WRITE_ROWS: (
        data_pb2.WriteRowsRequest,
        build(
            types.WriteRowsRequest,
            envelope=ENVELOPE,
            array=TEXT,
            ids=IDS,
            blocks=U32S,
            rows=ROWS,
            write_id=WRITE_ID,
            fresh=st.booleans(),
        ),
        data_pb2.WriteRowsReply,
        build(types.WriteRowsReply, **STAMPED),
    ),
    methods.ATTACH_TABLE: (
        shard_pb2.AttachTableRequest,
        build(
            AttachView,
            view=views(),
            mode=st.sampled_from(["initialise", "empty", "lost", "restore", "fork", "forked"]),
            ledger=st.none() | LEDGER,
            source=st.none() | build(types.TableSource, url=TEXT, checkpoint=TEXT, table=TEXT, keys=TEXT),
            fork=st.none() | build(types.ForkPoint, table_id=U64, token=TEXT, version=U64),
        )
        | build(
            AttachView, view=st.none(), mode=st.just("confirm"), known=KNOWN, also=st.lists(U64, max_size=3).map(tuple)
        ),
        shard_pb2.AttachTableReply,
        st.none(),
    ),
    methods.SHARD_DROP_TABLE: (
        shard_pb2.ShardServiceDropTableRequest,
        build(ForgetTable, table_id=U64, unmade=st.booleans()),
        shard_pb2.ShardServiceDropTableReply,
        st.none(),
    ),
    methods.FREEZE: (
        shard_pb2.FreezeRequest,
        build(FreezeTable, table_id=U64, timeout_s=SECONDS, lease_s=SECONDS, **TOKEN),
        shard_pb2.FreezeReply,
        U64,
    ),
    methods.THAW: (shard_pb2.ThawRequest, build(ThawTable, table_id=U64, **TOKEN), shard_pb2.ThawReply, st.none()),
    methods.RESOLVE: (
        shard_pb2.ResolveRequest,
        build(
            types.ResolveRequest,
            table_id=U64,
            after_version=st.none() | U64,
            step_id=st.none() | STEP_ID,
            give_up=st.booleans(),
        ),
        shard_pb2.ResolveReply,
        build(
            types.ResolveReply,
            version=U64,
            state=st.sampled_from(["", "decided", "pending", "dropped"]),
            steps=DECIDED_STEPS,
        ),
    ),
    methods.EXPORT_PAGES: (
        shard_pb2.ExportPagesRequest,
        build(types.ExportPages, **PAGES, **TOKEN),
        shard_pb2.ExportPagesReply,
        build(types.PageBatch, **PAGES, arrays=st.dictionaries(TEXT, ROWS, max_size=3), version=U64),
    ),
    methods.EXPORT_LEDGER: (
        shard_pb2.ExportLedgerRequest,
        build(types.ExportLedger, table_id=U64, first=U64),
        shard_pb2.ExportLedgerReply,
        build(types.LedgerPart, num_entries=U64, **HISTORY),
    ),
    methods.PULL_PAGES: (
        shard_pb2.PullPagesRequest,
        build(types.PullPages, **PAGES, **TOKEN, source=SHARD_INFO),
        shard_pb2.PullPagesReply,
        build(types.PullReport, pages=U64, num_bytes=U64),
    ),
    methods.SET_VIEW: (
        shard_pb2.SetViewRequest,
        build(SetView, view=views(), **TOKEN) | build(SetView, view=st.none(), change=view_changes(), **TOKEN),
        shard_pb2.SetViewReply,
        st.none(),
    ),
    methods.MARK_TABLE: (
        shard_pb2.MarkTableRequest,
        build(types.MarkTable, table_id=U64, version=U64, lease_s=SECONDS, since=TEXT, **TOKEN),
        shard_pb2.MarkTableReply,
        st.none(),
    ),
    methods.WRITE_PART: (
        shard_pb2.WritePartRequest,
        build(types.WritePart, table_id=U64, url=TEXT, checkpoint=TEXT, since_version=U64, wait_s=SECONDS, **TOKEN),
        shard_pb2.WritePartReply,
        build(types.PartProgress, bytes_done=U64, bytes_total=U64, updates_applied=U64, part=st.binary(max_size=12)),
    ),
    methods.RELEASE_MARK: (
        shard_pb2.ReleaseMarkRequest,
        build(types.ReleaseMark, table_id=U64, kept=TEXT, **TOKEN),
        shard_pb2.ReleaseMarkReply,
        st.none(),
    ),
    methods.READ_HEAT: (
        shard_pb2.ReadHeatRequest,
        U64,
        shard_pb2.ReadHeatReply,
        build(
            types.PageHeat,
            heat=st.lists(st.floats(0, 2**99, width=32)).map(lambda heat: np.array(heat, np.float32)),
            seen=SECONDS,
        ),
    ),
    methods.STATUS: (shard_pb2.StatusRequest, st.none(), shard_pb2.StatusReply, SHARD_STATUS),
    methods.CREATE_TABLE: (pool_pb2.CreateTableRequest, SCHEMA, pool_pb2.CreateTableReply, views()),
    methods.DROP_TABLE: (
        pool_pb2.DropTableRequest,
        build(types.DropTable, name=TEXT, table_id=U64),
        pool_pb2.DropTableReply,
        st.none(),
    ),
    methods.GET_TABLE: (
        pool_pb2.GetTableRequest,
        build(AskTable, name=TEXT, known=st.none() | KNOWN),
        pool_pb2.GetTableReply,
        build(ToldTable, view=views()) | build(ToldTable, change=view_changes()),
    ),
    methods.LIST_TABLES: (pool_pb2.ListTablesRequest, st.none(), pool_pb2.ListTablesReply, VIEWS),
    methods.RESCALE: (pool_pb2.RescaleRequest, U32, pool_pb2.RescaleReply, RESCALED),
    methods.REBALANCE: (pool_pb2.RebalanceRequest, st.booleans(), pool_pb2.RebalanceReply, RESCALED),
    methods.CHECKPOINT: (
        pool_pb2.CheckpointRequest,
        build(
            types.TakeCheckpoint,
            url=TEXT,
            tables=st.lists(TEXT, max_size=3).map(tuple),
            incremental=st.booleans(),
            keep=U32,
            extra=TEXT,
            aside=st.booleans(),
        ),
        pool_pb2.CheckpointReply,
        build(
            types.CheckpointProgress,
            url=TEXT,
            name=TEXT,
            bytes_done=U64,
            bytes_total=U64,
            tables=st.lists(build(types.TableVersion, table=TEXT, version=U64), max_size=3).map(tuple),
            held_s=SECONDS,
            doing=TEXT,
            done=st.booleans(),
        ),
    ),
    methods.RESTORE: (
        pool_pb2.RestoreRequest,
        build(
            types.RestoreTables,
            url=TEXT,
            checkpoint=TEXT,
            tables=st.lists(TEXT, max_size=3).map(tuple),
            name=TEXT,
            replace=st.booleans(),
            layout=TEXT,
            schema=st.none() | SCHEMA,
            values=TEXT,
            keys=TEXT,
        ),
        pool_pb2.RestoreReply,
        VIEWS,
    ),
    methods.FORK_TABLE: (
        pool_pb2.ForkTableRequest,
        build(types.ForkTable, table=TEXT, table_id=U64, name=TEXT, replace=st.booleans(), newest_id=U64),
        pool_pb2.ForkTableReply,
        views(),
    ),
    methods.GET_STATUS: (
        pool_pb2.GetStatusRequest,
        st.none(),
        pool_pb2.GetStatusReply,
        build(
            types.PoolStatus,
            name=TEXT,
            shards=st.lists(SHARD_STATUS, max_size=2).map(tuple),
            tables=VIEWS,
            rescaling=st.booleans(),
            wanted_shards=U32,
            waiting_for=TEXT,
            unfinished=TEXT,
            checkpoint=TEXT,
            creating=st.lists(CREATION, max_size=2).map(tuple),
        ),
    ),
}
