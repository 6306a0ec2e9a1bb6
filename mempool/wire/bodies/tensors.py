"""Tensors as the wire has them: dtypes, bodies as views of memory, ``Tensor`` messages of the control path.

Leaves it to ``frames`` where in a message a tensor lies. For little-endian hosts. Torch is loaded by the first tensor
alone: a controller has arrays only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mempool.errors import InvalidRequest
from mempool.wire.v1 import tensor_pb2

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AnyArray: TypeAlias = "npt.NDArray[np.generic]"
TensorLike: TypeAlias = "Tensor | AnyArray"

MAX_DIMS = 8


class Dtype(NamedTuple):
    """A dtype that travels, by torch's name and numpy's."""

    name: str
    number: int
    itemsize: int


DTYPES: dict[str, Dtype] = {
    name: Dtype(name, number, itemsize)
    for name, number, itemsize in (
        ("float32", tensor_pb2.DTYPE_FLOAT32, 4),
        ("bfloat16", tensor_pb2.DTYPE_BFLOAT16, 2),
        ("float16", tensor_pb2.DTYPE_FLOAT16, 2),
        ("float64", tensor_pb2.DTYPE_FLOAT64, 8),
        ("int64", tensor_pb2.DTYPE_INT64, 8),
        ("int32", tensor_pb2.DTYPE_INT32, 4),
        ("uint32", tensor_pb2.DTYPE_UINT32, 4),
        ("uint8", tensor_pb2.DTYPE_UINT8, 1),
    )
}
_BY_NUMBER: dict[int, Dtype] = {dtype.number: dtype for dtype in DTYPES.values()}


class Part(NamedTuple):
    """A received tensor: where in the frame its elements lie, found to be exactly those of shape and dtype."""

    dtype: Dtype
    shape: tuple[int, ...]
    at: int


class Body(NamedTuple):
    """A tensor about to be sent: its dtype, shape, and elements as a view of the tensor's own memory."""

    dtype: Dtype
    shape: tuple[int, ...]
    view: memoryview


def dtype_name(dtype: torch.dtype | np.dtype[np.generic]) -> str:
    """ "float32" for torch.float32 and numpy's, and so on: the name users know a dtype by."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def wire_dtype(value: TensorLike, field: str) -> Dtype:
    """A tensor's or array's dtype. Raises InvalidRequest where it has no place on the wire."""
    dtype = _dtype(value.dtype)
    if dtype is None:
        raise InvalidRequest(f"{field} has dtype {dtype_name(value.dtype)}; tensors travel as {_names()}")
    return dtype


def body_of(value: TensorLike, field: str) -> Body:
    """The elements of a tensor or array for sending, copied only where not contiguous, or on another device.

    Raises:
        InvalidRequest: The dtype has no place on the wire, or there are too many dimensions.
    """
    dtype = wire_dtype(value, field)
    shape = value.shape
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(f"{field} has {len(shape)} dimensions; at most {MAX_DIMS} travel")
    if 0 in shape:
        return Body(dtype, shape, memoryview(b""))
    view = (value if isinstance(value, np.ndarray) else _array_of(value, dtype)).data
    if not view.c_contiguous:
        view = np.ascontiguousarray(view).data
    return Body(dtype, shape, view.cast("B"))


def _array_of(tensor: Tensor, dtype: Dtype) -> AnyArray:
    """A tensor's memory as an array; of bfloat16, which numpy does not know, as integers."""
    if tensor.requires_grad or not tensor.is_cpu:
        tensor = tensor.detach().cpu()
    if dtype.name == "bfloat16":
        import torch

        tensor = tensor.contiguous().view(torch.int16)
    array: AnyArray = tensor.numpy()
    return array


def checked_dtype(number: int, shape: Sequence[int], num_bytes: int, field: str) -> Dtype:
    """The dtype that a received header names, once shape and length of the body are found to agree with it.

    Raises:
        InvalidRequest: Unknown dtype, too many dimensions, or a body that is not exactly shape x dtype.
    """
    dtype = _BY_NUMBER.get(number)
    if dtype is None:
        raise InvalidRequest(f"{field} has unknown dtype {number}; known are 1 to {len(DTYPES)} ({_names()})")
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(f"{field} has {len(shape)} dimensions; at most {MAX_DIMS} are accepted")
    expected = math.prod(shape) * dtype.itemsize
    if expected != num_bytes:
        raise InvalidRequest(
            f"{field} has a body of {num_bytes:,} bytes; shape {list(shape)} of {dtype.name} takes {expected:,}"
        )
    # An empty tensor takes no bytes whatever its other dimensions are, but torch cannot hold every such shape.
    if not num_bytes and math.prod(size for size in shape if size) * dtype.itemsize >= 2**63:
        raise InvalidRequest(f"{field} has shape {list(shape)}, which is beyond 64-bit sizes")
    return dtype


