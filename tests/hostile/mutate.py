"""Mutations of a request: of its bytes, and of its fields (valid frames with hostile numbers).

No mutation makes a shard speak to a host of another machine: an address is one of ``ADDRESSES`` or stays what it was.
"""

import random
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

_POWERS = (15, 16, 31, 32, 53, 62, 63)
_INTEGERS = [0, 1, 2, 3, 7, 255, *(2**power + off for power in _POWERS for off in (-1, 0)), 2**64 - 1]
_BOUNDED = {
    FieldDescriptor.CPPTYPE_UINT32: [number for number in _INTEGERS if number < 2**32],
    FieldDescriptor.CPPTYPE_INT32: [number for number in _INTEGERS if number < 2**31],
}
_DOUBLES = [0.0, -0.0, 1.0, -1.0, 1e-310, 1e300, -1e300, float("inf"), float("-inf"), float("nan")]
_NAMES = ["values", "values.sum", "sum", "scales", "keys", "head_keys", "witness "]
_TEXTS = ["", "a", *_NAMES, "x\ny", "\x00", "é" * 300, "a" * 5_000]
ADDRESSES = ["", "127.0.0.1:1", "nonsense", "127.0.0.1", ":0", "127.0.0.1:99999"]
_LENGTHS = (0, 1, 2, 17, 1_000, 20_000)
_OFTEN = (4, 4, 4, 4, 3, 1)
_DRAWN = 64
"""Elements of a long list that are drawn one by one; the rest of it are these again."""


def mutated(request: Message, rng: random.Random) -> bytes:
    """The bytes of a request after one to three mutations."""
    fields = rng.random() < 0.6 and bool(request.DESCRIPTOR.fields)
    if fields:
        changed = type(request)()
        changed.CopyFrom(request)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _mutate_field(changed, rng)
        return changed.SerializeToString()
    frame = request.SerializeToString()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        frame = _mutate_bytes(frame, rng)
    return frame if _stays_here(request, frame) else request.SerializeToString()


def _mutate_bytes(frame: bytes, rng: random.Random) -> bytes:
    if not frame:
        return rng.randbytes(rng.choice((1, 2, 9)))
    at = rng.randrange(len(frame))
    kind = rng.randrange(7)
    if kind == 0:
        return frame[:at] + bytes([frame[at] ^ 1 << rng.randrange(8)]) + frame[at + 1 :]
    if kind == 1:
        return frame[:at]
    if kind == 2:
        return frame[:at] + rng.randbytes(rng.randrange(1, 12)) + frame[at:]
    if kind == 3:
        return frame[:at] + frame[min(len(frame), at + rng.randrange(1, 12)) :]
    if kind == 4:
        end = min(len(frame), at + rng.randrange(1, 60))
        return frame[:end] + frame[at:end] * rng.choice((1, 2, 40)) + frame[end:]
    if kind == 5:
        number = rng.choice(_INTEGERS)
        return frame[:at] + struct.pack("<Q", number & (2**64 - 1)) + frame[at + 8 :]
    return frame[:at] + b"\xff" * rng.randrange(1, 11) + frame[at + 1 :]


def _mutate_field(message: Message, rng: random.Random) -> None:
    owner, field = rng.choice(list(_fields(message)))
    _set(owner, field, rng)


def _fields(message: Message, depth: int = 0) -> Iterator[tuple[Message, FieldDescriptor]]:
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type is None or depth > 4:
            continue
        if field.is_repeated:
            for value in list(getattr(message, field.name))[:2]:
                yield from _fields(value, depth + 1)
        elif message.HasField(field.name):
            yield from _fields(getattr(message, field.name), depth + 1)


def _set(owner: Message, field: FieldDescriptor, rng: random.Random) -> None:
    if rng.random() < 0.1:
        owner.ClearField(field.name)
        return
    values: Any = getattr(owner, field.name)
    if field.is_repeated:
        (length,) = rng.choices(_LENGTHS, _OFTEN)
        kept = list(values)
        del values[:]
        if field.message_type is not None:
            values.extend((kept or [values.add()])[:1] * min(length, 1_000))
        elif rng.random() < 0.5 and kept:
            values.extend(kept * rng.choice((2, 3)))
        else:
            drawn = [_scalar(field, rng) for _ in range(min(length, _DRAWN))]
            values.extend((drawn * (length // _DRAWN + 1))[:length])
        return
    if field.message_type is not None:
        if rng.random() < 0.3:
            owner.ClearField(field.name)
        elif owner.HasField(field.name):
            nested = list(_fields(values))
            if nested:
                _set(*rng.choice(nested), rng)
        else:
            values.SetInParent()
        return
    if field.name == "inline":
        owner.inline = _body(owner.inline, rng)
        return
    setattr(owner, field.name, _scalar(field, rng))


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.name == "address":
        return rng.choice(ADDRESSES)
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(_DOUBLES)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice((0, 1, 8, 64)))
        return rng.choice(_TEXTS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 99, 2**31 - 1))
    return rng.choice(_BOUNDED.get(kind, _INTEGERS))


def _body(body: bytes, rng: random.Random) -> bytes:
    """Extremes in the place of elements."""
    if len(body) < 8 or rng.random() < 0.2:
        return rng.randbytes(rng.choice((0, 1, 8, 64, 256)))
    extremes = [
        struct.pack("<q", rng.choice((-1, -(2**63), 2**63 - 1, 2**31, 2**32, 0, 255))),
        struct.pack("<d", rng.choice(_DOUBLES)),
        struct.pack("<ff", rng.choice((3e38, float("nan"), float("inf"))), -0.0),
    ]
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(body) // 8) * 8
        body = body[:at] + rng.choice(extremes) + body[at + 8 :]
    return body


def _stays_here(request: Message, frame: bytes) -> bool:
    if not _names_addresses(request.DESCRIPTOR):
        return True
    try:
        parsed = type(request).FromString(frame)
    except DecodeError:
        return True
    known = set(ADDRESSES) | set(_addresses(request))
    return all(address in known for address in _addresses(parsed))


@cache
def _names_addresses(descriptor: Descriptor) -> bool:
    """Whether a message may have an address in it, at any depth. No message of ours holds itself."""
    return any(
        field.name == "address" or (field.message_type is not None and _names_addresses(field.message_type))
        for field in descriptor.fields
    )


def _addresses(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        if field.name == "address":
            yield value
        elif field.message_type is not None:
            for nested in value if field.is_repeated else (value,):
                yield from _addresses(nested)
