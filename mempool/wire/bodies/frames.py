"""Messages of the data path as frames: the bytes protobuf would make, written and read without copying tensors.

A frame is the message's scalars (fields below 32), made and parsed by the generated class, then its tensors (32 and
above), made and parsed here. Leaves to ``codec`` and ``messages`` what the fields mean.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.wire.bodies.tensors import Body, TensorLike, body_of, checked_dtype, frame_memory, tensor_at
from mempool.wire.v1 import tensor_pb2

FIRST_TENSOR_FIELD = 32
# What a frame may hold besides its tensors. More is no request of ours, and would keep the IO loop from its work.
MAX_HEADER_BYTES = 4 * 2**20
MAX_FIELDS = 65_536
MAX_TENSOR_FIELDS = 32

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_DTYPE, _SHAPE, _PADDING, _INLINE = 1, 2, 3, 4


class Field(NamedTuple):
    """One field as it lies in the frame: from ``start``, its payload from ``at`` to ``stop``; ``value`` of a varint."""

    number: int
    kind: int
    start: int
    at: int
    stop: int
    value: int


class Slot(NamedTuple):
    """A tensor field of a message class."""

    name: str
    repeated: bool


def encode_frame(header: Message, tensors: Mapping[str, TensorLike | Sequence[TensorLike]]) -> bytes:
    """One frame of a message.

    Args:
        header: The message with all its scalars and none of its tensors set.
        tensors: Field name -> tensor, or sequence of tensors for a repeated field. Absent names are not sent.

    Raises:
        InvalidRequest: A tensor's dtype or rank has no place on the wire.
    """
    message = header.DESCRIPTOR.name
    numbers = {slot.name: number for number, slot in tensor_slots(header.DESCRIPTOR).items()}
    parts: list[bytes | memoryview] = [header.SerializeToString(deterministic=True)]
    at = len(parts[0])
    for number, name in sorted((numbers[name], name) for name in tensors):
        values = tensors[name]
        for value in values if isinstance(values, Sequence) else (values,):
            body = body_of(value, f"{message}.{name}")
            prefix = _tensor_prefix(number, body, at)
            parts.append(prefix)
            parts.append(body.view)
            at += len(prefix) + len(body.view)
    return b"".join(parts)


def decode_frame(frame: bytes | memoryview, header: Message) -> dict[str, list[Tensor]]:
    """Parses a frame: scalars into ``header``, tensors into the result, as views of the frame that nobody may write to.

    Args:
        frame: The message's bytes, by any protobuf encoder.
        header: An empty message of the class to parse.

    Returns:
        Field name -> its tensors, one unless the field is repeated. Absent fields are absent.

    Raises:
        InvalidRequest: Anything about the frame is wrong; the message names the field.
    """
    message = header.DESCRIPTOR.name
    slots = tensor_slots(header.DESCRIPTOR)
    memory: npt.NDArray[np.uint8] | None = None
    tensors: dict[str, list[Tensor]] = {}
    scalars: list[tuple[int, int]] = []
    for count, field in enumerate(_fields(frame, 0, len(frame), message)):
        if count >= MAX_FIELDS:
            raise InvalidRequest(f"{message} has more than {MAX_FIELDS:,} fields; send repeated numbers packed")
        slot = slots.get(field.number)
        if slot is None:
            scalars.append((field.start, field.stop))
            continue
        where = f"{message}.{slot.name}"
        if field.kind != _LENGTH:
            raise InvalidRequest(f"{where} has wire type {field.kind}; a tensor has wire type {_LENGTH}")
        if slot.name in tensors and not slot.repeated:
            raise InvalidRequest(f"{where} is there twice")
        if memory is None:
            memory = frame_memory(frame)
        tensors.setdefault(slot.name, []).append(_tensor(frame, memory, field, where))
    _parse_scalars(frame, scalars, header)
    return tensors


@cache
def tensor_slots(message: Descriptor) -> dict[int, Slot]:
    """Field number -> tensor field, of a message's descriptor."""
    tensor = tensor_pb2.Tensor.DESCRIPTOR
    return {
        field.number: Slot(field.name, field.is_repeated) for field in message.fields if field.message_type is tensor
    }


def _tensor_prefix(number: int, body: Body, at: int) -> bytes:
    """Everything of a tensor field before its body, padded so that the body is aligned in a frame where it begins at
    ``at``."""
    shape = b"".join(map(_varint, body.shape))
    head = b"\x08" + _varint(body.dtype) + (b"\x12" + _varint(len(shape)) + shape if shape else b"")
    tail = b"\x22" + _varint(len(body.view))
    tag = _varint(number << 3 | _LENGTH)
    prefix = b""
    # No padding first, then 1 byte of it, 2 bytes, ...: the field itself takes two bytes more. Twice the item size is
    # always enough, as the length of the length changes once at most.
    for padding in range(2 * body.itemsize + 1 if body.view else 1):
        pad = b"\x1a" + bytes((padding,)) + bytes(padding) if padding else b""
        length = len(head) + len(pad) + len(tail) + len(body.view)
        prefix = tag + _varint(length) + head + pad + tail
        if (at + len(prefix)) % body.itemsize == 0:
            break
    return prefix


