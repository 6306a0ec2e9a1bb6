"""What every message is held to, by its fields' kinds and names alone, whichever message it is."""

import math
import struct
from dataclasses import dataclass
from typing import Any

import pytest

from mempool.errors import InvalidRequest
from mempool.types import DecidedStep, Envelope, Ledger, ShardInfo, ShardStatus, StepCountRequest, StepId
from mempool.wire import methods
from mempool.wire.codecs import mirror
from mempool.wire.codecs.messages import STEP_ID
from mempool.wire.codecs.mirror import Choice, Mirror, Several
from mempool.wire.codecs.pages import FreezeTable
from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2, status_pb2, table_pb2


def _discard(group: str) -> data_pb2.DiscardRequest:
    part = data_pb2.DiscardPart(step_id=data_pb2.StepId(group=group))
    part.envelope.SetInParent()
    return data_pb2.DiscardRequest(parts=[part])


NO_TIMES = [math.nan, math.inf, -math.inf, -1.0, -0.0]


@pytest.mark.parametrize("seconds", NO_TIMES)
def test_a_time_that_is_none_is_refused_where_it_enters(seconds: float) -> None:
    freeze = shard_pb2.FreezeRequest(table_id=1, timeout_s=seconds).SerializeToString()
    lease = shard_pb2.FreezeRequest(table_id=1, timeout_s=1.0, lease_s=seconds).SerializeToString()
    with pytest.raises(InvalidRequest, match=r"FreezeRequest\.lease_s is .* seconds"):
        methods.FREEZE.request.decode(lease)
    # Minus zero is no default, so protobuf sends it.
    assert struct.pack("<d", seconds) in freeze
    with pytest.raises(
        InvalidRequest, match=r"FreezeRequest\.timeout_s is .* seconds; it must be finite and at least 0"
    ):
        methods.FREEZE.request.decode(freeze)
    stage = status_pb2.StageTime(stage="kernel", total_s=seconds)
    status = status_pb2.ShardStatus(info=table_pb2.ShardInfo(), state=1, stages=[stage])
    with pytest.raises(InvalidRequest, match=r"StageTime\.total_s"):
        methods.STATUS.reply.decode(shard_pb2.StatusReply(status=status).SerializeToString())


def test_every_time_of_the_wire_is_named_as_one() -> None:
    """A double is checked as a time by its name; these are all the others."""
    others = set()
    for file in (data_pb2, shard_pb2, pool_pb2, status_pb2, table_pb2):
        for message in file.DESCRIPTOR.message_types_by_name.values():
            others |= {field.name for field in message.fields if field.type == field.TYPE_DOUBLE}
    assert not {name for name in others if "time" in name or "lease" in name or "seconds" in name} - {
        name for name in others if name.endswith("_s")
    }


def test_zero_seconds_and_any_other_are_taken() -> None:
    for seconds in (0.0, 1e-9, 600.0, 1e300):
        frame = methods.FREEZE.request.encode(FreezeTable(table_id=1, timeout_s=seconds, token="", lease_s=0.0))
        assert methods.FREEZE.request.decode(frame).timeout_s == seconds


@pytest.mark.parametrize(
    ("method", "frame", "field"),
    [
        (methods.DISCARD, _discard("g" * 257), r"StepId\.group"),
        (methods.DISCARD, _discard("\u00e9" * 129), r"StepId\.group"),
        (methods.HEARTBEAT, data_pb2.HeartbeatRequest(group="g" * 257), r"HeartbeatRequest\.group"),
        (methods.FREEZE, shard_pb2.FreezeRequest(token="t" * 257), r"FreezeRequest\.token"),
        (methods.GET_TABLE, pool_pb2.GetTableRequest(name="n" * 257), r"GetTableRequest\.name"),
        (methods.PULL_PAGES, shard_pb2.PullPagesRequest(source=table_pb2.ShardInfo(address="a" * 300)), "address"),
    ],
)
def test_text_is_bounded_in_bytes(method: Any, frame: Any, field: str) -> None:
    if isinstance(frame, shard_pb2.PullPagesRequest):
        frame.row_pages.dtype, frame.row_pages.shape[:] = 5, [0]
    with pytest.raises(InvalidRequest, match=rf"{field} has \d+ bytes; at most 256 are taken"):
        method.request.decode(frame.SerializeToString())