class _Writable:
    """A frame as numpy sees it. Declared writable: torch warns, once per process, of memory that is not."""

    __slots__ = ("__array_interface__", "frame")

    def __init__(self, frame: bytes | memoryview, address: int) -> None:
        self.frame = frame
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (len(frame),),
            "typestr": "|u1",
            "version": 3,
        }


class FrameMemory:
    """Memory of a received frame, of which tensors and arrays are made. They share it and keep the frame alive.

    Nobody may write to it. Arrays keep the frame by an object of its own: a cycle through one is never collected.
    """

    __slots__ = ("_address", "_bytes")

    def __init__(self, frame: bytes | memoryview) -> None:
        self._address: int = np.frombuffer(frame, np.uint8).__array_interface__["data"][0] if len(frame) else 0
        self._bytes: npt.NDArray[np.uint8] = (
            np.asarray(_Writable(frame, self._address)) if len(frame) else np.empty(0, np.uint8)
        )

    def tensor(self, part: Part) -> Tensor:
        """A tensor: a view of the frame, or a copy where its elements are misaligned."""
        import torch

        dtype = _torch_dtypes()[part.dtype.name]
        count = math.prod(part.shape)
        if not count:
            return torch.empty(part.shape, dtype=dtype)
        if (self._address + part.at) % part.dtype.itemsize:
            # Copied by numpy: torch would set a team of threads to it, on the IO loop.
            size = count * part.dtype.itemsize
            flat = torch.frombuffer(self._bytes[part.at : part.at + size].copy(), dtype=dtype)
        else:
            flat = torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=part.at)
        return flat if len(part.shape) == 1 else flat.view(part.shape)

    def array(self, part: Part) -> AnyArray:
        """An array of its own, of a dtype that numpy knows."""
        size = math.prod(part.shape) * part.dtype.itemsize
        return self._bytes[part.at : part.at + size].copy().view(part.dtype.name).reshape(part.shape)


def owned_tensor(body: bytearray, dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of bytes that nobody else has, found to be exactly those of shape and dtype."""
    import torch

    if not body:
        return torch.empty(shape, dtype=_torch_dtypes()[dtype.name])
    if dtype.name != "bfloat16":  # which numpy does not know; of the others it makes a tensor in half the time
        return torch.from_numpy(array_of(body, dtype, shape))
    flat = torch.frombuffer(body, dtype=torch.bfloat16)
    return flat if len(shape) == 1 else flat.view(shape)


def array_of(body: bytearray, dtype: Dtype, shape: tuple[int, ...]) -> AnyArray:
    """The same as an array, of a dtype that numpy knows."""
    return np.ndarray(shape, dtype.name, body)


def tensor_to_message(value: TensorLike, field: str) -> tensor_pb2.Tensor:
    """A whole ``Tensor`` message, copied: for the control path, where messages go through protobuf itself."""
    body = body_of(value, field)
    return tensor_pb2.Tensor(
        dtype=tensor_pb2.Dtype.ValueType(body.dtype.number), shape=body.shape, inline=bytes(body.view)
    )


def array_from_message(message: tensor_pb2.Tensor, field: str, dtype: npt.DTypeLike, num_dims: int) -> AnyArray:
    """The array in a ``Tensor`` message, copied.

    Raises:
        InvalidRequest: The message is malformed, or has another dtype or number of dimensions than expected.
    """
    if len(message.shape) > MAX_DIMS:
        raise InvalidRequest(f"{field} has {len(message.shape)} dimensions; at most {MAX_DIMS} are accepted")
    shape = tuple(message.shape)
    found = checked_dtype(int(message.dtype), shape, len(message.inline), field)
    expected = np.dtype(dtype)
    if found.name != expected.name or len(shape) != num_dims:
        raise InvalidRequest(
            f"{field} is {found.name} {list(shape)}; expected {expected.name} in {num_dims} dimensions"
        )
    return np.frombuffer(message.inline, expected).reshape(shape).copy()


@cache
def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    return {name: getattr(torch, name) for name in DTYPES}


@cache
def _dtype(dtype: torch.dtype | np.dtype[np.generic]) -> Dtype | None:
    return DTYPES.get(dtype_name(dtype))


def _names() -> str:
    return ", ".join(DTYPES)
