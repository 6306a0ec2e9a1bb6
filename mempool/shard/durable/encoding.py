"""The bytes of records: frames of the wire's own codecs. Pure."""

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mempool.errors import DataLoss, InvalidRequest, MempoolError
from mempool.journal import Bytes
from mempool.shard.durable.records import (
    KINDS,
    Applied,
    Attached,
    Begun,
    CaughtUp,
    Counted,
    Decided,
    Dropped,
    Forked,
    Gone,
    Held,
    Kept,
    Over,
    Prepared,
    RecordOf,
    Restored,
    Schedule,
    Staged,
    StagedLedger,
    Stopped,
    Unstaged,
    Viewed,
    Written,
)
from mempool.shard.steps.held import HeldUpdate
from mempool.types import DecidedStep, DiscardRequest, Envelope, ResolveReply, StepId, UpdateRequest
from mempool.types.bags import Bags
from mempool.types.messages import DiscardPart
from mempool.wire.codecs import messages, pages
from mempool.wire.codecs.pages import ForgetTable, SetView

_NUMBERS = {kind: number for number, kind in enumerate(KINDS, 1)}
_ROUND = struct.Struct("<QBB")  # table, whether decisions, bytes of the token
_SCHEDULE = struct.Struct("<QqQ")  # table, first step, steps
_STOPPED = struct.Struct("<Qq")
_FORKED = struct.Struct("<QQ")
_LENGTH = struct.Struct("<I")
_NO_ENVELOPE = {"epoch": 0, "incarnation": 0}


def encode(record: RecordOf) -> tuple[int, list[Bytes]]:
    """A record's kind and bytes, in parts. Tensors that are contiguous, on the CPU, are not copied: of ``Held`` alone,
    as others are the caller's.

    Raises:
        InvalidRequest: A number of it has no place in its frame.
    """
    return _NUMBERS[type(record)], _parts(record)


def _parts(record: RecordOf) -> list[Bytes]:
    match record:
        case Begun(number) | Unstaged(number):
            return [struct.pack("<Q", number)]
        case Attached(request):
            return [pages.ATTACHED.encode(request)]
        case Dropped(table_id):
            return [pages.DROP_TABLE_REQUEST.encode(ForgetTable(table_id=table_id, unmade=False))]
        case Viewed(view):
            return [pages.SET_VIEW_REQUEST.encode(SetView(view=view, token=""))]
        case Held():
            return [*messages.UPDATE_REQUEST.parts(_as_request(record))]
        case Prepared(prepare):
            return [messages.PREPARE_REQUEST.encode(prepare)]
        case Decided(steps) | Kept(steps):
            return [_steps(steps)]
        case Applied(step, others):
            return [_steps((step, *others))]
        case Over(table_id, step_id):
            return [_step_at(table_id, step_id)]
        case Gone(table_id, step_id, others):
            at = _step_at(table_id, step_id)
            return [_LENGTH.pack(len(at)), at, _steps(others)]
        case Written(write):
            return [messages.WRITE_ROWS_REQUEST.encode(write)]
        case Counted(count):
            return [messages.STEP_COUNT_REQUEST.encode(count)]
        case Staged(token, batch):
            return [_round(batch.table_id, token, False), pages.EXPORT_PAGES_REPLY.encode(batch)]
        case StagedLedger(table_id, token, ledger, decisions):
            message = pages.ledger_message(ledger)
            return [_round(table_id, token, decisions), message.SerializeToString(deterministic=True)]
        case CaughtUp(table_id, slots):
            return [struct.pack("<Q", table_id), _bytes_of(slots)]
        case Forked(table_id, base_id):
            return [_FORKED.pack(table_id, base_id)]
        case Stopped(table_id, step):
            return [_STOPPED.pack(table_id, step)]
        case Restored(table_id, pages_of):
            head = struct.pack("<Q", table_id)
            return [head] if pages_of is None else [head, pages.EXPORT_PAGES_REPLY.encode(pages_of)]
        case Schedule(table_id, first_step, steps_3T, log_decays):
            head = _SCHEDULE.pack(table_id, first_step, steps_3T.shape[1])
            return [head, _bytes_of(steps_3T), _bytes_of(log_decays)]


def decode(kind: int, payload: Bytes) -> RecordOf:
    """The record of some bytes, in memory of its own.

    Raises:
        DataLoss: There is no such kind, or the bytes are not one's: they came from a later version, or a faulty one.
    """
    if not 0 < kind <= len(KINDS):
        raise DataLoss(
            f"a record of kind {kind} is in the journal, and this version of mempool knows those up to {len(KINDS)}: a "
            "later version has written it. Take that one. Nothing was changed."
        )
    try:
        return _record(KINDS[kind - 1], bytes(payload))  # a copy that is aligned, and not the whole segment's
    except (MempoolError, struct.error, ValueError, IndexError) as error:
        raise DataLoss(f"a record of kind {kind} is not what one has: {error}") from error


