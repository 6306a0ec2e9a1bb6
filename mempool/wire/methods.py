"""Every call of the three services: its path, and the codecs of its request and reply. Client and server share this.

Requests and replies are the values of ``mempool.types``; where a call of ``PageHost`` or ``PoolApi`` takes or gives one
plain value (a name, a table id, a view, nothing), so does its codec.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mempool.errors import Internal, InvalidRequest
from mempool.types import messages as types
from mempool.types.groups.meeting import MeetReply, MeetRequest
from mempool.types.pages import (
    ExportLedger,
    ExportPages,
    LedgerPart,
    MarkTable,
    PageBatch,
    PageHeat,
    PartProgress,
    PullPages,
    PullReport,
    ReleaseMark,
    ResolveReply,
    ResolveRequest,
    WritePart,
)
from mempool.types.pool import (
    CheckpointProgress,
    DropTable,
    ForkTable,
    PoolStatus,
    RescaleProgress,
    RestoreTables,
    ShardStatus,
    TableView,
    TakeCheckpoint,
)
from mempool.types.reading.pins import PinReply, PinRequest
from mempool.types.schema import TableSchema
from mempool.types.usage import UsageReply, UsageRequest
from mempool.wire.codecs import lines, lookup, meeting, messages, pages, tables
from mempool.wire.codecs.codec import Codec
from mempool.wire.codecs.pages import ForgetTable, FreezeTable, SetView, ThawTable

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

PACKAGE = "mempool.wire.v1"
MEMORY_SERVICE = f"{PACKAGE}.MemoryService"
SHARD_SERVICE = f"{PACKAGE}.ShardService"
POOL_SERVICE = f"{PACKAGE}.PoolService"
CONTROLLER_KEY = "mempool-controller-key"
"""Metadata that the calls of the controller, and of shards that pull from each other, carry."""


@dataclass(frozen=True, slots=True, eq=False)
class Method(Generic[RequestT, ReplyT]):
    """One call. ``streams``: the reply is a stream of messages."""

    service: str
    name: str
    request: Codec[RequestT]
    reply: Codec[ReplyT]
    streams: bool = False

    path: str = field(init=False)
    """What gRPC calls it: "/mempool.wire.v1.MemoryService/Gather"."""
    controls: bool = field(init=False)
    """Whether it is the controller's, and its shards' among each other: it needs the controller's key."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", f"/{self.service}/{self.name}")
        object.__setattr__(self, "controls", self.service == SHARD_SERVICE and self.name != "Status")

    def decode_reply(self, frame: bytes | memoryview) -> ReplyT:
        """The value of a reply. Raises Internal for a malformed one: the caller of a method did nothing wrong."""
        try:
            return self.reply.decode(frame)
        except InvalidRequest as error:
            raise Internal(
                f"the answer to {self.name} cannot be read: {error}. Do both sides run the same version?"
            ) from None


GATHER: Method[types.GatherRequest, types.GatherReply] = Method(
    MEMORY_SERVICE, "Gather", messages.GATHER_REQUEST, messages.GATHER_REPLY
)
UPDATE: Method[types.UpdateRequest, types.UpdateReply] = Method(
    MEMORY_SERVICE, "Update", messages.UPDATE_REQUEST, messages.UPDATE_REPLY
)
PREPARE: Method[types.PrepareRequest, types.PrepareReply] = Method(
    MEMORY_SERVICE, "Prepare", messages.PREPARE_REQUEST, messages.PREPARE_REPLY
)
COMMIT: Method[types.CommitRequest, types.CommitReply] = Method(
    MEMORY_SERVICE, "Commit", messages.COMMIT_REQUEST, messages.COMMIT_REPLY
)
DISCARD: Method[types.DiscardRequest, types.DiscardReply] = Method(
    MEMORY_SERVICE, "Discard", messages.DISCARD_REQUEST, messages.DISCARD_REPLY
)
HEARTBEAT: Method[types.HeartbeatRequest, types.HeartbeatReply] = Method(
    MEMORY_SERVICE, "Heartbeat", messages.HEARTBEAT_REQUEST, messages.HEARTBEAT_REPLY
)
SCORE: Method[types.ScoreRequest, types.ScoreReply] = Method(
    MEMORY_SERVICE, "Score", messages.SCORE_REQUEST, messages.SCORE_REPLY
)
LOOKUP: Method[lookup.LookupRequest, lookup.LookupReply] = Method(
    MEMORY_SERVICE, "Lookup", lookup.LOOKUP_REQUEST, lookup.LOOKUP_REPLY
)
READ_ROWS: Method[types.ReadRowsRequest, types.ReadRowsReply] = Method(
    MEMORY_SERVICE, "ReadRows", messages.READ_ROWS_REQUEST, messages.READ_ROWS_REPLY
)
WRITE_ROWS: Method[types.WriteRowsRequest, types.WriteRowsReply] = Method(
    MEMORY_SERVICE, "WriteRows", messages.WRITE_ROWS_REQUEST, messages.WRITE_ROWS_REPLY
)
STEP_COUNT: Method[types.StepCountRequest, types.StepCountReply] = Method(
    MEMORY_SERVICE, "StepCount", messages.STEP_COUNT_REQUEST, messages.STEP_COUNT_REPLY
)
USAGE: Method[UsageRequest, UsageReply] = Method(MEMORY_SERVICE, "Usage", messages.USAGE_REQUEST, messages.USAGE_REPLY)
MEET: Method[MeetRequest, MeetReply] = Method(MEMORY_SERVICE, "Meet", meeting.MEET_REQUEST, meeting.MEET_REPLY)
PIN: Method[PinRequest, PinReply] = Method(MEMORY_SERVICE, "Pin", messages.PIN_REQUEST, messages.PIN_REPLY)
OPEN_LINE: Method[lines.OpenLine, lines.OpenedLine] = Method(
    MEMORY_SERVICE, "OpenLine", lines.OPEN_LINE_REQUEST, lines.OPEN_LINE_REPLY
)

