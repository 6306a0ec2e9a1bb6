"""Small gathers over gRPC as arrays: the same bytes as the codecs of ``messages`` read and write, in a few steps.

What is not usual, and what is wrong, is left to those codecs, which know what to say.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from mempool.types import Envelope, Stamp
from mempool.types.messages import ArrayGather, ArrayGathered
from mempool.wire.bodies.frames import parts_after
from mempool.wire.bodies.tensors import DTYPES, Body
from mempool.wire.codecs.codec import SMALL_FRAME_BYTES
from mempool.wire.codecs.messages import STAMP
from mempool.wire.v1 import data_pb2, tensor_pb2

_VALUES = data_pb2.GatherReply.DESCRIPTOR.fields_by_name["values"].number
_FLOAT32 = DTYPES["float32"]
_WHOLE = (tensor_pb2.DTYPE_UNSPECIFIED, tensor_pb2.DTYPE_FLOAT32)


def read_gather(frame: bytes) -> ArrayGather | None:
    """A ``GatherRequest`` of what is usual: few ids of 32 bits, sums of float32. None of any other, and of what is
    none. Its arrays are its own."""
    if len(frame) > SMALL_FRAME_BYTES:
        return None
    try:
        message = data_pb2.GatherRequest.FromString(frame)
    except DecodeError:
        return None
    if message.reply_dtype not in _WHOLE or message.act or message.pin or message.HasField("inputs"):
        return None
    if not message.HasField("envelope"):
        return None
    ids = _flat(message.ids, tensor_pb2.DTYPE_UINT32, np.uint32)
    offsets = _flat(message.offsets, tensor_pb2.DTYPE_INT64, np.int64)
    if ids is None or offsets is None:
        return None
    weights = None
    if message.HasField("weights"):
        weights = _flat(message.weights, tensor_pb2.DTYPE_FLOAT32, np.float32)
        if weights is None or weights.shape != ids.shape:
            return None
    asked = message.envelope
    envelope = Envelope(
        table_id=asked.table_id, epoch=asked.epoch, incarnation=asked.incarnation, table_version=asked.table_version
    )
    return ArrayGather(
        envelope, message.lookup_id, ids, weights, offsets, message.remember, tuple(message.release), True
    )


def gathered(reply: ArrayGathered) -> bytes:
    """The frame of a ``GatherReply``."""
    values = reply.values
    body = Body(_FLOAT32, values.shape, values.reshape(-1).view(np.uint8).data)
    return b"".join(parts_after(_head(reply.stamp, reply.blocks), ((_VALUES, body),)))


@lru_cache(maxsize=256)
def _head(stamp: Stamp, blocks: tuple[int, ...]) -> bytes:
    """All but the values: the same until the next commit."""
    return data_pb2.GatherReply(stamp=STAMP.to_message(stamp), blocks=blocks).SerializeToString(deterministic=True)


def _flat(tensor: Any, number: int, dtype: type[np.generic]) -> npt.NDArray[Any] | None:
    """The elements of a tensor of one dimension, not none, as an array that may be written to, as kernels are made
    for; None of another."""
    shape, body = tensor.shape, tensor.inline
    if tensor.dtype != number or len(shape) != 1 or not body or len(body) != shape[0] * np.dtype(dtype).itemsize:
        return None
    return np.frombuffer(bytearray(body), dtype)
