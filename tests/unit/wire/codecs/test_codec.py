"""Codecs by themselves: what is optional, what is refused, arrays where values have arrays."""

import numpy as np
import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.types import ExportPages
from mempool.wire.bodies.frames import encode_frame
from mempool.wire.codecs.codec import Only, ProtoCodec, TensorField, narrowed
from mempool.wire.codecs.pages import EXPORT_PAGES_REQUEST
from mempool.wire.v1 import pool_pb2, shard_pb2


def test_a_message_of_one_field_is_its_value() -> None:
    codec: ProtoCodec[int, pool_pb2.RescaleRequest] = ProtoCodec(Only(pool_pb2.RescaleRequest, "shards"), 8)
    assert codec.name == "RescaleRequest"
    assert codec.decode(codec.encode(4)) == 4
    with pytest.raises(InvalidRequest, match="RescaleRequest cannot be sent"):
        codec.encode(-1)
    with pytest.raises(InvalidRequest, match="RescaleRequest has 9 bytes; at most 8 are taken"):
        codec.decode(bytes(9))
    with pytest.raises(InvalidRequest, match="RescaleRequest is malformed"):
        codec.decode(b"\xff")
    nothing: ProtoCodec[None, pool_pb2.DropTableReply] = ProtoCodec(Only(pool_pb2.DropTableReply))
    assert nothing.encode(None) == b""
    assert nothing.decode(b"") is None


def test_a_tensor_field_names_what_it_wants() -> None:
    field = TensorField(dtypes=("float32", "bfloat16"), dims=(2, 3))
    field.check("bfloat16", (1, 2, 3), "M.rows")
    with pytest.raises(InvalidRequest, match=r"M\.rows has dtype int64; expected float32 or bfloat16"):
        field.check("int64", (1, 2), "M.rows")
    with pytest.raises(InvalidRequest, match=r"M\.rows has shape \[5\]; expected 2 or 3 dimensions"):
        field.check("float32", (5,), "M.rows")
    TensorField(dtypes=()).check("uint8", (1,), "M.any")


def test_arrays_are_values_own() -> None:
    pages = np.array([3, 5])
    frame = EXPORT_PAGES_REQUEST.encode(ExportPages(table_id=1, row_pages=pages, blocks=(0,)))
    found = EXPORT_PAGES_REQUEST.decode(frame).row_pages
    assert isinstance(found, np.ndarray)
    found[0] = 7
    assert EXPORT_PAGES_REQUEST.decode(frame).row_pages.tolist() == [3, 5]
    wrong = encode_frame(shard_pb2.ExportPagesRequest(), {"row_pages": torch.ones(2)})
    with pytest.raises(InvalidRequest, match=r"ExportPagesRequest\.row_pages has dtype float32; expected int64"):
        EXPORT_PAGES_REQUEST.decode(wrong)


def test_ids_are_narrowed_whatever_holds_them() -> None:
    for ids in (torch.tensor([0, 2**32 - 1]), np.array([0, 2**32 - 1])):
        found = narrowed(ids)
        assert found.dtype == np.uint32
        assert found.tolist() == [0, 2**32 - 1]
