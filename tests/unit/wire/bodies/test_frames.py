"""The hand codec against what protobuf says, and against frames that no one should send."""

import numpy as np
import pytest
import torch
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.wire.bodies import frames
from mempool.wire.bodies.frames import encode_frame, tensor_slots
from mempool.wire.bodies.tensors import DTYPES, FrameMemory
from mempool.wire.v1 import data_pb2, shard_pb2, tensor_pb2


def tensor_field(number: int, payload: bytes) -> bytes:
    """A length-delimited field, length below 128."""
    tag = number << 3 | 2
    return bytes((tag & 0x7F | 0x80, tag >> 7, len(payload))) + payload


def ids_frame(tensor: tensor_pb2.Tensor) -> bytes:
    return data_pb2.GatherRequest(ids=tensor).SerializeToString()


def decode_frame(frame: bytes, header: Message) -> dict[str, list[torch.Tensor]]:
    """The tensors of a frame, by field."""
    found, memory = frames.decode_frame(frame, header), FrameMemory(frame)
    return {name: [memory.tensor(part) for part in parts] for name, parts in found.items()}


def decode(frame: bytes) -> dict[str, list[torch.Tensor]]:
    return decode_frame(frame, data_pb2.GatherRequest())


def good_tensor() -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT64, shape=[2], inline=np.arange(2).tobytes())


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES])
@pytest.mark.parametrize("extra", range(9))
def test_tensors_are_aligned_views_of_the_frame(dtype: torch.dtype, extra: int) -> None:
    # The name's length shifts everything behind it.
    header = data_pb2.WriteRowsRequest(array="x" * extra)
    ids, rows = torch.arange(7), torch.arange(15).to(dtype).view(3, 5)
    frame = encode_frame(header, {"ids": ids, "rows": rows})
    found = decode_frame(frame, data_pb2.WriteRowsRequest())
    start = np.frombuffer(frame, np.uint8).ctypes.data
    for name, expected in (("ids", ids), ("rows", rows)):
        (tensor,) = found[name]
        assert torch.equal(tensor, expected)
        assert start < tensor.data_ptr() < start + len(frame)
        assert tensor.data_ptr() % dtype.itemsize == 0


@given(body=st.integers(100, 140) | st.integers(16_350, 16_420), before=st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_alignment_holds_where_the_length_of_the_length_changes(body: int, before: int) -> None:
    frame = encode_frame(
        data_pb2.WriteRowsRequest(array="x" * before), {"ids": torch.zeros(body // 8, dtype=torch.int64)}
    )
    (tensor,) = decode_frame(frame, data_pb2.WriteRowsRequest())["ids"]
    offset = tensor.data_ptr() - np.frombuffer(frame, np.uint8).ctypes.data
    assert 0 < offset < len(frame)
    assert offset % 8 == 0
    assert data_pb2.WriteRowsRequest.FromString(frame).SerializeToString() == frame


@pytest.mark.parametrize("shift", range(8))
def test_misaligned_tensors_are_copied(shift: int) -> None:
    expected = torch.arange(4)
    message = data_pb2.WriteRowsRequest(array="x" * shift)
    message.ids.CopyFrom(tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT64, shape=[4], inline=expected.numpy().tobytes()))
    (tensor,) = decode_frame(message.SerializeToString(), data_pb2.WriteRowsRequest())["ids"]
    assert tensor.data_ptr() % 8 == 0
    assert torch.equal(tensor, expected)


def test_tensors_keep_the_frame_alive() -> None:
    tensors = []
    for number in range(50):
        frame = encode_frame(data_pb2.GatherReply(), {"values": torch.full((1000,), float(number))})
        tensors += decode_frame(frame, data_pb2.GatherReply())["values"]
        del frame
    for number, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full((1000,), float(number)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).view(3, 4).T,
        torch.arange(12)[::3],
        torch.arange(12)[5:6],
        torch.arange(12).view(4, 3)[:1, 1:2],
        torch.ones(2, 3, requires_grad=True),
        torch.ones(()),
        torch.ones(0, 7),
        torch.ones(1).expand(5),
    ],
    ids=["transposed", "strided", "one", "one of a matrix", "parameter", "scalar", "empty", "expanded"],
)
def test_any_memory_layout_is_sent(tensor: torch.Tensor) -> None:
    frame = encode_frame(data_pb2.ReadRowsReply(), {"rows": tensor})
    (found,) = decode_frame(frame, data_pb2.ReadRowsReply())["rows"]
    assert found.shape == tensor.shape
    assert torch.equal(found, tensor.detach())


def test_repeated_tensors_keep_their_order() -> None:
    arrays = [torch.full((n, 2), n, dtype=torch.int32) for n in range(5)]
    header = shard_pb2.ExportPagesReply(array_names=list("abcde"))
    frame = encode_frame(header, {"arrays": arrays, "row_pages": torch.arange(3)})
    found = decode_frame(frame, header := shard_pb2.ExportPagesReply())
    assert list(header.array_names) == list("abcde")
    assert [tensor.tolist() for tensor in found["arrays"]] == [tensor.tolist() for tensor in arrays]


