"""The messages of thin clients' lookups: what may be left out, what is refused. Round trips: test_methods.py."""

import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.wire.codecs.lookup import LOOKUP_REPLY, LOOKUP_REQUEST, LookupRequest
from mempool.wire.v1 import data_pb2


def test_queries_have_two_or_three_dimensions() -> None:
    for shape in ((5, 4), (5, 2, 4)):
        request = LookupRequest(table="t", queries=torch.zeros(shape), topk=3)
        assert LOOKUP_REQUEST.decode(LOOKUP_REQUEST.encode(request)).queries.shape == shape
    with pytest.raises(InvalidRequest, match=r"LookupRequest\.queries has shape \[5\]; expected 2 or 3 dimensions"):
        LOOKUP_REQUEST.encode(LookupRequest(table="t", queries=torch.zeros(5), topk=3))


def test_values_are_float32_where_nothing_is_said() -> None:
    request = LookupRequest(table="t", queries=torch.zeros(1, 4), topk=3)
    message = data_pb2.LookupRequest.FromString(LOOKUP_REQUEST.encode(request))
    message.ClearField("reply_dtype")
    assert LOOKUP_REQUEST.decode(message.SerializeToString()).reply_dtype == "float32"


def test_a_reply_without_its_stamp_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"LookupReply\.ids is missing"):
        LOOKUP_REPLY.decode(b"")