def _record(kind: type[RecordOf], data: bytes) -> RecordOf:
    if kind is Begun:
        return Begun(*struct.unpack("<Q", data))
    if kind is Unstaged:
        return Unstaged(*struct.unpack("<Q", data))
    if kind is Forked:
        return Forked(*_FORKED.unpack(data))
    if kind is Attached:
        return Attached(pages.ATTACHED.decode(data))
    if kind is Dropped:
        return Dropped(pages.DROP_TABLE_REQUEST.decode(data).table_id)
    if kind is Viewed:
        view = pages.SET_VIEW_REQUEST.decode(data).view
        if view is None:
            raise InvalidRequest("a record of a view has none")
        return Viewed(view)
    if kind is Held:
        return _as_held(messages.UPDATE_REQUEST.decode(data))
    if kind is Prepared:
        return Prepared(messages.PREPARE_REQUEST.decode(data))
    if kind is Decided:
        return Decided(_steps_of(data))
    if kind is Kept:
        return Kept(_steps_of(data))
    if kind is Applied:
        first, *others = _steps_of(data)
        return Applied(first, tuple(others))
    if kind is Over:
        return Over(*_step_at_of(data))
    if kind is Gone:
        (length,) = _LENGTH.unpack_from(data)
        at = _LENGTH.size + length
        return Gone(*_step_at_of(data[_LENGTH.size : at]), _steps_of(data[at:]))
    if kind is Written:
        return Written(messages.WRITE_ROWS_REQUEST.decode(data))
    if kind is Counted:
        return Counted(messages.STEP_COUNT_REQUEST.decode(data))
    if kind is CaughtUp:
        (table_id,) = struct.unpack_from("<Q", data)
        return CaughtUp(table_id, torch.tensor(np.frombuffer(data, "<i8", offset=8)))
    if kind is Schedule:
        return _schedule_of(data)
    if kind is Stopped:
        return Stopped(*_STOPPED.unpack(data))
    if kind is Restored:
        (table_id,) = struct.unpack_from("<Q", data)
        return Restored(table_id, pages.EXPORT_PAGES_REPLY.decode(data[8:]) if len(data) > 8 else None)
    table_id, decisions, length = _ROUND.unpack_from(data)
    at = _ROUND.size + length
    token = data[_ROUND.size : at].decode()
    if kind is Staged:
        return Staged(token, pages.EXPORT_PAGES_REPLY.decode(data[at:]))
    return StagedLedger(table_id, token, pages.ledger_of(data[at:]), bool(decisions))


def joined(records: Sequence[RecordOf]) -> bytes:
    """Records one behind the other, each with its kind and size."""
    found: list[Bytes] = []
    for record in records:
        kind, parts = encode(record)
        found += (struct.pack("<HQ", kind, sum(len(part) for part in parts)), *parts)
    return b"".join(found)


def apart(data: bytes) -> list[RecordOf]:
    """What ``joined`` has joined. Raises DataLoss as ``decode``."""
    found: list[RecordOf] = []
    at, view = 0, memoryview(data)
    while at < len(view):
        kind, size = struct.unpack_from("<HQ", view, at)
        at += struct.calcsize("<HQ")
        found.append(decode(kind, view[at : at + size]))
        at += size
    return found


def _as_request(held: Held) -> UpdateRequest:
    bags = held.update.bags
    return UpdateRequest(
        envelope=Envelope(table_id=held.table_id, **_NO_ENVELOPE),
        step_id=held.step_id,
        sequence=held.sequence,
        lookup_id=0,
        blocks=(),
        grads=held.update.grads,
        hold=True,
        want_weight_grad=False,
        ids=bags.ids.view(torch.uint32) if bags.ids.dtype == torch.int32 else bags.ids,  # as ids travel
        weights=bags.weights,
        offsets=bags.offsets,
        input_dim=held.update.input_dim,
    )


def _as_held(request: UpdateRequest) -> Held:
    if request.ids is None or request.offsets is None:
        raise InvalidRequest("an update that is held has ids and offsets")
    bags = Bags(ids=request.ids, weights=request.weights, offsets=request.offsets)
    update = HeldUpdate(bags, request.grads, input_dim=request.input_dim)
    return Held(request.envelope.table_id, request.step_id, request.sequence, update)


def _step_at(table_id: int, step_id: StepId) -> bytes:
    part = DiscardPart(envelope=Envelope(table_id=table_id, **_NO_ENVELOPE), step_id=step_id)
    return messages.DISCARD_REQUEST.encode(DiscardRequest(parts=(part,)))


def _step_at_of(data: bytes) -> tuple[int, StepId]:
    (part,) = messages.DISCARD_REQUEST.decode(data).parts
    return part.envelope.table_id, part.step_id


def _steps(steps: tuple[DecidedStep, ...]) -> bytes:
    return pages.RESOLVE_REPLY.encode(ResolveReply(version=0, state="decided", steps=steps))


def _steps_of(data: bytes) -> tuple[DecidedStep, ...]:
    return pages.RESOLVE_REPLY.decode(data).steps


def _round(table_id: int, token: str, decisions: bool) -> bytes:
    name = token.encode()
    return _ROUND.pack(table_id, decisions, len(name)) + name


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().numpy().tobytes()


def _schedule_of(data: bytes) -> Schedule:
    table_id, first_step, count = _SCHEDULE.unpack_from(data)
    steps_at, decays_at = _SCHEDULE.size, _SCHEDULE.size + 12 * count
    steps = torch.frombuffer(bytearray(data[steps_at:decays_at]) or bytearray(4), dtype=torch.float32)[: 3 * count]
    log_decays = torch.frombuffer(bytearray(data[decays_at:]), dtype=torch.float64)
    if log_decays.shape[0] != count + 1:
        raise ValueError(f"a schedule of {count} steps has {log_decays.shape[0]} decays")
    return Schedule(table_id, first_step, steps.reshape(3, count), log_decays)
