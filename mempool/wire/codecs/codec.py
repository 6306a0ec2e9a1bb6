"""What a codec is, and the two kinds there are: messages with tensors as frames, messages of scalars by protobuf.

Leaves the fields of each message to ``messages``, ``tables``, ``pages`` and ``lookup``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from mempool.errors import InvalidRequest, MempoolError
from mempool.wire.bodies.frames import decode_frame, parts_of, slot_numbers
from mempool.wire.bodies.tensors import (
    Body,
    Dtype,
    FrameMemory,
    Part,
    array_of,
    body_of,
    checked_dtype,
    owned_tensor,
    wire_dtype,
)
from mempool.wire.codecs.mirror import Choice, Converter, Mirror
from mempool.wire.v1 import tensor_pb2

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
MessageT = TypeVar("MessageT", bound=Message)
AnyTensor: TypeAlias = "Tensor | npt.NDArray[np.generic]"

SMALL_FRAME_BYTES = 80 * 2**10
"""Read whole by protobuf, which copies their tensors: that takes less time than finding them here."""
MAX_SMALL_BYTES = 64 * 2**10
"""Of a request that has no list of any length in it."""


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

    def parts(self, value: T, *, narrow_ids: bool = False) -> list[bytes | memoryview]:
        """As ``encode``, in parts: tensors that are contiguous, on the CPU, are not copied."""

    def tensor_bytes(self, value: T) -> int:
        """Bytes of the tensors of a value, 0 for a message that has none: nearly what ``encode`` makes of it."""

    def decode(self, frame: bytes | memoryview) -> T:
        """The value of some bytes. Tensors are views of ``frame``, which nobody may write to.

        Raises:
            InvalidRequest: The bytes are malformed or lack something; the message names the field.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorField:
    """What a tensor of a message must be.

    Attributes:
        dtypes: Names; () accepts all that travel.
        dims: Numbers of dimensions.
        optional: It may be absent; None then.
        ids: Slot ids, which may be narrowed.
        array: The value has a numpy array of its own, not a tensor.
    """

    dtypes: tuple[str, ...] = ("float32",)
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    ids: bool = False
    array: bool = False

    def check(self, dtype: str, shape: Sequence[int], where: str) -> None:
        """Raises InvalidRequest for another dtype or number of dimensions."""
        if self.dtypes and dtype not in self.dtypes:
            raise InvalidRequest(f"{where} has dtype {dtype}; expected {' or '.join(self.dtypes)}")
        if len(shape) not in self.dims:
            expected = " or ".join(map(str, self.dims))
            raise InvalidRequest(f"{where} has shape {list(shape)}; expected {expected} dimensions")


class _Field(NamedTuple):
    """A tensor field of a message: its number and name, what errors call it, what its tensor must be, and what finds
    that of a received header."""

    number: int
    name: str
    where: str
    spec: TensorField
    checked: Callable[[int, tuple[int, ...], int], Dtype]


def _checking(spec: TensorField, where: str) -> Callable[[int, tuple[int, ...], int], Dtype]:
    """Checks number of the dtype, shape and length of the body of a received tensor. What was found right is known
    from then on: calls have the same shapes again and again."""

    @lru_cache(maxsize=256)
    def checked(number: int, shape: tuple[int, ...], num_bytes: int) -> Dtype:
        dtype = checked_dtype(number, shape, num_bytes, where)
        spec.check(dtype.name, shape, where)
        return dtype

    return checked


SLOT_IDS = TensorField(dtypes=("int64", "uint32"), ids=True)
INT64 = TensorField(dtypes=("int64",))
NUMBERS = TensorField(dtypes=("int64",), array=True)
PER_HEAD = TensorField(dims=(3,))