def test_a_text_at_the_limit_is_taken() -> None:
    for group in ("g" * 256, "\u00e9" * 128):
        (part,) = methods.DISCARD.request.decode(_discard(group).SerializeToString()).parts
        assert part.step_id == StepId(group=group, rank=0, step=0)


def test_a_status_says_whole_what_a_disk_refuses() -> None:
    """Which names a file, however deep it lies; who asks for the status must not be the one that is refused."""
    info = ShardInfo(shard=0, address="", incarnation=1)
    status = ShardStatus(info=info, state="ready", storage="/s" * 1000, storage_refuses="file " * 800)
    assert methods.STATUS.reply.decode(methods.STATUS.reply.encode(status)) == status


def test_lists_of_numbers_are_bounded() -> None:
    message = data_pb2.PrepareRequest(parts=[data_pb2.PreparePart(sequences=range(2**17))])
    (part,) = message.parts
    part.envelope.SetInParent()
    part.step_id.SetInParent()
    (read,) = methods.PREPARE.request.decode(message.SerializeToString()).parts
    assert len(read.sequences) == 2**17
    part.sequences.append(1)
    with pytest.raises(InvalidRequest, match=r"PreparePart\.sequences has 131,073 entries; at most 131,072"):
        methods.PREPARE.request.decode(message.SerializeToString())


def test_lists_of_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "MAX_MESSAGES", 2)
    status = status_pb2.ShardStatus(info=table_pb2.ShardInfo(), state=1, stages=[status_pb2.StageTime()] * 3)
    with pytest.raises(InvalidRequest, match=r"ShardStatus\.stages has 3 entries; at most 2"):
        methods.STATUS.reply.decode(shard_pb2.StatusReply(status=status).SerializeToString())


def test_a_small_request_is_not_parsed_where_it_is_large() -> None:
    for method in (methods.GET_TABLE, methods.CREATE_TABLE, methods.RESCALE, methods.FREEZE, methods.STATUS):
        with pytest.raises(InvalidRequest, match="has 65,537 bytes; at most 65,536 are taken"):
            method.request.decode(bytes(65_537))


def test_unknown_enums_are_named() -> None:
    choice = Choice({"a": 1, "b": 2}, absent="a")
    assert [choice.from_wire(number, "M.f") for number in (0, 1, 2)] == ["a", "a", "b"]
    with pytest.raises(InvalidRequest, match=r"M\.f is 3; expected one of 0 \(a\), 1 \(a\), 2 \(b\)"):
        choice.from_wire(3, "M.f")
    with pytest.raises(InvalidRequest, match="'c' is none of a, b"):
        choice.to_wire("c")


@dataclass(frozen=True, kw_only=True)
class Entry:
    group: str
    rank: int
    step: int
    generation: int = 0
    version: int = 0
    dropped: int = 0
    others: tuple[DecidedStep, ...] = ()


def test_messages_inside_and_several_of_them() -> None:
    decided = Mirror(shard_pb2.DecidedStep, DecidedStep, {"step_id": STEP_ID})
    entries = Mirror(shard_pb2.LedgerEntry, Entry, {"others": Several(decided)}, left_out=("older",))
    ledger = Mirror(shard_pb2.Ledger, Ledger, {"entries": Several(entries)})
    value = Ledger(
        version=3,
        updates_applied=4,
        entries=(Entry(group="g", rank=1, step=2), Entry(group="h", rank=0, step=9)),  # type: ignore[arg-type]
    )
    message = ledger.to_message(value)
    assert [entry.group for entry in message.entries] == ["g", "h"]
    assert ledger.from_message(message) == value


def test_a_table_that_does_not_fit_its_message_is_a_mistake_of_the_programmer() -> None:
    with pytest.raises(AssertionError, match=r"ShardStatus\.info needs a converter"):
        Mirror(status_pb2.ShardStatus, dict)
    with pytest.raises(AssertionError, match="Envelope has no such fields"):
        Mirror(data_pb2.Envelope, dict, {"nothing": Choice({"a": 1})})


def test_an_absent_number_is_none_where_absence_can_be_told() -> None:
    envelope = Envelope(table_id=1, epoch=1, incarnation=1)
    for count in (None, 0, 7):
        request = StepCountRequest(envelope=envelope, set=count, at_version=3)
        assert methods.STEP_COUNT.request.decode(methods.STEP_COUNT.request.encode(request)) == request