ATTACH_TABLE: Method[pages.AttachView, None] = Method(
    SHARD_SERVICE, "AttachTable", pages.ATTACH_TABLE_REQUEST, pages.ATTACH_TABLE_REPLY
)
SHARD_DROP_TABLE: Method[ForgetTable, None] = Method(
    SHARD_SERVICE, "DropTable", pages.DROP_TABLE_REQUEST, pages.DROP_TABLE_REPLY
)
FREEZE: Method[FreezeTable, int] = Method(SHARD_SERVICE, "Freeze", pages.FREEZE_REQUEST, pages.FREEZE_REPLY)
THAW: Method[ThawTable, None] = Method(SHARD_SERVICE, "Thaw", pages.THAW_REQUEST, pages.THAW_REPLY)
RESOLVE: Method[ResolveRequest, ResolveReply] = Method(
    SHARD_SERVICE, "Resolve", pages.RESOLVE_REQUEST, pages.RESOLVE_REPLY
)
EXPORT_PAGES: Method[ExportPages, PageBatch] = Method(
    SHARD_SERVICE, "ExportPages", pages.EXPORT_PAGES_REQUEST, pages.EXPORT_PAGES_REPLY
)
EXPORT_LEDGER: Method[ExportLedger, LedgerPart] = Method(
    SHARD_SERVICE, "ExportLedger", pages.EXPORT_LEDGER_REQUEST, pages.EXPORT_LEDGER_REPLY
)
PULL_PAGES: Method[PullPages, PullReport] = Method(
    SHARD_SERVICE, "PullPages", pages.PULL_PAGES_REQUEST, pages.PULL_PAGES_REPLY
)
SET_VIEW: Method[SetView, None] = Method(SHARD_SERVICE, "SetView", pages.SET_VIEW_REQUEST, pages.SET_VIEW_REPLY)
MARK_TABLE: Method[MarkTable, None] = Method(
    SHARD_SERVICE, "MarkTable", pages.MARK_TABLE_REQUEST, pages.MARK_TABLE_REPLY
)
WRITE_PART: Method[WritePart, PartProgress] = Method(
    SHARD_SERVICE, "WritePart", pages.WRITE_PART_REQUEST, pages.WRITE_PART_REPLY
)
RELEASE_MARK: Method[ReleaseMark, None] = Method(
    SHARD_SERVICE, "ReleaseMark", pages.RELEASE_MARK_REQUEST, pages.RELEASE_MARK_REPLY
)
READ_HEAT: Method[int, PageHeat] = Method(SHARD_SERVICE, "ReadHeat", pages.READ_HEAT_REQUEST, pages.READ_HEAT_REPLY)
STATUS: Method[None, ShardStatus] = Method(SHARD_SERVICE, "Status", pages.STATUS_REQUEST, pages.STATUS_REPLY)

CREATE_TABLE: Method[TableSchema, TableView] = Method(
    POOL_SERVICE, "CreateTable", tables.CREATE_TABLE_REQUEST, tables.CREATE_TABLE_REPLY
)
DROP_TABLE: Method[DropTable, None] = Method(
    POOL_SERVICE, "DropTable", tables.DROP_TABLE_REQUEST, tables.DROP_TABLE_REPLY
)
GET_TABLE: Method[tables.AskTable, tables.ToldTable] = Method(
    POOL_SERVICE, "GetTable", tables.GET_TABLE_REQUEST, tables.GET_TABLE_REPLY
)
LIST_TABLES: Method[None, tuple[TableView, ...]] = Method(
    POOL_SERVICE, "ListTables", tables.LIST_TABLES_REQUEST, tables.LIST_TABLES_REPLY
)
RESCALE: Method[int, RescaleProgress] = Method(
    POOL_SERVICE, "Rescale", tables.RESCALE_REQUEST, tables.RESCALE_REPLY, streams=True
)
REBALANCE: Method[bool, RescaleProgress] = Method(
    POOL_SERVICE, "Rebalance", tables.REBALANCE_REQUEST, tables.REBALANCE_REPLY, streams=True
)
CHECKPOINT: Method[TakeCheckpoint, CheckpointProgress] = Method(
    POOL_SERVICE, "Checkpoint", tables.CHECKPOINT_REQUEST, tables.CHECKPOINT_REPLY, streams=True
)
RESTORE: Method[RestoreTables, tuple[TableView, ...]] = Method(
    POOL_SERVICE, "Restore", tables.RESTORE_REQUEST, tables.RESTORE_REPLY
)
FORK_TABLE: Method[ForkTable, TableView] = Method(
    POOL_SERVICE, "ForkTable", tables.FORK_TABLE_REQUEST, tables.FORK_TABLE_REPLY
)
GET_STATUS: Method[None, PoolStatus] = Method(
    POOL_SERVICE, "GetStatus", tables.GET_STATUS_REQUEST, tables.GET_STATUS_REPLY
)
