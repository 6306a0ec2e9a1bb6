"""Bodies, dtypes and Tensor messages of the control path."""

import weakref

import numpy as np
import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.wire.bodies.tensors import (
    DTYPES,
    FrameMemory,
    Part,
    array_from_message,
    body_of,
    checked_dtype,
    tensor_to_message,
)
from mempool.wire.v1 import tensor_pb2


def test_every_dtype_of_the_proto_is_known() -> None:
    stored_only = {tensor_pb2.DTYPE_FLOAT8_E4M3FN, tensor_pb2.DTYPE_INT8}
    numbers = sorted(dtype.number for dtype in DTYPES.values())
    assert numbers == sorted(set(tensor_pb2.Dtype.values()) - stored_only - {0})
    for name, dtype in DTYPES.items():
        assert tensor_pb2.Dtype.Name(dtype.number) == "DTYPE_" + name.upper()  # type: ignore[arg-type]
        assert getattr(torch, name).itemsize == dtype.itemsize


def test_a_body_is_a_view() -> None:
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)
    body = body_of(tensor, "x")
    assert (body.shape, body.dtype) == ((2, 3), DTYPES["int32"])
    tensor[1, 2] = 77
    assert bytes(body.view) == tensor.numpy().tobytes()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, dtype=torch.bool), "rows has dtype bool; tensors travel as float32, "),
        (torch.ones(2, dtype=torch.complex64), "rows has dtype complex64"),
        (np.ones(2, np.int16), "rows has dtype int16"),
        (np.array(["a"]), "rows has dtype str32"),
        (torch.ones([1] * 9), "rows has 9 dimensions; at most 8"),
    ],
)
def test_what_cannot_travel_is_refused(value: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        body_of(value, "rows")


def test_read_only_arrays_are_sent_without_warning() -> None:
    array = np.arange(4)
    array.flags.writeable = False
    assert bytes(body_of(array, "x").view) == array.tobytes()


def test_arrays_come_back_from_messages() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T
    message = tensor_to_message(array, "owners")
    found = array_from_message(tensor_pb2.Tensor.FromString(message.SerializeToString()), "owners", np.int32, 2)
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable
    assert found.dtype == np.int32


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), np.int64), r"owners is int64 \[2, 2\]; expected int32 in 2 dimensions"),
        (np.zeros(2, np.int32), r"owners is int32 \[2\]; expected int32 in 2 dimensions"),
    ],
)
def test_another_kind_of_array_is_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        array_from_message(tensor_to_message(array, "owners"), "owners", np.int32, 2)


def test_a_body_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"ids has a body of 7 bytes; shape \[2, 3\] of float32 takes 24"):
        checked_dtype(tensor_pb2.DTYPE_FLOAT32, (2, 3), 7, "ids")


def test_tensors_are_the_frames_own_memory_and_arrays_are_not() -> None:
    frame = bytes(range(100))
    address = np.frombuffer(frame, np.uint8).ctypes.data
    part = Part(DTYPES["uint8"], (50, 2), 0)
    tensor = FrameMemory(frame).tensor(part)
    assert tensor.data_ptr() == address
    assert tensor.flatten().tolist() == list(range(100))
    array = FrameMemory(frame).array(part)
    np.testing.assert_array_equal(array, tensor.numpy())
    assert array.flags.writeable
    assert array.ctypes.data != address
    inner = FrameMemory(memoryview(frame)[3:50])
    assert inner.array(Part(DTYPES["uint8"], (47,), 0)).tolist() == list(range(3, 50))
    assert FrameMemory(b"").tensor(Part(DTYPES["int64"], (0, 7), 0)).shape == (0, 7)
    assert FrameMemory(b"").array(Part(DTYPES["int64"], (0, 7), 0)).shape == (0, 7)


def test_misaligned_arrays_are_read_too() -> None:
    frame = b"x" + np.arange(3).tobytes()
    assert FrameMemory(frame).array(Part(DTYPES["int64"], (3,), 1)).tolist() == [0, 1, 2]


def test_a_frame_lives_as_long_as_its_tensors() -> None:
    """Without the cyclic collector, which could not help: numpy's arrays do not tell it what they hold."""
    frame = memoryview(bytearray(64))
    known = weakref.ref(frame)
    memory = FrameMemory(frame)
    tensor = memory.tensor(Part(DTYPES["float32"], (4,), 0))
    del frame, memory
    assert known() is not None
    del tensor
    assert known() is None
