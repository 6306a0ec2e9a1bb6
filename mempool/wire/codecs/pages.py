"""Ledgers, pages and the other values of ``PageHost`` as messages: the codecs of ``ShardService``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.types.pages import (
    AttachTable,
    ExportLedger,
    ExportPages,
    Ledger,
    LedgerPart,
    PageBatch,
    PullPages,
    PullReport,
)
from mempool.types.pool import ShardStatus, TableView
from mempool.wire.bodies.frames import decode_frame, encode_frame
from mempool.wire.codecs.codec import INT64, FrameCodec, ProtoCodec, choice, packed, require
from mempool.wire.codecs.tables import (
    shard_info_message,
    shard_info_value,
    shard_status_message,
    shard_status_value,
    view_message,
    view_value,
)
from mempool.wire.v1 import shard_pb2 as pb

Mode = Literal["initialise", "empty", "lost"]

_MODES: Mapping[Mode, pb.AttachMode.ValueType] = {
    "initialise": pb.ATTACH_MODE_INITIALISE,
    "empty": pb.ATTACH_MODE_EMPTY,
    "lost": pb.ATTACH_MODE_LOST,
}
_MODE_NAMES: Mapping[int, Mode] = {number: name for name, number in _MODES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeTable:
    """The arguments of ``PageHost.freeze``."""

    table_id: int
    timeout_s: float


def ledger_message(value: Ledger) -> pb.Ledger:
    return pb.Ledger(
        version=value.version,
        updates_applied=value.updates_applied,
        entries=_entry_messages(value.entries),
        step_offset=value.step_offset,
    )


def ledger_value(message: pb.Ledger) -> Ledger:
    return Ledger(
        version=message.version,
        updates_applied=message.updates_applied,
        entries=_entry_values(message.entries, "Ledger"),
        step_offset=message.step_offset,
    )


def _entry_messages(entries: Mapping[tuple[str, int], int]) -> list[pb.LedgerEntry]:
    return [pb.LedgerEntry(group=group, rank=rank, step=step) for (group, rank), step in entries.items()]


def _entry_values(messages: Iterable[pb.LedgerEntry], where: str) -> dict[tuple[str, int], int]:
    entries: dict[tuple[str, int], int] = {}
    for entry in messages:
        if (entry.group, entry.rank) in entries:
            raise InvalidRequest(f"{where}.entries has rank {entry.rank} of group {entry.group[:64]!r} twice")
        entries[entry.group, entry.rank] = entry.step
    return entries


def _pack_ledger_part(value: LedgerPart) -> pb.ExportLedgerReply:
    return pb.ExportLedgerReply(
        version=value.version,
        updates_applied=value.updates_applied,
        num_entries=value.num_entries,
        entries=_entry_messages(value.entries),
        step_offset=value.step_offset,
    )


def _unpack_ledger_part(message: pb.ExportLedgerReply) -> LedgerPart:
    return LedgerPart(
        version=message.version,
        updates_applied=message.updates_applied,
        num_entries=message.num_entries,
        entries=_entry_values(message.entries, "ExportLedgerReply"),
        step_offset=message.step_offset,
    )


def _pack_attach(value: AttachTable) -> pb.AttachTableRequest:
    return pb.AttachTableRequest(
        view=view_message(value.view),
        mode=_MODES[value.mode],
        ledger=None if value.ledger is None else ledger_message(value.ledger),
    )


def _unpack_attach(message: pb.AttachTableRequest) -> AttachTable:
    require(message, "view")
    return AttachTable(
        view=view_value(message.view),
        mode=choice(_MODE_NAMES, message.mode, "AttachTableRequest.mode"),
        ledger=ledger_value(message.ledger) if message.HasField("ledger") else None,
    )


def _unpack_set_view(message: pb.SetViewRequest) -> TableView:
    require(message, "view")
    return view_value(message.view)


def _unpack_status(message: pb.StatusReply) -> ShardStatus:
    require(message, "status")
    return shard_status_value(message.status)


def _numbers(tensor: Tensor) -> npt.NDArray[np.int64]:
    numbers: npt.NDArray[np.int64] = tensor.numpy().copy()
    return numbers


def _pack_export(value: ExportPages) -> pb.ExportPagesRequest:
    return pb.ExportPagesRequest(table_id=value.table_id, blocks=value.blocks, key_pages=value.key_pages)


def _unpack_export(message: pb.ExportPagesRequest, tensors: Mapping[str, Tensor]) -> ExportPages:
    return ExportPages(
        table_id=message.table_id,
        row_pages=_numbers(tensors["row_pages"]),
        blocks=tuple(message.blocks),
        key_pages=tuple(message.key_pages),
    )


def _pack_pull(value: PullPages) -> pb.PullPagesRequest:
    return pb.PullPagesRequest(
        table_id=value.table_id,
        source=shard_info_message(value.source),
        blocks=value.blocks,
        key_pages=value.key_pages,
    )


def _unpack_pull(message: pb.PullPagesRequest, tensors: Mapping[str, Tensor]) -> PullPages:
    require(message, "source")
    return PullPages(
        table_id=message.table_id,
        source=shard_info_value(message.source),
        row_pages=_numbers(tensors["row_pages"]),
        blocks=tuple(message.blocks),
        key_pages=tuple(message.key_pages),
    )


class PageBatchCodec:
    """A ``PageBatch`` as ``ExportPagesReply``, its arrays as views of the frame."""

    name = "ExportPagesReply"

    def encode(self, value: PageBatch, *, narrow_ids: bool = False) -> bytes:  # noqa: ARG002
        header = packed(self._header, value, self.name)
        return encode_frame(header, {"row_pages": value.row_pages, "arrays": list(value.arrays.values())})

    def decode(self, frame: bytes | memoryview) -> PageBatch:
        header = pb.ExportPagesReply()
        found = decode_frame(frame, header)
        names, arrays = tuple(header.array_names), found.get("arrays", [])
        if len(names) != len(arrays) or len(set(names)) != len(names):
            raise InvalidRequest(f"{self.name} has {len(arrays)} arrays and the names {list(names)}; expected one each")
        if "row_pages" not in found:
            raise InvalidRequest(f"{self.name}.row_pages is missing")
        (row_pages,) = found["row_pages"]
        INT64.check(row_pages, f"{self.name}.row_pages")
        return PageBatch(
            table_id=header.table_id,
            row_pages=_numbers(row_pages),
            blocks=tuple(header.blocks),
            key_pages=tuple(header.key_pages),
            arrays=dict(zip(names, arrays, strict=True)),
            version=header.version,
        )

    @staticmethod
    def _header(value: PageBatch) -> pb.ExportPagesReply:
        return pb.ExportPagesReply(
            table_id=value.table_id,
            blocks=value.blocks,
            key_pages=value.key_pages,
            version=value.version,
            array_names=value.arrays.keys(),
        )


def _nothing(_: object) -> None:
    return None


ATTACH_TABLE_REQUEST = ProtoCodec(pb.AttachTableRequest, _pack_attach, _unpack_attach)
ATTACH_TABLE_REPLY = ProtoCodec(pb.AttachTableReply, lambda _: pb.AttachTableReply(), _nothing)
DROP_TABLE_REQUEST = ProtoCodec(
    pb.ShardServiceDropTableRequest,
    lambda table_id: pb.ShardServiceDropTableRequest(table_id=table_id),
    lambda message: message.table_id,
)
DROP_TABLE_REPLY = ProtoCodec(pb.ShardServiceDropTableReply, lambda _: pb.ShardServiceDropTableReply(), _nothing)
FREEZE_REQUEST = ProtoCodec(
    pb.FreezeRequest,
    lambda freeze: pb.FreezeRequest(table_id=freeze.table_id, timeout_s=freeze.timeout_s),
    lambda message: FreezeTable(table_id=message.table_id, timeout_s=message.timeout_s),
)
FREEZE_REPLY = ProtoCodec(
    pb.FreezeReply, lambda version: pb.FreezeReply(version=version), lambda message: message.version
)
THAW_REQUEST = ProtoCodec(
    pb.ThawRequest, lambda table_id: pb.ThawRequest(table_id=table_id), lambda message: message.table_id
)
THAW_REPLY = ProtoCodec(pb.ThawReply, lambda _: pb.ThawReply(), _nothing)
EXPORT_PAGES_REQUEST = FrameCodec(pb.ExportPagesRequest, _pack_export, _unpack_export, {"row_pages": INT64})
EXPORT_PAGES_REPLY = PageBatchCodec()
EXPORT_LEDGER_REQUEST = ProtoCodec(
    pb.ExportLedgerRequest,
    lambda request: pb.ExportLedgerRequest(table_id=request.table_id, first=request.first),
    lambda message: ExportLedger(table_id=message.table_id, first=message.first),
)
EXPORT_LEDGER_REPLY = ProtoCodec(pb.ExportLedgerReply, _pack_ledger_part, _unpack_ledger_part)
PULL_PAGES_REQUEST = FrameCodec(pb.PullPagesRequest, _pack_pull, _unpack_pull, {"row_pages": INT64})
PULL_PAGES_REPLY = ProtoCodec(
    pb.PullPagesReply,
    lambda report: pb.PullPagesReply(pages=report.pages, num_bytes=report.num_bytes),
    lambda message: PullReport(pages=message.pages, num_bytes=message.num_bytes),
)
SET_VIEW_REQUEST = ProtoCodec(
    pb.SetViewRequest, lambda view: pb.SetViewRequest(view=view_message(view)), _unpack_set_view
)
SET_VIEW_REPLY = ProtoCodec(pb.SetViewReply, lambda _: pb.SetViewReply(), _nothing)
STATUS_REQUEST = ProtoCodec(pb.StatusRequest, lambda _: pb.StatusRequest(), _nothing)
STATUS_REPLY = ProtoCodec(
    pb.StatusReply, lambda status: pb.StatusReply(status=shard_status_message(status)), _unpack_status
)
