"""Ledgers, pages and the other values of ``PageHost`` as messages: the codecs of ``ShardService``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mempool.errors import InvalidRequest
from mempool.placement.changes import KnownView, ViewChange
from mempool.types.pages import (
    AttachTable,
    DecidedStep,
    ExportLedger,
    ExportPages,
    ForkPoint,
    Ledger,
    LedgerEntry,
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
    StepState,
    TableSource,
    WritePart,
)
from mempool.types.pool import ShardStatus, TableView
from mempool.wire.bodies.frames import decode_frame, frame_parts
from mempool.wire.bodies.tensors import FrameMemory
from mempool.wire.codecs.codec import (
    MAX_SMALL_BYTES,
    NUMBERS,
    FrameCodec,
    Only,
    ProtoCodec,
    TensorField,
    packed,
    parsed,
    tensor_of,
)
from mempool.wire.codecs.messages import STEP_ID
from mempool.wire.codecs.mirror import (
    MAX_MESSAGES,
    Choice,
    Converter,
    Functions,
    Mirror,
    Several,
    bounded,
    checked_text,
    require,
)
from mempool.wire.codecs.tables import KNOWN_VIEW, SHARD_INFO, SHARD_STATUS, VIEW, VIEW_CHANGE
from mempool.wire.v1 import shard_pb2 as pb

Mode = Literal["initialise", "empty", "lost", "confirm", "restore", "fork", "forked"]

_MODES: Mapping[Mode, pb.AttachMode.ValueType] = {
    "initialise": pb.ATTACH_MODE_INITIALISE,
    "empty": pb.ATTACH_MODE_EMPTY,
    "lost": pb.ATTACH_MODE_LOST,
    "confirm": pb.ATTACH_MODE_CONFIRM,
    "restore": pb.ATTACH_MODE_RESTORE,
    "fork": pb.ATTACH_MODE_FORK,
    "forked": pb.ATTACH_MODE_FORKED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetTable:
    """The arguments of ``PageHost.drop_table``."""

    table_id: int
    unmade: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeTable:
    """The arguments of ``PageHost.freeze``."""

    table_id: int
    timeout_s: float
    token: str
    lease_s: float
    renew: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ThawTable:
    """The arguments of ``PageHost.thaw``."""

    table_id: int
    token: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttachView:
    """An ``AttachTable``, of which the view may stay where it is.

    view: None where only ``known`` came. known: What travels in place of the view, where the shard was given it before.
    """

    view: TableView | None
    mode: Mode
    ledger: Ledger | None = None
    pending: bool = False
    source: TableSource | None = None
    fork: ForkPoint | None = None
    known: KnownView | None = None
    also: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SetView:
    """The arguments of ``PageHost.set_view``.

    view: None where only ``change`` came. change: What travels in place of the view, where there is one.
    """

    view: TableView | None
    token: str
    change: ViewChange | None = None


def ledger_message(value: Ledger) -> pb.Ledger:
    return pb.Ledger(
        version=value.version,
        updates_applied=value.updates_applied,
        entries=_ENTRIES.to_wire(value.entries),
        step_offset=value.step_offset,
    )


def ledger_value(message: pb.Ledger) -> Ledger:
    return Ledger(
        version=message.version,
        updates_applied=message.updates_applied,
        entries=_ENTRIES.from_wire(message.entries, "Ledger.entries"),
        step_offset=message.step_offset,
    )


def ledger_of(data: bytes) -> Ledger:
    """The ledger of a message's bytes. Raises InvalidRequest."""
    return ledger_value(parsed(pb.Ledger, data))


_DECIDED_STEP = Mirror(pb.DecidedStep, DecidedStep, {"step_id": STEP_ID})
_DECIDED_STEPS = Several(_DECIDED_STEP)


def _entry_message(entry: LedgerEntry, *, group: str = "", rank: int = 0) -> pb.LedgerEntry:
    return pb.LedgerEntry(
        group=group,
        rank=rank,
        step=entry.step,
        generation=entry.generation,
        version=entry.version,
        dropped=entry.dropped,
        others=_DECIDED_STEPS.to_wire(entry.others),
        older=None if entry.older is None else _entry_message(entry.older),
    )


def _entry_value(message: pb.LedgerEntry, *, older: LedgerEntry | None = None) -> LedgerEntry:
    return LedgerEntry(
        generation=message.generation,
        step=message.step,
        version=message.version,
        dropped=message.dropped,
        others=_DECIDED_STEPS.from_wire(message.others, "LedgerEntry.others"),
        older=older,
    )


