"""Tensors as the wire has them: dtypes, bodies as views of memory, ``Tensor`` messages of the control path.

Leaves it to ``frames`` where in a message a tensor lies. For little-endian hosts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.wire.v1 import tensor_pb2

AnyArray = npt.NDArray[np.generic]
TensorLike = Tensor | AnyArray

MAX_DIMS = 8

DTYPES: dict[torch.dtype, tensor_pb2.Dtype.ValueType] = {
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
    torch.float16: tensor_pb2.DTYPE_FLOAT16,
    torch.float64: tensor_pb2.DTYPE_FLOAT64,
    torch.int64: tensor_pb2.DTYPE_INT64,
    torch.int32: tensor_pb2.DTYPE_INT32,
    torch.uint32: tensor_pb2.DTYPE_UINT32,
    torch.uint8: tensor_pb2.DTYPE_UINT8,
}
_TORCH_DTYPES: dict[int, torch.dtype] = {int(number): dtype for dtype, number in DTYPES.items()}
_NUMPY_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint32": torch.uint32,
    "uint8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Body:
    """A tensor about to be sent: its wire dtype, shape, and elements as a view of the tensor's own memory."""

    dtype: int
    itemsize: int
    shape: tuple[int, ...]
    view: memoryview


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32, and so on: the name users know a dtype by."""
    return str(dtype).removeprefix("torch.")


def body_of(value: TensorLike, field: str) -> Body:
    """The elements of a tensor or array for sending, copied only where not contiguous, or on another device.

    Raises:
        InvalidRequest: The dtype has no place on the wire, or there are too many dimensions.
    """
    if isinstance(value, Tensor):
        dtype = value.dtype
        shape = tuple(value.shape)
    else:
        known = _NUMPY_DTYPES.get(value.dtype.name)
        if known is None:
            raise InvalidRequest(f"{field} has dtype {value.dtype.name}; tensors travel as {_names()}")
        dtype = known
        shape = value.shape
    number = DTYPES.get(dtype)
    if number is None:
        raise InvalidRequest(f"{field} has dtype {dtype_name(dtype)}; tensors travel as {_names()}")
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(f"{field} has {len(shape)} dimensions; at most {MAX_DIMS} travel")
    if 0 in shape:
        view = memoryview(b"")
    elif isinstance(value, Tensor):
        # A dimension of one element is contiguous whatever its stride is, but torch then refuses to see it as bytes.
        whole = value.detach().cpu().contiguous()
        view = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data
    else:
        view = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    return Body(dtype=int(number), itemsize=dtype.itemsize, shape=shape, view=view)


def checked_dtype(number: int, shape: Sequence[int], num_bytes: int, field: str) -> torch.dtype:
    """The dtype that a received header names, once shape and length of the body are found to agree with it.

    Raises:
        InvalidRequest: Unknown dtype, too many dimensions, or a body that is not exactly shape x dtype.
    """
    dtype = _TORCH_DTYPES.get(number)
    if dtype is None:
        raise InvalidRequest(f"{field} has unknown dtype {number}; known are 1 to {len(_TORCH_DTYPES)} ({_names()})")
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(f"{field} has {len(shape)} dimensions; at most {MAX_DIMS} are accepted")
    expected = math.prod(shape) * dtype.itemsize
    if expected != num_bytes:
        raise InvalidRequest(
            f"{field} has a body of {num_bytes:,} bytes; shape {list(shape)} of {dtype_name(dtype)} takes {expected:,}"
        )
    # An empty tensor takes no bytes whatever its other dimensions are, but torch cannot hold every such shape.
    if not num_bytes and math.prod(size for size in shape if size) >= 2**63:
        raise InvalidRequest(f"{field} has shape {list(shape)}, which is beyond 64-bit sizes")
    return dtype


class WritableView:
    """Memory of a received frame for numpy, declared writable: torch warns, once per process, of memory that is not.

    Tensors made of it share the frame's memory and keep the frame alive. Nobody may write to them.
    """

    __slots__ = ("__array_interface__", "frame")

    def __init__(self, frame: bytes | memoryview) -> None:
        interface = np.frombuffer(frame, np.uint8).__array_interface__
        address: int = interface["data"][0]
        self.frame = frame
        self.__array_interface__ = {"data": (address, False), "shape": (len(frame),), "typestr": "|u1", "version": 3}


def frame_memory(frame: bytes | memoryview) -> npt.NDArray[np.uint8]:
    """A received frame as an array of bytes that shares its memory: read only, whatever its flags say."""
    if not len(frame):
        return np.empty(0, np.uint8)
    return np.asarray(WritableView(frame))


def tensor_at(memory: npt.NDArray[np.uint8], at: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor whose elements begin at byte ``at``: a view of ``memory``, or a copy where they are misaligned."""
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    if (memory.ctypes.data + at) % dtype.itemsize:
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=count * dtype.itemsize, offset=at).clone().view(dtype)
    else:
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=at)
    return flat.view(tuple(shape))


def tensor_to_message(value: TensorLike, field: str) -> tensor_pb2.Tensor:
    """A whole ``Tensor`` message, copied: for the control path, where messages go through protobuf itself."""
    body = body_of(value, field)
    return tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.ValueType(body.dtype), shape=body.shape, inline=bytes(body.view))


def array_from_message(message: tensor_pb2.Tensor, field: str, dtype: npt.DTypeLike, num_dims: int) -> AnyArray:
    """The array in a ``Tensor`` message, copied.

    Raises:
        InvalidRequest: The message is malformed, or has another dtype or number of dimensions than expected.
    """
    found = checked_dtype(int(message.dtype), message.shape, len(message.inline), field)
    expected = np.dtype(dtype)
    if _NUMPY_DTYPES.get(expected.name) is not found or len(message.shape) != num_dims:
        raise InvalidRequest(
            f"{field} is {dtype_name(found)} {list(message.shape)}; expected {expected.name} in {num_dims} dimensions"
        )
    return np.frombuffer(message.inline, expected).reshape(tuple(message.shape)).copy()


def _names() -> str:
    return ", ".join(dtype_name(dtype) for dtype in DTYPES)
