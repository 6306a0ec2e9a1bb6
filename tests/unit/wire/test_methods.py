"""Every message of every call: byte-identical with protobuf's own encoder, the same value back, and never a crash."""

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.errors import Internal, InvalidRequest
from mempool.wire import methods
from mempool.wire.codecs.codec import Codec
from mempool.wire.methods import Method
from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2, tensor_pb2

from .values import CASES

SIDES = [
    pytest.param(codec, message, values, id=codec.name)
    for method, (request, requests, reply, replies) in CASES.items()
    for codec, message, values in ((method.request, request, requests), (method.reply, reply, replies))
]


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, Mapping):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def tensors_of(message: Message) -> list[tensor_pb2.Tensor]:
    """The message's own tensors, not those of messages inside it."""
    found: list[tensor_pb2.Tensor] = []
    for field, value in message.ListFields():
        if field.message_type is tensor_pb2.Tensor.DESCRIPTOR:
            found += value if field.is_repeated else [value]
    return found


@pytest.mark.parametrize(("codec", "message", "values"), SIDES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_bytes_are_protobufs_own(
    codec: Codec[Any], message: type[Message], values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    value = data.draw(values)
    frame = codec.encode(value)
    parsed = message.FromString(frame)
    # What is sent is what protobuf makes of the same message ...
    assert parsed.SerializeToString(deterministic=True) == frame
    assert_same(codec.decode(frame), value)
    # ... and what protobuf sends without knowing of padding is read.
    for tensor in tensors_of(parsed):
        tensor.ClearField("padding")
    plain = parsed.SerializeToString(deterministic=True)
    assert_same(codec.decode(memoryview(plain)), value)


@pytest.mark.parametrize(("codec", "message", "values"), SIDES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_broken_bytes_are_refused_or_read_as_protobuf_reads_them(
    codec: Codec[Any], message: type[Message], values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    broken = bytearray(codec.encode(data.draw(values)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(broken)))
        kind = data.draw(st.sampled_from(["cut", "set", "insert", "delete", "double"]))
        if kind == "cut":
            del broken[at:]
        elif kind == "set" and at < len(broken):
            broken[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            broken[at:at] = data.draw(st.binary(max_size=12))
        elif kind == "delete":
            del broken[at : at + data.draw(st.integers(1, 8))]
        else:
            broken += broken[at:]
    try:
        value = codec.decode(bytes(broken))
    except InvalidRequest:
        return
    # Accepted: then protobuf accepts it too, and another round trip changes nothing.
    message.FromString(bytes(broken))
    assert repr(codec.decode(codec.encode(value))) == repr(value)


@given(junk=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_junk_raises_nothing_but_invalid_request(junk: bytes) -> None:
    for method in CASES:
        for codec in (method.request, method.reply):
            with contextlib.suppress(InvalidRequest):
                codec.decode(junk)


def test_every_rpc_has_its_method() -> None:
    services = [
        file.DESCRIPTOR.services_by_name[name]
        for file, name in ((data_pb2, "MemoryService"), (shard_pb2, "ShardService"), (pool_pb2, "PoolService"))
    ]
    expected = {
        f"/{service.full_name}/{rpc.name}": (rpc.input_type.name, rpc.output_type.name, rpc.server_streaming)
        for service in services
        for rpc in service.methods
    }
    found = {method.path: (method.request.name, method.reply.name, method.streams) for method in CASES}
    assert found == expected
    assert {value for value in vars(methods).values() if isinstance(value, Method)} == set(CASES)


def test_a_malformed_reply_is_no_fault_of_the_caller() -> None:
    with pytest.raises(Internal, match=r"answer to Gather cannot be read: GatherReply\.values is missing"):
        methods.GATHER.decode_reply(b"")


def test_controllers_messages_need_no_torch() -> None:
    script = """
import sys
import numpy as np
from mempool.types import *
from mempool.wire import methods
from mempool.wire.codecs.pages import SetView

view = TableView(
    schema=TableSchema(table_id=1, name="t", num_slots=8, value_dim=4, block_dim=4, page_slots=8, dtype="float32",
                       seed=0, init_std=0.1, stride=0, layout="auto", optimizer=OptimizerSpec(algorithm="sgd", lr=0.1)),
    placement=Placement(table_id=1, epoch=1, owners=np.zeros((1, 1), np.int32), key_owners=np.zeros(0, np.int32)),
    shards=(),
)
source = ShardInfo(shard=0, address="a:1", incarnation=1)
pull = PullPages(table_id=1, source=source, row_pages=np.arange(3), blocks=(0,))
for codec, value in ((methods.SET_VIEW.request, SetView(view=view, token="r")), (methods.PULL_PAGES.request, pull)):
    assert codec.encode(codec.decode(codec.encode(value))) == codec.encode(value)
import mempool.server, mempool.wire.channels.grpc_channel
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
