"""Request and reply of ``Lookup``, the call of thin clients that any shard coordinates, and their codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mempool.types.messages import ReplyDtype, Stamp
from mempool.wire.codecs.codec import PER_HEAD, REPLY_DTYPE, FrameCodec, TensorField
from mempool.wire.codecs.messages import STAMP
from mempool.wire.codecs.mirror import Mirror
from mempool.wire.v1 import data_pb2 as pb

if TYPE_CHECKING:
    from torch import Tensor


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


LOOKUP_REQUEST = FrameCodec(
    Mirror(pb.LookupRequest, LookupRequest, {"reply_dtype": REPLY_DTYPE}), {"queries": TensorField(dims=(2, 3))}
)
LOOKUP_REPLY = FrameCodec(
    Mirror(pb.LookupReply, LookupReply, {"stamp": STAMP}),
    {
        "ids": TensorField(dtypes=("int64",), dims=(3,)),
        "scores": PER_HEAD,
        "weights": PER_HEAD,
        "values": TensorField(dtypes=("float32", "bfloat16"), dims=(2,)),
    },
)