class _Entries:
    """The converter of a ledger's entries: (group, rank) -> what was applied of it."""

    def to_wire(self, value: Mapping[tuple[str, int], LedgerEntry]) -> list[pb.LedgerEntry]:
        return [_entry_message(entry, group=group, rank=rank) for (group, rank), entry in value.items()]

    def from_wire(self, wire: Sequence[pb.LedgerEntry], where: str) -> dict[tuple[str, int], LedgerEntry]:
        bounded(len(wire), MAX_MESSAGES, where)
        entries: dict[tuple[str, int], LedgerEntry] = {}
        for entry in wire:
            checked_text(entry.group, "LedgerEntry", "group")
            if (entry.group, entry.rank) in entries:
                raise InvalidRequest(f"{where} has rank {entry.rank} of group {entry.group!r} twice")
            older = _entry_value(entry.older) if entry.HasField("older") else None
            entries[entry.group, entry.rank] = _entry_value(entry, older=older)
        return entries


_ENTRIES = _Entries()


class PageBatchCodec:
    """A ``PageBatch`` as ``ExportPagesReply``, its arrays as views of the frame."""

    name = "ExportPagesReply"
    _mirror = Mirror(pb.ExportPagesReply, PageBatch, left_out=("array_names",))

    def encode(self, value: PageBatch, *, narrow_ids: bool = False) -> bytes:  # noqa: ARG002
        return b"".join(self.parts(value))

    def parts(self, value: PageBatch, *, narrow_ids: bool = False) -> list[bytes | memoryview]:  # noqa: ARG002
        header = packed(self._header, value, self.name)
        return frame_parts(header, {"row_pages": value.row_pages, "arrays": list(value.arrays.values())})

    def tensor_bytes(self, value: PageBatch) -> int:
        return sum(array.nbytes for array in value.arrays.values())

    def decode(self, frame: bytes | memoryview) -> PageBatch:
        header = pb.ExportPagesReply()
        found = decode_frame(frame, header)
        names, arrays = tuple(header.array_names), found.pop("arrays", [])
        if len(names) != len(arrays) or len(set(names)) != len(names):
            raise InvalidRequest(f"{self.name} has {len(arrays)} arrays and the names {list(names)}; expected one each")
        if "row_pages" not in found:
            raise InvalidRequest(f"{self.name}.row_pages is missing")
        memory = FrameMemory(frame)
        return self._mirror.from_message(
            header,
            row_pages=tensor_of(found["row_pages"][0], NUMBERS, memory, f"{self.name}.row_pages"),
            arrays={
                checked_text(name, self.name, "array_names"): memory.tensor(part)
                for name, part in zip(names, arrays, strict=True)
            },
        )

    def _header(self, value: PageBatch) -> pb.ExportPagesReply:
        header = self._mirror.to_message(value)
        header.array_names.extend(value.arrays)
        return header


FORK_POINT = Mirror(pb.ForkPoint, ForkPoint)
_LEDGER = Functions(ledger_message, ledger_value)
_ATTACHED: dict[str, Converter] = {
    "view": VIEW,
    "mode": Choice(_MODES),
    "ledger": _LEDGER,
    "source": Mirror(pb.TableSource, TableSource),
    "fork": FORK_POINT,
}


class _AttachViews(Mirror[AttachView, pb.AttachTableRequest]):
    """A view, or in its place which one it is."""

    def __init__(self) -> None:
        parts = {**_ATTACHED, "known": KNOWN_VIEW}
        optional = ("view", "known", "ledger", "source", "fork")
        super().__init__(pb.AttachTableRequest, AttachView, parts, optional=optional)

    def to_message(self, value: AttachView) -> pb.AttachTableRequest:
        return super().to_message(value if value.known is None else replace(value, view=None))

    def from_message(self, message: pb.AttachTableRequest, **more: Any) -> AttachView:
        if not message.HasField("known"):
            require(message, "view")
        return super().from_message(message, **more)


class _SetViews(Mirror[SetView, pb.SetViewRequest]):
    """A view, or in its place what is other in it."""

    def __init__(self) -> None:
        parts = {"view": VIEW, "change": VIEW_CHANGE}
        super().__init__(pb.SetViewRequest, SetView, parts, optional=("view", "change"))

    def to_message(self, value: SetView) -> pb.SetViewRequest:
        return super().to_message(value if value.change is None else replace(value, view=None))

    def from_message(self, message: pb.SetViewRequest, **more: Any) -> SetView:
        if not message.HasField("change"):
            require(message, "view")
        return super().from_message(message, **more)