def test_fields_may_come_in_any_order() -> None:
    scalars = data_pb2.GatherRequest(lookup_id=5, release=[7, 8]).SerializeToString()
    tensor = ids_frame(good_tensor())
    message = data_pb2.GatherRequest()
    found = decode_frame(tensor + scalars[:2] + scalars[2:], message)
    assert (message.lookup_id, list(message.release)) == (5, [7, 8])
    assert found["ids"][0].tolist() == [0, 1]


def test_unknown_fields_are_passed_over() -> None:
    unknown = tensor_field(999, b"later") + ids_frame(good_tensor()) + b"\x79" + bytes(8) + b"\x7d" + bytes(4)
    assert decode(unknown)["ids"][0].tolist() == [0, 1]


def test_shape_may_be_unpacked() -> None:
    payload = b"\x08\x05" + b"\x10\x01\x10\x02" + b"\x22\x10" + np.arange(2).tobytes()
    assert decode(tensor_field(32, payload))["ids"][0].shape == (1, 2)


HEAD = b"\x08\x05\x12\x01\x02"
BODY = b"\x22\x10" + bytes(16)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (tensor_field(32, HEAD + BODY)[:-1], r"GatherRequest is cut off: field 32 runs to byte 26 of 25"),
        (tensor_field(32, HEAD + BODY[:-1]), r"GatherRequest\.ids is cut off: field 4 runs to byte"),
        (
            tensor_field(32, HEAD + b"\x22\x0f" + bytes(15)),
            r"ids has a body of 15 bytes; shape \[2\] of int64 takes 16",
        ),
        (tensor_field(32, HEAD), r"ids has a body of 0 bytes; shape \[2\]"),
        (tensor_field(32, b"\x12\x01\x02" + BODY), r"ids has unknown dtype 0; known are 1 to 8 \(float32, "),
        (tensor_field(32, b"\x08\x63\x12\x01\x02" + BODY), r"ids has unknown dtype 99"),
        (tensor_field(32, b"\x08\x05" + HEAD + BODY), r"ids\.dtype is there twice"),
        (tensor_field(32, HEAD + BODY + BODY), r"ids\.inline is there twice"),
        (tensor_field(32, b"\x08\x05\x12\x0a" + b"\xff" * 9 + b"\x01" + BODY), r"ids\.shape has 18446744073709551615"),
        (tensor_field(32, b"\x08\x05\x12\x0b" + b"\xff" * 10 + b"\x01" + BODY), r"longer than 64 bits"),
        (
            tensor_field(32, b"\x08\x05\x12\x09" + b"\x01" * 9 + b"\x22\x08" + bytes(8)),
            r"ids has 9 dimensions; at most 8",
        ),
        (tensor_field(32, b"\x08\x05\x15\x01\x00\x00\x00" + BODY), r"ids\.shape has wire type 5"),
        (tensor_field(32, HEAD + BODY) * 2, r"GatherRequest\.ids is there twice"),
        (b"\x80\x02\x05", r"GatherRequest\.ids has wire type 0"),
        (b"\x80\x02", r"GatherRequest is cut off in a number"),
        (b"\x82", r"GatherRequest is cut off in a number"),
        (b"\x00\x01", r"field number 0"),
        (b"\x0b\x0c", r"wire type 3"),
        (b"\xff" * 11, r"longer than 64 bits"),
        (b"\x0a\x02\x08", r"GatherRequest is cut off: field 1"),
        (b"\x0a\x01\x08", r"GatherRequest is malformed"),
        (b"\x10" * 2 * 70_000, r"more than 1,024 fields"),
        (b"\x22\x80\x80\x80\x04" + bytes(2**23), r"8,388,613 bytes besides its tensors; at most 4,194,304"),
    ],
)
def test_what_is_wrong_is_named(frame: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decode(frame)


@pytest.mark.parametrize("size", [2**32 - 1, 2**31])  # of 8 bytes each: numpy cannot hold the second
def test_a_huge_shape_without_elements_is_refused(size: int) -> None:
    huge = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT64, shape=[size, size, 0], inline=b"")
    with pytest.raises(InvalidRequest, match="beyond 64-bit sizes"):
        decode(ids_frame(huge))


def test_tensors_are_fields_from_32_and_nothing_else_is() -> None:
    framed = 0
    for file in (data_pb2, shard_pb2):
        for message in file.DESCRIPTOR.message_types_by_name.values():
            slots = tensor_slots(message)
            framed += bool(slots)
            for field in message.fields:
                assert (field.number >= frames.FIRST_TENSOR_FIELD) == (field.number in slots), field.full_name
    assert framed == 16


def test_padding_is_passed_over_and_there_once() -> None:
    tensor = good_tensor()
    tensor.padding = b"any"
    (ids,) = decode(ids_frame(tensor))["ids"]
    assert ids.tolist() == [0, 1]
    twice = tensor.SerializeToString() + tensor_pb2.Tensor(padding=b"x").SerializeToString()
    with pytest.raises(InvalidRequest, match=r"ids\.padding is there twice"):
        decode(tensor_field(32, twice))
    with pytest.raises(InvalidRequest, match=r"ids\.padding .* is not bytes"):
        decode(tensor_field(32, good_tensor().SerializeToString() + bytes((3 << 3, 1))))