@dataclass(frozen=True, slots=True, eq=False)
class FrameCodec(Generic[T, MessageT]):
    """A message with tensors.

    Attributes:
        mirror: Its scalars.
        tensors: Its tensor fields, which are attributes of the value by the same names.
    """

    mirror: Mirror[T, MessageT]
    tensors: Mapping[str, TensorField] = field(default_factory=dict)
    name: str = field(init=False)
    _fields: tuple[_Field, ...] = field(init=False)

    def __post_init__(self) -> None:
        descriptor = self.mirror.message.DESCRIPTOR
        numbers = slot_numbers(descriptor)
        fields = (
            _Field(numbers[name], name, f"{descriptor.name}.{name}", spec, _checking(spec, f"{descriptor.name}.{name}"))
            for name, spec in self.tensors.items()
        )
        object.__setattr__(self, "name", descriptor.name)
        object.__setattr__(self, "_fields", tuple(sorted(fields, key=lambda one: one.number)))

    def encode(self, value: T, *, narrow_ids: bool = False) -> bytes:
        return b"".join(self.parts(value, narrow_ids=narrow_ids))

    def parts(self, value: T, *, narrow_ids: bool = False) -> list[bytes | memoryview]:
        header = packed(self.mirror.to_message, value, self.name)
        bodies: list[tuple[int, Body]] = []
        for number, name, where, spec, _ in self._fields:
            tensor: AnyTensor | None = getattr(value, name)
            if tensor is None:
                continue
            spec.check(wire_dtype(tensor, where).name, tensor.shape, where)
            bodies.append((number, body_of(narrowed(tensor) if narrow_ids and spec.ids else tensor, where)))
        return parts_of(header, bodies)

    def tensor_bytes(self, value: T) -> int:
        num_bytes = 0
        for name in self.tensors:
            tensor = getattr(value, name)
            if tensor is not None:
                num_bytes += tensor.nbytes
        return num_bytes

    def decode(self, frame: bytes | memoryview) -> T:
        if len(frame) <= SMALL_FRAME_BYTES and (small := self._small(bytes(frame))) is not None:
            return small
        header = self.mirror.message()
        found = decode_frame(frame, header)
        memory = FrameMemory(frame) if found else None
        tensors: dict[str, Any] = {}
        for _, name, where, spec, _ in self._fields:
            tensors[name] = None
            if name in found and memory is not None:
                tensors[name] = tensor_of(found[name][0], spec, memory, where)
            elif not spec.optional:
                raise InvalidRequest(f"{where} is missing")
        return self.mirror.from_message(header, **tensors)

    def _small(self, frame: bytes) -> T | None:
        """The value of a frame that protobuf reads whole, copying the tensors, in less time than it takes to find them
        here. None for one that is wrong in any way: who reads it with care says how."""
        try:
            message = self.mirror.message.FromString(frame)
        except DecodeError:
            return None
        tensors: dict[str, Any] = {}
        for _, name, _, spec, checked in self._fields:
            if not message.HasField(name):
                if not spec.optional:
                    return None
                tensors[name] = None
                continue
            tensor = getattr(message, name)
            body, shape = bytearray(tensor.inline), tuple(tensor.shape)
            dtype = checked(tensor.dtype, shape, len(body))
            tensors[name] = array_of(body, dtype, shape) if spec.array else owned_tensor(body, dtype, shape)
        return self.mirror.from_message(message, **tensors)


@dataclass(frozen=True, slots=True, eq=False)
class ProtoCodec(Generic[T, MessageT]):
    """A message that goes through protobuf whole.

    Attributes:
        mirror: The message of a value, and back.
        max_bytes: Larger ones are refused unread; None: the limit of all messages.
    """

    mirror: Mirror[T, MessageT] | Only[T, MessageT]
    max_bytes: int | None = None

    @property
    def name(self) -> str:
        return self.mirror.message.DESCRIPTOR.name

    def encode(self, value: T, *, narrow_ids: bool = False) -> bytes:  # noqa: ARG002
        return packed(self.mirror.to_message, value, self.name).SerializeToString(deterministic=True)

    def parts(self, value: T, *, narrow_ids: bool = False) -> list[bytes | memoryview]:
        return [self.encode(value, narrow_ids=narrow_ids)]

    def tensor_bytes(self, value: T) -> int:  # noqa: ARG002
        return 0

    def decode(self, frame: bytes | memoryview) -> T:
        if self.max_bytes is not None and len(frame) > self.max_bytes:
            raise InvalidRequest(f"{self.name} has {len(frame):,} bytes; at most {self.max_bytes:,} are taken")
        return self.mirror.from_message(parsed(self.mirror.message, frame))


class Only(Generic[T, MessageT]):
    """A message of one field, whose value stands for it alone. As a ``Mirror``.

    Args:
        message: The generated class.
        name: The field; None: the message has none, and its value is None.
        converter: Of the field, where it needs one.
    """

    def __init__(self, message: type[MessageT], name: str | None = None, converter: Converter | None = None) -> None:
        self.message = message
        self._name = name
        self._mirror: Mirror[Any, MessageT] = Mirror(
            message, dict, {} if converter is None or name is None else {name: converter}
        )

    def to_message(self, value: T) -> MessageT:
        only = SimpleNamespace() if self._name is None else SimpleNamespace(**{self._name: value})
        return self._mirror.to_message(only)

    def from_message(self, message: MessageT) -> T:
        found: dict[str | None, Any] = self._mirror.from_message(message)
        only: T = found.get(self._name)  # type: ignore[assignment]
        return only


def tensor_of(part: Part, spec: TensorField, memory: FrameMemory, where: str) -> AnyTensor:
    """A received tensor, checked. Raises InvalidRequest."""
    spec.check(part.dtype.name, part.shape, where)
    return memory.array(part) if spec.array else memory.tensor(part)


def narrowed(ids: AnyTensor) -> npt.NDArray[np.uint32]:
    """Slot ids as uint32, by numpy: torch would wake its thread pool, which takes milliseconds on a busy host."""
    wide = ids if isinstance(ids, np.ndarray) else ids.detach().cpu().numpy()
    return wide.astype(np.uint32, copy=False)


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


_WHOLE = {"float32": tensor_pb2.DTYPE_FLOAT32, "bfloat16": tensor_pb2.DTYPE_BFLOAT16}
REPLY_DTYPE: Choice[str] = Choice(_WHOLE, absent="float32")
"""What a reply's values are to be sent as; float32 where the request does not say."""
SUMS_DTYPE: Choice[str] = Choice(_WHOLE | {"float8_e4m3fn": tensor_pb2.DTYPE_FLOAT8_E4M3FN}, absent="float32")
"""The same of a shard's sums, which may be packed rows."""
