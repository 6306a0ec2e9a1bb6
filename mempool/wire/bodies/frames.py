"""Messages of the data path as frames: the bytes protobuf would make, written and read without copying tensors.

A frame is the message's scalars (fields below 32), made and parsed by the generated class, then its tensors (32 and
above), made and parsed here. Leaves to ``codec`` and ``messages`` what the fields mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from mempool.errors import InvalidRequest
from mempool.wire.bodies.tensors import Body, Dtype, Part, TensorLike, body_of, checked_dtype
from mempool.wire.v1 import tensor_pb2

FIRST_TENSOR_FIELD = 32
# What a frame may hold besides its tensors. More is no request of ours, and would keep the IO loop from its work.
MAX_HEADER_BYTES = 4 * 2**20
MAX_FIELDS = 1024
MAX_TENSOR_FIELDS = 32

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_DTYPE, _SHAPE, _PADDING, _INLINE = 1, 2, 3, 4


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
    return b"".join(frame_parts(header, tensors))


def frame_parts(header: Message, tensors: Mapping[str, TensorLike | Sequence[TensorLike]]) -> list[bytes | memoryview]:
    """As ``encode_frame``, in parts: tensors that are contiguous, on the CPU, are not copied."""
    message = header.DESCRIPTOR.name
    numbers = slot_numbers(header.DESCRIPTOR)
    bodies: list[tuple[int, Body]] = []
    for number, name in sorted((numbers[name], name) for name in tensors):
        values = tensors[name]
        several = values if isinstance(values, Sequence) else (values,)
        bodies += [(number, body_of(value, f"{message}.{name}")) for value in several]
    return parts_of(header, bodies)


def parts_of(header: Message, bodies: Sequence[tuple[int, Body]]) -> list[bytes | memoryview]:
    """As ``frame_parts``, of tensors by their fields' numbers, in the order of these."""
    return parts_after(header.SerializeToString(deterministic=True), bodies)


def parts_after(scalars: bytes, bodies: Sequence[tuple[int, Body]]) -> list[bytes | memoryview]:
    """As ``parts_of``, of a header's own bytes."""
    parts: list[bytes | memoryview] = [scalars]
    at = len(scalars)
    for number, (dtype, shape, view) in bodies:
        prefix = _tensor_prefix(number, dtype, shape, len(view), at % dtype.itemsize)
        parts += (prefix, view)
        at += len(prefix) + len(view)
    return parts


def decode_frame(frame: bytes | memoryview, header: Message) -> dict[str, list[Part]]:
    """Parses a frame: scalars into ``header``; where its tensors lie is the result.

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
    found: dict[str, list[Part]] = {}
    scalars: list[tuple[int, int]] = []
    at, end, count = 0, len(frame), 0
    while at < end:
        count += 1
        if count > MAX_FIELDS:
            raise InvalidRequest(f"{message} has more than {MAX_FIELDS:,} fields; send repeated numbers packed")
        start = at
        number, kind, at, stop, _ = _field(frame, at, end, message)
        slot = slots.get(number)
        if slot is None:
            if scalars and scalars[-1][1] == start:
                start = scalars.pop()[0]
            scalars.append((start, stop))
        else:
            where = f"{message}.{slot.name}"
            if kind != _LENGTH:
                raise InvalidRequest(f"{where} has wire type {kind}; a tensor has wire type {_LENGTH}")
            if slot.name not in found:
                found[slot.name] = []
            elif not slot.repeated:
                raise InvalidRequest(f"{where} is there twice")
            found[slot.name].append(_part(frame, at, stop, where))
        at = stop
    _parse_scalars(frame, scalars, header)
    return found


@cache
def tensor_slots(message: Descriptor) -> dict[int, Slot]:
    """Field number -> tensor field, of a message's descriptor."""
    tensor = tensor_pb2.Tensor.DESCRIPTOR
    return {
        field.number: Slot(field.name, field.is_repeated) for field in message.fields if field.message_type is tensor
    }


@cache
def slot_numbers(message: Descriptor) -> dict[str, int]:
    """Name -> number of the tensor fields of a message's descriptor."""
    return {slot.name: number for number, slot in tensor_slots(message).items()}


