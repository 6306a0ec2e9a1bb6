"""Codecs of the requests and replies in ``mempool.types.messages``, one per class, named after it in capitals.

Shapes and dtypes of tensors are checked here; what they must be in view of a table is checked by ``server``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mempool.types import messages as types
from mempool.wire.codecs.codec import FLOAT_DTYPES, INT64, SLOT_IDS, FrameCodec, TensorField, reply_dtype, require
from mempool.wire.v1 import data_pb2 as pb

Tensors = Mapping[str, Tensor]

_FLOATS = (torch.float32, torch.bfloat16)
_WEIGHTS = TensorField(dtypes=_FLOATS, optional=True)


def envelope_message(value: types.Envelope) -> pb.Envelope:
    return pb.Envelope(
        table_id=value.table_id,
        epoch=value.epoch,
        incarnation=value.incarnation,
        table_version=value.table_version,
    )


def envelope_value(message: pb.Envelope) -> types.Envelope:
    return types.Envelope(
        table_id=message.table_id,
        epoch=message.epoch,
        incarnation=message.incarnation,
        table_version=message.table_version,
    )


def stamp_message(value: types.Stamp) -> pb.Stamp:
    return pb.Stamp(
        shard=value.shard, incarnation=value.incarnation, epoch=value.epoch, table_version=value.table_version
    )


def stamp_value(message: pb.Stamp) -> types.Stamp:
    return types.Stamp(
        shard=message.shard,
        incarnation=message.incarnation,
        epoch=message.epoch,
        table_version=message.table_version,
    )


def step_id_message(value: types.StepId) -> pb.StepId:
    return pb.StepId(group=value.group, rank=value.rank, step=value.step)


def step_id_value(message: pb.StepId) -> types.StepId:
    return types.StepId(group=message.group, rank=message.rank, step=message.step)


def _pack_gather(value: types.GatherRequest) -> pb.GatherRequest:
    return pb.GatherRequest(
        envelope=envelope_message(value.envelope),
        lookup_id=value.lookup_id,
        remember=value.remember,
        release=value.release,
        reply_dtype=FLOAT_DTYPES[value.reply_dtype],
    )


def _unpack_gather(message: pb.GatherRequest, tensors: Tensors) -> types.GatherRequest:
    require(message, "envelope")
    return types.GatherRequest(
        envelope=envelope_value(message.envelope),
        lookup_id=message.lookup_id,
        ids=tensors["ids"],
        weights=tensors.get("weights"),
        offsets=tensors["offsets"],
        remember=message.remember,
        release=tuple(message.release),
        reply_dtype=reply_dtype(message.reply_dtype, "GatherRequest.reply_dtype"),
    )


def _pack_gather_reply(value: types.GatherReply) -> pb.GatherReply:
    return pb.GatherReply(stamp=stamp_message(value.stamp), blocks=value.blocks)


def _unpack_gather_reply(message: pb.GatherReply, tensors: Tensors) -> types.GatherReply:
    require(message, "stamp")
    return types.GatherReply(stamp=stamp_value(message.stamp), blocks=tuple(message.blocks), values=tensors["values"])


def _pack_update(value: types.UpdateRequest) -> pb.UpdateRequest:
    return pb.UpdateRequest(
        envelope=envelope_message(value.envelope),
        step_id=step_id_message(value.step_id),
        sequence=value.sequence,
        lookup_id=value.lookup_id,
        blocks=value.blocks,
        hold=value.hold,
        want_weight_grad=value.want_weight_grad,
    )


def _unpack_update(message: pb.UpdateRequest, tensors: Tensors) -> types.UpdateRequest:
    require(message, "envelope", "step_id")
    return types.UpdateRequest(
        envelope=envelope_value(message.envelope),
        step_id=step_id_value(message.step_id),
        sequence=message.sequence,
        lookup_id=message.lookup_id,
        blocks=tuple(message.blocks),
        grads=tensors["grads"],
        hold=message.hold,
        want_weight_grad=message.want_weight_grad,
        ids=tensors.get("ids"),
        weights=tensors.get("weights"),
        offsets=tensors.get("offsets"),
    )


def _pack_update_reply(value: types.UpdateReply) -> pb.UpdateReply:
    return pb.UpdateReply(stamp=stamp_message(value.stamp))


def _unpack_update_reply(message: pb.UpdateReply, tensors: Tensors) -> types.UpdateReply:
    require(message, "stamp")
    return types.UpdateReply(stamp=stamp_value(message.stamp), weight_grad=tensors.get("weight_grad"))


def _pack_prepare(value: types.PrepareRequest) -> pb.PrepareRequest:
    return pb.PrepareRequest(
        envelope=envelope_message(value.envelope),
        step_id=step_id_message(value.step_id),
        sequences=value.sequences,
        want_norm=value.want_norm,
    )


def _unpack_prepare(message: pb.PrepareRequest, _: Tensors) -> types.PrepareRequest:
    require(message, "envelope", "step_id")
    return types.PrepareRequest(
        envelope=envelope_value(message.envelope),
        step_id=step_id_value(message.step_id),
        sequences=tuple(message.sequences),
        want_norm=message.want_norm,
    )


def _pack_prepare_reply(value: types.PrepareReply) -> pb.PrepareReply:
    return pb.PrepareReply(
        stamp=stamp_message(value.stamp),
        missing=value.missing,
        squared_norm=value.squared_norm,
        finite=value.finite,
        applied=value.applied,
    )


def _unpack_prepare_reply(message: pb.PrepareReply, _: Tensors) -> types.PrepareReply:
    require(message, "stamp")
    return types.PrepareReply(
        stamp=stamp_value(message.stamp),
        missing=tuple(message.missing),
        squared_norm=message.squared_norm,
        finite=message.finite,
        applied=message.applied,
    )


def _pack_commit(value: types.CommitRequest) -> pb.CommitRequest:
    return pb.CommitRequest(
        envelope=envelope_message(value.envelope),
        step_id=step_id_message(value.step_id),
        lr=value.lr,
        grad_scale=value.grad_scale,
        sequences=value.sequences,
        one_phase=value.one_phase,
    )


def _unpack_commit(message: pb.CommitRequest, _: Tensors) -> types.CommitRequest:
    require(message, "envelope", "step_id")
    return types.CommitRequest(
        envelope=envelope_value(message.envelope),
        step_id=step_id_value(message.step_id),
        lr=message.lr,
        grad_scale=message.grad_scale,
        sequences=tuple(message.sequences),
        one_phase=message.one_phase,
    )


def _pack_commit_reply(value: types.CommitReply) -> pb.CommitReply:
    return pb.CommitReply(stamp=stamp_message(value.stamp), missing=value.missing, applied=value.applied)


def _unpack_commit_reply(message: pb.CommitReply, _: Tensors) -> types.CommitReply:
    require(message, "stamp")
    return types.CommitReply(stamp=stamp_value(message.stamp), missing=tuple(message.missing), applied=message.applied)


def _pack_discard(value: types.DiscardRequest) -> pb.DiscardRequest:
    return pb.DiscardRequest(envelope=envelope_message(value.envelope), step_id=step_id_message(value.step_id))


def _unpack_discard(message: pb.DiscardRequest, _: Tensors) -> types.DiscardRequest:
    require(message, "envelope", "step_id")
    return types.DiscardRequest(envelope=envelope_value(message.envelope), step_id=step_id_value(message.step_id))


def _pack_discard_reply(value: types.DiscardReply) -> pb.DiscardReply:
    return pb.DiscardReply(stamp=stamp_message(value.stamp), discarded=value.discarded)


def _unpack_discard_reply(message: pb.DiscardReply, _: Tensors) -> types.DiscardReply:
    require(message, "stamp")
    return types.DiscardReply(stamp=stamp_value(message.stamp), discarded=message.discarded)


def _pack_score(value: types.ScoreRequest) -> pb.ScoreRequest:
    return pb.ScoreRequest(envelope=envelope_message(value.envelope), topk=value.topk)


def _unpack_score(message: pb.ScoreRequest, tensors: Tensors) -> types.ScoreRequest:
    require(message, "envelope")
    return types.ScoreRequest(envelope=envelope_value(message.envelope), queries=tensors["queries"], topk=message.topk)


def _pack_score_reply(value: types.ScoreReply) -> pb.ScoreReply:
    return pb.ScoreReply(stamp=stamp_message(value.stamp), heads=value.heads)


def _unpack_score_reply(message: pb.ScoreReply, tensors: Tensors) -> types.ScoreReply:
    require(message, "stamp")
    return types.ScoreReply(
        stamp=stamp_value(message.stamp),
        heads=tuple(message.heads),
        scores=tensors["scores"],
        ids=tensors["ids"],
    )


def _pack_read_rows(value: types.ReadRowsRequest) -> pb.ReadRowsRequest:
    return pb.ReadRowsRequest(envelope=envelope_message(value.envelope), array=value.array)


def _unpack_read_rows(message: pb.ReadRowsRequest, tensors: Tensors) -> types.ReadRowsRequest:
    require(message, "envelope")
    return types.ReadRowsRequest(envelope=envelope_value(message.envelope), array=message.array, ids=tensors["ids"])


def _pack_read_rows_reply(value: types.ReadRowsReply) -> pb.ReadRowsReply:
    return pb.ReadRowsReply(stamp=stamp_message(value.stamp), blocks=value.blocks)


def _unpack_read_rows_reply(message: pb.ReadRowsReply, tensors: Tensors) -> types.ReadRowsReply:
    require(message, "stamp")
    return types.ReadRowsReply(stamp=stamp_value(message.stamp), blocks=tuple(message.blocks), rows=tensors["rows"])


def _pack_write_rows(value: types.WriteRowsRequest) -> pb.WriteRowsRequest:
    return pb.WriteRowsRequest(envelope=envelope_message(value.envelope), array=value.array, blocks=value.blocks)


def _unpack_write_rows(message: pb.WriteRowsRequest, tensors: Tensors) -> types.WriteRowsRequest:
    require(message, "envelope")
    return types.WriteRowsRequest(
        envelope=envelope_value(message.envelope),
        array=message.array,
        ids=tensors["ids"],
        blocks=tuple(message.blocks),
        rows=tensors["rows"],
    )


def _pack_write_rows_reply(value: types.WriteRowsReply) -> pb.WriteRowsReply:
    return pb.WriteRowsReply(stamp=stamp_message(value.stamp))


def _unpack_write_rows_reply(message: pb.WriteRowsReply, _: Tensors) -> types.WriteRowsReply:
    require(message, "stamp")
    return types.WriteRowsReply(stamp=stamp_value(message.stamp))


def _pack_step_count(value: types.StepCountRequest) -> pb.StepCountRequest:
    return pb.StepCountRequest(envelope=envelope_message(value.envelope), set=value.set, at_version=value.at_version)


def _unpack_step_count(message: pb.StepCountRequest, _: Tensors) -> types.StepCountRequest:
    require(message, "envelope")
    return types.StepCountRequest(
        envelope=envelope_value(message.envelope),
        set=message.set if message.HasField("set") else None,
        at_version=message.at_version,
    )


def _pack_step_count_reply(value: types.StepCountReply) -> pb.StepCountReply:
    return pb.StepCountReply(stamp=stamp_message(value.stamp), count=value.count)


def _unpack_step_count_reply(message: pb.StepCountReply, _: Tensors) -> types.StepCountReply:
    require(message, "stamp")
    return types.StepCountReply(stamp=stamp_value(message.stamp), count=message.count)


_BAGS = TensorField(dtypes=_FLOATS, dims=(2,))
_ROWS = TensorField(dtypes=(), dims=(2,))
_PER_HEAD = TensorField(dims=(3,))

GATHER_REQUEST = FrameCodec(
    pb.GatherRequest, _pack_gather, _unpack_gather, {"ids": SLOT_IDS, "weights": _WEIGHTS, "offsets": INT64}
)
GATHER_REPLY = FrameCodec(pb.GatherReply, _pack_gather_reply, _unpack_gather_reply, {"values": _BAGS})
UPDATE_REQUEST = FrameCodec(
    pb.UpdateRequest,
    _pack_update,
    _unpack_update,
    {
        "grads": _BAGS,
        "ids": TensorField(dtypes=SLOT_IDS.dtypes, optional=True, ids=True),
        "weights": _WEIGHTS,
        "offsets": TensorField(dtypes=INT64.dtypes, optional=True),
    },
)
UPDATE_REPLY = FrameCodec(
    pb.UpdateReply, _pack_update_reply, _unpack_update_reply, {"weight_grad": TensorField(optional=True)}
)
PREPARE_REQUEST = FrameCodec(pb.PrepareRequest, _pack_prepare, _unpack_prepare)
PREPARE_REPLY = FrameCodec(pb.PrepareReply, _pack_prepare_reply, _unpack_prepare_reply)
COMMIT_REQUEST = FrameCodec(pb.CommitRequest, _pack_commit, _unpack_commit)
COMMIT_REPLY = FrameCodec(pb.CommitReply, _pack_commit_reply, _unpack_commit_reply)
DISCARD_REQUEST = FrameCodec(pb.DiscardRequest, _pack_discard, _unpack_discard)
DISCARD_REPLY = FrameCodec(pb.DiscardReply, _pack_discard_reply, _unpack_discard_reply)
SCORE_REQUEST = FrameCodec(pb.ScoreRequest, _pack_score, _unpack_score, {"queries": _PER_HEAD})
SCORE_REPLY = FrameCodec(
    pb.ScoreReply,
    _pack_score_reply,
    _unpack_score_reply,
    {"scores": _PER_HEAD, "ids": TensorField(dtypes=INT64.dtypes, dims=(3,))},
)
READ_ROWS_REQUEST = FrameCodec(pb.ReadRowsRequest, _pack_read_rows, _unpack_read_rows, {"ids": SLOT_IDS})
READ_ROWS_REPLY = FrameCodec(pb.ReadRowsReply, _pack_read_rows_reply, _unpack_read_rows_reply, {"rows": _ROWS})
WRITE_ROWS_REQUEST = FrameCodec(
    pb.WriteRowsRequest, _pack_write_rows, _unpack_write_rows, {"ids": SLOT_IDS, "rows": _ROWS}
)
WRITE_ROWS_REPLY = FrameCodec(pb.WriteRowsReply, _pack_write_rows_reply, _unpack_write_rows_reply)
STEP_COUNT_REQUEST = FrameCodec(pb.StepCountRequest, _pack_step_count, _unpack_step_count)
STEP_COUNT_REPLY = FrameCodec(pb.StepCountReply, _pack_step_count_reply, _unpack_step_count_reply)
