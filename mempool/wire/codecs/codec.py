"""What a codec is, and the two kinds there are: messages with tensors as frames, messages of scalars by protobuf.

Leaves the fields of each message to ``messages``, ``tables``, ``pages`` and ``lookup``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from mempool.errors import InvalidRequest, MempoolError
from mempool.types.messages import ReplyDtype
from mempool.wire.bodies.frames import decode_frame, encode_frame
from mempool.wire.bodies.tensors import dtype_name
from mempool.wire.v1 import tensor_pb2

T = TypeVar("T")
MessageT = TypeVar("MessageT", bound=Message)


class Codec(Protocol[T]):
    """Turns values of one type into bytes and back."""

    @property
    def name(self) -> str:
        """Name of the message on the wire."""

    def encode(self, value: T, *, narrow_ids: bool = False) -> bytes:
        """The bytes of a value.

        Args:
            value: What to send.
            narrow_ids: Send slot ids as uint32. The caller has made sure that they are in [0, 2^32). Other messages
                than those with slot ids are not affected.

        Raises:
            InvalidRequest: The value has no place in the message.
        """

    def decode(self, frame: bytes | memoryview) -> T:
        """The value of some bytes. Tensors are views of ``frame``, which nobody may write to.

        Raises:
            InvalidRequest: The bytes are malformed or lack something; the message names the field.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorField:
    """What a tensor of a message must be. Dtypes () accepts all that travel; ids may be narrowed."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    ids: bool = False

    def check(self, value: Tensor, where: str) -> None:
        """Raises InvalidRequest for another dtype or number of dimensions."""
        if self.dtypes and value.dtype not in self.dtypes:
            expected = " or ".join(map(dtype_name, self.dtypes))
            raise InvalidRequest(f"{where} has dtype {dtype_name(value.dtype)}; expected {expected}")
        if value.ndim not in self.dims:
            expected = " or ".join(map(str, self.dims))
            raise InvalidRequest(f"{where} has shape {list(value.shape)}; expected {expected} dimensions")


SLOT_IDS = TensorField(dtypes=(torch.int64, torch.uint32), ids=True)
INT64 = TensorField(dtypes=(torch.int64,))


@dataclass(frozen=True, slots=True, eq=False)
class FrameCodec(Generic[T, MessageT]):
    """A message with tensors.

    Attributes:
        message: The generated class.
        pack: Makes the message of a value, without its tensors.
        unpack: Makes the value of a message and its tensors, by field name; absent ones are absent.
        tensors: The tensor fields, which are attributes (tensors or arrays) of the value by the same names.
    """

    message: type[MessageT]
    pack: Callable[[T], MessageT]
    unpack: Callable[[MessageT, Mapping[str, Tensor]], T]
    tensors: Mapping[str, TensorField] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.message.DESCRIPTOR.name

    def encode(self, value: T, *, narrow_ids: bool = False) -> bytes:
        header = packed(self.pack, value, self.name)
        tensors: dict[str, Tensor] = {}
        for name, spec in self.tensors.items():
            attribute: Tensor | npt.NDArray[np.int64] | None = getattr(value, name)
            if attribute is None:
                continue
            tensor = attribute if isinstance(attribute, Tensor) else torch.from_numpy(np.array(attribute))
            spec.check(tensor, f"{self.name}.{name}")
            tensors[name] = narrowed(tensor) if narrow_ids and spec.ids else tensor
        return encode_frame(header, tensors)

    def decode(self, frame: bytes | memoryview) -> T:
        header = self.message()
        found = decode_frame(frame, header)
        tensors: dict[str, Tensor] = {}
        for name, spec in self.tensors.items():
            where = f"{self.name}.{name}"
            if name in found:
                (tensors[name],) = found[name]
                spec.check(tensors[name], where)
            elif not spec.optional:
                raise InvalidRequest(f"{where} is missing")
        return self.unpack(header, tensors)


@dataclass(frozen=True, slots=True, eq=False)
class ProtoCodec(Generic[T, MessageT]):
    """A message that goes through protobuf whole."""

    message: type[MessageT]
    pack: Callable[[T], MessageT]
    unpack: Callable[[MessageT], T]

    @property
    def name(self) -> str:
        return self.message.DESCRIPTOR.name

    def encode(self, value: T, *, narrow_ids: bool = False) -> bytes:  # noqa: ARG002
        return packed(self.pack, value, self.name).SerializeToString(deterministic=True)

    def decode(self, frame: bytes | memoryview) -> T:
        return self.unpack(parsed(self.message, frame))


def narrowed(ids: Tensor) -> Tensor:
    """Slot ids as uint32, by numpy: torch would wake its thread pool, which takes milliseconds on a busy host."""
    return torch.from_numpy(ids.detach().cpu().numpy().astype(np.uint32))


def parsed(message: type[MessageT], frame: bytes | memoryview) -> MessageT:
    """A message parsed by protobuf. Raises InvalidRequest."""
    try:
        return message.FromString(bytes(frame))
    except DecodeError as error:
        raise InvalidRequest(f"{message.DESCRIPTOR.name} is malformed: {error}") from None


def packed(pack: Callable[[T], MessageT], value: T, name: str) -> MessageT:
    """The message of a value. Raises InvalidRequest where a number does not fit its field."""
    try:
        return pack(value)
    except MempoolError:
        raise
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{name} cannot be sent: {error}") from None


def require(message: Message, *names: str) -> None:
    """Raises InvalidRequest for a field that is missing, where presence can be told (messages)."""
    for name in names:
        if not message.HasField(name):
            raise InvalidRequest(f"{message.DESCRIPTOR.name}.{name} is missing")


def choice(names: Mapping[int, T], number: int, where: str) -> T:
    """The value an enum's number stands for. Raises InvalidRequest for a number that is not known."""
    try:
        return names[number]
    except KeyError:
        known = ", ".join(f"{known} ({name})" for known, name in names.items())
        raise InvalidRequest(f"{where} is {number}; expected one of {known}") from None


FLOAT_DTYPES: Mapping[Literal["float32", "bfloat16"], tensor_pb2.Dtype.ValueType] = {
    "float32": tensor_pb2.DTYPE_FLOAT32,
    "bfloat16": tensor_pb2.DTYPE_BFLOAT16,
}
_REPLY_DTYPES: Mapping[int, ReplyDtype] = {
    tensor_pb2.DTYPE_UNSPECIFIED: "float32",
    tensor_pb2.DTYPE_FLOAT32: "float32",
    tensor_pb2.DTYPE_BFLOAT16: "bfloat16",
}


def reply_dtype(number: int, where: str) -> ReplyDtype:
    """What a reply's values are to be sent as; float32 where the request does not say."""
    return choice(_REPLY_DTYPES, number, where)