@lru_cache(maxsize=1024)
def _tensor_prefix(number: int, dtype: Dtype, shape: tuple[int, ...], size: int, off_at: int) -> bytes:
    """Everything of a tensor field before its body of ``size`` bytes, padded so that the body is aligned in a frame
    where it begins at ``off_at`` beyond a multiple of its elements' size. Kept: calls have the same shapes again and
    again."""
    itemsize = dtype.itemsize
    sizes = b"".join(map(_varint, shape))
    head = b"\x08" + _varint(dtype.number) + (b"\x12" + _varint(len(sizes)) + sizes if sizes else b"")
    tail = b"\x22" + _varint(size)
    tag = _varint(number << 3 | _LENGTH)
    prefix = tag + _varint(len(head) + len(tail) + size) + head + tail
    off = (off_at + len(prefix)) % itemsize
    if not off or not size:
        return prefix
    # Padding takes two bytes and its own, and may make the length of the length one longer.
    least = (itemsize - off - 3) % itemsize
    for padding in range(max(1, least), 2 * itemsize + 1):
        pad = b"\x1a" + bytes((padding,)) + bytes(padding)
        prefix = tag + _varint(len(head) + len(pad) + len(tail) + size) + head + pad + tail
        if (off_at + len(prefix)) % itemsize == 0:
            break
    return prefix


def _part(frame: bytes | memoryview, at: int, end: int, where: str) -> Part:
    """The tensor whose message lies between ``at`` and ``end``."""
    dtype: int | None = None
    shape: list[int] = []
    body: tuple[int, int] | None = None
    padded = False
    count = 0
    while at < end:
        count += 1
        if count > MAX_TENSOR_FIELDS:
            raise InvalidRequest(f"{where} has more than {MAX_TENSOR_FIELDS} fields; a tensor has 4")
        number, kind, at, stop, value = _field(frame, at, end, where)
        if number == _DTYPE:
            if dtype is not None or kind != _VARINT:
                raise InvalidRequest(f"{where}.dtype is there twice, or is no number")
            dtype = value
        elif number == _SHAPE:
            shape += _dims(frame, kind, at, stop, value, where)
        elif number == _INLINE:
            if body is not None or kind != _LENGTH:
                raise InvalidRequest(f"{where}.inline is there twice, or is not bytes")
            body = (at, stop)
        elif number == _PADDING:
            if padded or kind != _LENGTH:
                raise InvalidRequest(f"{where}.padding is there twice, or is not bytes")
            padded = True
        at = stop
    at, stop = body or (end, end)
    return Part(checked_dtype(dtype or 0, shape, stop - at, where), tuple(shape), at)


def _dims(frame: bytes | memoryview, kind: int, at: int, stop: int, value: int, where: str) -> list[int]:
    """The dimensions in one occurrence of ``shape``, packed or not."""
    dims: list[int] = []
    if kind == _VARINT:
        dims.append(value)
    elif kind == _LENGTH:
        if stop - at > 10 * MAX_TENSOR_FIELDS:
            raise InvalidRequest(f"{where}.shape has {stop - at:,} bytes; that is no shape")
        while at < stop:
            size, at = _read_varint(frame, at, stop, where)
            dims.append(size)
    else:
        raise InvalidRequest(f"{where}.shape has wire type {kind}; expected numbers")
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
        header.ParseFromString(b"".join([frame[start:stop] for start, stop in scalars]))
    except DecodeError as error:
        raise InvalidRequest(f"{message} is malformed: {error}") from None


def _field(frame: bytes | memoryview, at: int, end: int, where: str) -> tuple[int, int, int, int, int]:
    """The field at ``at``: its number and kind, where its payload begins and ends, and the value of a varint."""
    start = at
    tag = frame[at]
    at += 1
    if tag >= 0x80:
        tag, at = _read_varint(frame, start, end, where)
    number, kind = tag >> 3, tag & 7
    if not 1 <= number < 2**29:
        raise InvalidRequest(f"{where} is malformed: field number {number} at byte {start}")
    value = 0
    if kind == _LENGTH:
        length, at = _read_varint(frame, at, end, where)
        stop = at + length
    elif kind == _VARINT:
        value, stop = _read_varint(frame, at, end, where)
    elif kind in (_FIXED64, _FIXED32):
        stop = at + (8 if kind == _FIXED64 else 4)
    else:
        raise InvalidRequest(f"{where} is malformed: wire type {kind} at byte {start}")
    if stop > end:
        raise InvalidRequest(f"{where} is cut off: field {number} runs to byte {stop:,} of {end:,}")
    return number, kind, at, stop, value


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
    if at < end and frame[at] < 0x80:
        return frame[at], at + 1
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
