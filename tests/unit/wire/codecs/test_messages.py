"""What the codecs check on the way: missing fields, dtypes, dimensions, ids narrowed. Round trips: test_methods.py."""

import dataclasses

import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.types import Envelope, GatherReply, GatherRequest, Stamp, StepId, UpdateRequest
from mempool.wire.bodies.frames import encode_frame
from mempool.wire.codecs import messages
from mempool.wire.codecs.lookup import LOOKUP_REQUEST
from mempool.wire.v1 import data_pb2, tensor_pb2

ENVELOPE = Envelope(table_id=1, epoch=2, incarnation=3, table_version=4)
GATHER = GatherRequest(
    envelope=ENVELOPE,
    lookup_id=4,
    ids=torch.tensor([0, 2**32 - 1, 5]),
    weights=torch.ones(3),
    offsets=torch.tensor([0, 3]),
    remember=False,
)
UPDATE = UpdateRequest(
    envelope=ENVELOPE,
    step_id=StepId(group="g", rank=0, step=1),
    sequence=1,
    lookup_id=4,
    blocks=(0,),
    grads=torch.ones(1, 8),
    hold=True,
    want_weight_grad=True,
    ids=torch.tensor([7, 8]),
)


def test_ids_are_narrowed_when_told_to() -> None:
    wide = messages.GATHER_REQUEST.decode(messages.GATHER_REQUEST.encode(GATHER))
    narrow = messages.GATHER_REQUEST.decode(messages.GATHER_REQUEST.encode(GATHER, narrow_ids=True))
    assert wide.ids.dtype == torch.int64
    assert narrow.ids.dtype == torch.uint32
    assert narrow.ids.to(torch.int64).tolist() == wide.ids.tolist() == [0, 2**32 - 1, 5]
    assert narrow.offsets.dtype == torch.int64


def test_optional_ids_are_narrowed_too() -> None:
    found = messages.UPDATE_REQUEST.decode(messages.UPDATE_REQUEST.encode(UPDATE, narrow_ids=True))
    assert found.ids is not None
    assert found.ids.dtype == torch.uint32
    assert found.offsets is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.ones(3)}, r"GatherRequest\.ids has dtype float32; expected int64 or uint32"),
        ({"ids": torch.ones(3, 1, dtype=torch.int64)}, r"GatherRequest\.ids has shape \[3, 1\]; expected 1 dimensions"),
        ({"weights": torch.ones(3, dtype=torch.float64)}, r"weights has dtype float64; expected float32 or bfloat16"),
        ({"offsets": torch.ones(2, dtype=torch.int32)}, r"offsets has dtype int32; expected int64"),
        ({"lookup_id": -1}, r"GatherRequest cannot be sent: .*-1"),
        ({"release": (2**64,)}, r"GatherRequest cannot be sent: "),
    ],
)
def test_a_wrong_request_is_not_sent(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        messages.GATHER_REQUEST.encode(dataclasses.replace(GATHER, **change))


@pytest.mark.parametrize("name", ["envelope", "ids", "offsets"])
def test_a_missing_field_is_named(name: str) -> None:
    message = data_pb2.GatherRequest.FromString(messages.GATHER_REQUEST.encode(GATHER))
    message.ClearField(name)
    with pytest.raises(InvalidRequest, match=rf"GatherRequest\.{name} is missing"):
        messages.GATHER_REQUEST.decode(message.SerializeToString())


def test_absent_weights_are_none() -> None:
    ones = dataclasses.replace(GATHER, weights=None)
    assert messages.GATHER_REQUEST.decode(messages.GATHER_REQUEST.encode(ones)).weights is None


def test_reply_dtype_is_float32_where_nothing_is_said() -> None:
    message = data_pb2.GatherRequest.FromString(messages.GATHER_REQUEST.encode(GATHER))
    message.ClearField("reply_dtype")
    assert messages.GATHER_REQUEST.decode(message.SerializeToString()).reply_dtype == "float32"
    message.reply_dtype = tensor_pb2.DTYPE_INT64
    with pytest.raises(InvalidRequest, match=r"GatherRequest\.reply_dtype is 5; expected one of .*1 \(float32\)"):
        messages.GATHER_REQUEST.decode(message.SerializeToString())


def test_bfloat16_keeps_its_bits() -> None:
    values = torch.randint(0, 2**16, (33, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
    reply = GatherReply(
        stamp=Stamp(shard=0, incarnation=1, epoch=1, table_version=0), blocks=(0,), values=values.view(torch.bfloat16)
    )
    found = messages.GATHER_REPLY.decode(messages.GATHER_REPLY.encode(reply)).values
    assert torch.equal(found.view(torch.uint16), values)


def test_sums_in_a_dtype_that_is_not_known_are_refused_by_name() -> None:
    """As a shard answers that is older than its client; and who coordinates a thin client's lookup, of packed rows."""
    request = data_pb2.GatherRequest.FromString(messages.GATHER_REQUEST.encode(GATHER))
    request.reply_dtype = tensor_pb2.DTYPE_INT8
    with pytest.raises(InvalidRequest, match=r"GatherRequest.reply_dtype is 10; expected one of .*float8_e4m3fn"):
        messages.GATHER_REQUEST.decode(request.SerializeToString())
    lookup = data_pb2.LookupRequest(table="facts", topk=1, reply_dtype=tensor_pb2.DTYPE_FLOAT8_E4M3FN)
    with pytest.raises(InvalidRequest, match=r"LookupRequest.reply_dtype is 9; expected one of .*bfloat16"):
        LOOKUP_REQUEST.decode(
            lookup.SerializeToString() + encode_frame(data_pb2.LookupRequest(), {"queries": torch.ones(1, 4)})
        )