def _tensor(frame: bytes | memoryview, memory: npt.NDArray[np.uint8], field: Field, where: str) -> Tensor:
    """The tensor whose message is the payload of ``field``."""
    dtype: int | None = None
    shape: list[int] = []
    body: tuple[int, int] | None = None
    padded = False
    for count, part in enumerate(_fields(frame, field.at, field.stop, where)):
        if count >= MAX_TENSOR_FIELDS:
            raise InvalidRequest(f"{where} has more than {MAX_TENSOR_FIELDS} fields; a tensor has 4")
        if part.number == _DTYPE:
            if dtype is not None or part.kind != _VARINT:
                raise InvalidRequest(f"{where}.dtype is there twice, or is no number")
            dtype = part.value
        elif part.number == _SHAPE:
            shape += _dims(frame, part, where)
        elif part.number == _INLINE:
            if body is not None or part.kind != _LENGTH:
                raise InvalidRequest(f"{where}.inline is there twice, or is not bytes")
            body = (part.at, part.stop)
        elif part.number == _PADDING:
            if padded or part.kind != _LENGTH:
                raise InvalidRequest(f"{where}.padding is there twice, or is not bytes")
            padded = True
    at, stop = body or (field.stop, field.stop)
    found = checked_dtype(dtype or 0, shape, stop - at, where)
    return tensor_at(memory, at, found, shape)


def _dims(frame: bytes | memoryview, part: Field, where: str) -> list[int]:
    """The dimensions in one occurrence of ``shape``, packed or not."""
    dims: list[int] = []
    if part.kind == _VARINT:
        dims.append(part.value)
    elif part.kind == _LENGTH:
        if part.stop - part.at > 10 * MAX_TENSOR_FIELDS:
            raise InvalidRequest(f"{where}.shape has {part.stop - part.at:,} bytes; that is no shape")
        at = part.at
        while at < part.stop:
            size, at = _read_varint(frame, at, part.stop, where)
            dims.append(size)
    else:
        raise InvalidRequest(f"{where}.shape has wire type {part.kind}; expected numbers")
    for size in dims:
        if size >= 2**32:
            raise InvalidRequest(f"{where}.shape has {size}; a dimension is 0 to {2**32 - 1}")
    return dims


def _parse_scalars(frame: bytes | memoryview, scalars: list[tuple[int, int]], header: Message) -> None:
    """Parses what is not a tensor by the generated class."""
    message = header.DESCRIPTOR.name
    size = sum(stop - start for start, stop in scalars)
    if size > MAX_HEADER_BYTES:
        raise InvalidRequest(
            f"{message} has {size:,} bytes besides its tensors; at most {MAX_HEADER_BYTES:,} are taken"
        )
    try:
        header.ParseFromString(b"".join(frame[start:stop] for start, stop in scalars))
    except DecodeError as error:
        raise InvalidRequest(f"{message} is malformed: {error}") from None


def _fields(frame: bytes | memoryview, at: int, end: int, where: str) -> Iterator[Field]:
    """The fields between ``at`` and ``end``, in the order they lie in."""
    while at < end:
        start = at
        tag, at = _read_varint(frame, at, end, where)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number < 2**29:
            raise InvalidRequest(f"{where} is malformed: field number {number} at byte {start}")
        value = 0
        if kind == _VARINT:
            value, stop = _read_varint(frame, at, end, where)
        elif kind == _LENGTH:
            length, at = _read_varint(frame, at, end, where)
            stop = at + length
        elif kind in (_FIXED64, _FIXED32):
            stop = at + (8 if kind == _FIXED64 else 4)
        else:
            raise InvalidRequest(f"{where} is malformed: wire type {kind} at byte {start}")
        if stop > end:
            raise InvalidRequest(f"{where} is cut off: field {number} runs to byte {stop:,} of {end:,}")
        yield Field(number, kind, start, at, stop, value)
        at = stop


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(frame: bytes | memoryview, at: int, end: int, where: str) -> tuple[int, int]:
    """A varint at ``at``, and the byte after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise InvalidRequest(f"{where} is cut off in a number at byte {at:,}")
        byte = frame[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, at
    raise InvalidRequest(f"{where} is malformed: a number at byte {at:,} is longer than 64 bits")