ATTACHED = ProtoCodec(
    Mirror(pb.AttachTableRequest, AttachTable, _ATTACHED, optional=("ledger", "source", "fork"), left_out=("known",))
)
"""What was attached, whole: for who keeps it."""
ATTACH_TABLE_REQUEST: ProtoCodec[AttachView, pb.AttachTableRequest] = ProtoCodec(_AttachViews())
ATTACH_TABLE_REPLY: ProtoCodec[None, pb.AttachTableReply] = ProtoCodec(Only(pb.AttachTableReply))
DROP_TABLE_REQUEST = ProtoCodec(Mirror(pb.ShardServiceDropTableRequest, ForgetTable), MAX_SMALL_BYTES)
DROP_TABLE_REPLY: ProtoCodec[None, pb.ShardServiceDropTableReply] = ProtoCodec(Only(pb.ShardServiceDropTableReply))
FREEZE_REQUEST = ProtoCodec(Mirror(pb.FreezeRequest, FreezeTable), MAX_SMALL_BYTES)
FREEZE_REPLY: ProtoCodec[int, pb.FreezeReply] = ProtoCodec(Only(pb.FreezeReply, "version"))
THAW_REQUEST = ProtoCodec(Mirror(pb.ThawRequest, ThawTable), MAX_SMALL_BYTES)
THAW_REPLY: ProtoCodec[None, pb.ThawReply] = ProtoCodec(Only(pb.ThawReply))
EXPORT_PAGES_REQUEST = FrameCodec(Mirror(pb.ExportPagesRequest, ExportPages), {"row_pages": NUMBERS})
EXPORT_PAGES_REPLY = PageBatchCodec()
EXPORT_LEDGER_REQUEST = ProtoCodec(Mirror(pb.ExportLedgerRequest, ExportLedger), MAX_SMALL_BYTES)
EXPORT_LEDGER_REPLY = ProtoCodec(Mirror(pb.ExportLedgerReply, LedgerPart, {"entries": _ENTRIES}))
PULL_PAGES_REQUEST = FrameCodec(Mirror(pb.PullPagesRequest, PullPages, {"source": SHARD_INFO}), {"row_pages": NUMBERS})
PULL_PAGES_REPLY = ProtoCodec(Mirror(pb.PullPagesReply, PullReport))
SET_VIEW_REQUEST = ProtoCodec(_SetViews())
SET_VIEW_REPLY: ProtoCodec[None, pb.SetViewReply] = ProtoCodec(Only(pb.SetViewReply))
_STEP_STATES: Choice[StepState] = Choice(
    {
        "": pb.STEP_STATE_UNSPECIFIED,
        "decided": pb.STEP_STATE_DECIDED,
        "pending": pb.STEP_STATE_PENDING,
        "dropped": pb.STEP_STATE_DROPPED,
    }
)
RESOLVE_REQUEST = ProtoCodec(
    Mirror(pb.ResolveRequest, ResolveRequest, {"step_id": STEP_ID}, optional=("step_id",)), MAX_SMALL_BYTES
)
RESOLVE_REPLY = ProtoCodec(Mirror(pb.ResolveReply, ResolveReply, {"state": _STEP_STATES, "steps": _DECIDED_STEPS}))
MARK_TABLE_REQUEST = ProtoCodec(Mirror(pb.MarkTableRequest, MarkTable), MAX_SMALL_BYTES)
MARK_TABLE_REPLY: ProtoCodec[None, pb.MarkTableReply] = ProtoCodec(Only(pb.MarkTableReply))
WRITE_PART_REQUEST = ProtoCodec(Mirror(pb.WritePartRequest, WritePart), MAX_SMALL_BYTES)
WRITE_PART_REPLY = ProtoCodec(Mirror(pb.WritePartReply, PartProgress))
RELEASE_MARK_REQUEST = ProtoCodec(Mirror(pb.ReleaseMarkRequest, ReleaseMark), MAX_SMALL_BYTES)
RELEASE_MARK_REPLY: ProtoCodec[None, pb.ReleaseMarkReply] = ProtoCodec(Only(pb.ReleaseMarkReply))
READ_HEAT_REQUEST: ProtoCodec[int, pb.ReadHeatRequest] = ProtoCodec(
    Only(pb.ReadHeatRequest, "table_id"), MAX_SMALL_BYTES
)
READ_HEAT_REPLY = FrameCodec(Mirror(pb.ReadHeatReply, PageHeat), {"heat": TensorField(array=True)})
STATUS_REQUEST: ProtoCodec[None, pb.StatusRequest] = ProtoCodec(Only(pb.StatusRequest), MAX_SMALL_BYTES)
STATUS_REPLY: ProtoCodec[ShardStatus, pb.StatusReply] = ProtoCodec(Only(pb.StatusReply, "status", SHARD_STATUS))
