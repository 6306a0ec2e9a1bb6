"""Request and reply of ``Lookup``, the call of thin clients that any shard coordinates, and their codecs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mempool.types.messages import ReplyDtype, Stamp
from mempool.wire.codecs.codec import FLOAT_DTYPES, FrameCodec, TensorField, reply_dtype, require
from mempool.wire.codecs.messages import stamp_message, stamp_value
from mempool.wire.v1 import data_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupRequest:
    """A whole lookup. queries: [B, H, D] float32, or [B, D] for a table of one head or flat keys."""

    table: str
    queries: Tensor
    topk: int
    reply_dtype: ReplyDtype = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupReply:
    """Answer to Lookup. H is 1 for flat keys and for queries of two dimensions.

    Attributes:
        stamp: The shard that coordinated, the epoch it followed, the lowest table version among the shards asked.
        newest_table_version: The highest table version among the shards asked.
        ids: [B, H, K] int64 by (score descending, id ascending); -1 where there are fewer than K.
        scores: [B, H, K] float32; -inf where there are fewer than K.
        weights: [B, H, K] float32, softmax over K; 0 where there are fewer than K.
        values: [B, V] float32, or bfloat16 when asked.
    """

    stamp: Stamp
    newest_table_version: int
    ids: Tensor
    scores: Tensor
    weights: Tensor
    values: Tensor


def _pack_lookup(value: LookupRequest) -> pb.LookupRequest:
    return pb.LookupRequest(table=value.table, topk=value.topk, reply_dtype=FLOAT_DTYPES[value.reply_dtype])


def _unpack_lookup(message: pb.LookupRequest, tensors: Mapping[str, Tensor]) -> LookupRequest:
    return LookupRequest(
        table=message.table,
        queries=tensors["queries"],
        topk=message.topk,
        reply_dtype=reply_dtype(message.reply_dtype, "LookupRequest.reply_dtype"),
    )


def _pack_lookup_reply(value: LookupReply) -> pb.LookupReply:
    return pb.LookupReply(stamp=stamp_message(value.stamp), newest_table_version=value.newest_table_version)


def _unpack_lookup_reply(message: pb.LookupReply, tensors: Mapping[str, Tensor]) -> LookupReply:
    require(message, "stamp")
    return LookupReply(
        stamp=stamp_value(message.stamp),
        newest_table_version=message.newest_table_version,
        ids=tensors["ids"],
        scores=tensors["scores"],
        weights=tensors["weights"],
        values=tensors["values"],
    )


_PER_HEAD = TensorField(dims=(3,))

LOOKUP_REQUEST = FrameCodec(pb.LookupRequest, _pack_lookup, _unpack_lookup, {"queries": TensorField(dims=(2, 3))})
LOOKUP_REPLY = FrameCodec(
    pb.LookupReply,
    _pack_lookup_reply,
    _unpack_lookup_reply,
    {
        "ids": TensorField(dtypes=(torch.int64,), dims=(3,)),
        "scores": _PER_HEAD,
        "weights": _PER_HEAD,
        "values": TensorField(dtypes=(torch.float32, torch.bfloat16), dims=(2,)),
    },
)
