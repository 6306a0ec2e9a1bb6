"""``Mirror``: a value and its message have fields of the same names, so one is made of the other by a table of them.

The table is the message's own descriptor: numbers, text and lists of them go as they are, within bounds that hold for
every message. Leaves the exceptions (enums, messages inside, other shapes) to converters that are given by name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from mempool.errors import InvalidRequest
from mempool.wire.bodies.frames import tensor_slots

T = TypeVar("T")
MessageT = TypeVar("MessageT", bound=Message)

MAX_TEXT_BYTES = 256
"""Of a name, a group, an address: whatever is text. They are kept, shown, and sent on."""
MAX_SENTENCE_BYTES = 4096
"""Of text for people, and of paths."""
MAX_NUMBERS = 2**17
MAX_MESSAGES = 2**16
"""Of a list. Making values of so many takes some milliseconds of the IO loop; no request of ours has as many."""

_SENTENCES = ("waiting_for", "unfinished", "message", "url", "doing", "checkpoint", "storage", "storage_refuses")


class Converter(Protocol):
    """Makes one field's wire value of the value's, and back. ``where`` names the field: "GatherRequest.envelope"."""

    def to_wire(self, value: Any) -> Any: ...

    def from_wire(self, wire: Any, where: str) -> Any: ...


class Mirror(Generic[T, MessageT]):
    """Values of one class as messages of one class.

    Args:
        message: The generated class. Tensor fields are not its business.
        make: The value's class, whose fields have the same names.
        parts: Field name -> what converts it; for messages inside and enums.
        optional: Messages inside that may be absent: None then, as it is for absent scalars whose absence can be told.
            All other messages inside must be there.
        left_out: Fields that are no attributes of the value.
    """

    def __init__(
        self,
        message: type[MessageT],
        make: Callable[..., T],
        parts: Mapping[str, Converter] | None = None,
        *,
        optional: tuple[str, ...] = (),
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.message = message
        self._name = message.DESCRIPTOR.name
        parts = dict(parts or {})
        tensors = {slot.name for slot in tensor_slots(message.DESCRIPTOR).values()}
        fields: list[Any] = [
            field for field in message.DESCRIPTOR.fields if field.name not in tensors and field.name not in left_out
        ]
        assert parts.keys() <= {field.name for field in fields}, f"{self._name} has no such fields"
        for field in fields:
            known = field.name in parts or (field.message_type is None and field.enum_type is None)
            assert known, f"{self._name}.{field.name} needs a converter"
        required = [field.name for field in fields if _is_message(field) and field.name not in optional]
        self._to_message: Callable[[T], MessageT] = _made_to_message(message, fields, parts, optional)
        self._from_message: Callable[..., T] = _made_from_message(make, fields, parts, optional)
        self._required = tuple(required)

    def to_message(self, value: T) -> MessageT:
        """The message of a value; None in an optional field is left out."""
        return self._to_message(value)

    def from_message(self, message: MessageT, **more: Any) -> T:
        """The value of a message; ``more``: attributes that are not in it. Raises InvalidRequest."""
        for name in self._required:
            if not message.HasField(name):
                raise InvalidRequest(f"{self._name}.{name} is missing")
        return self._from_message(message, **more)

    # A mirror is the converter of a message inside another.

    def to_wire(self, value: Any) -> Any:
        return self.to_message(value)

    def from_wire(self, wire: Any, where: str) -> Any:  # noqa: ARG002  # its own name is the better one
        return self.from_message(wire)


class Several:
    """The converter of a repeated message, whose value is a tuple."""

    def __init__(self, each: Converter) -> None:
        self._each = each

    def to_wire(self, value: Any) -> Any:
        return [self._each.to_wire(item) for item in value]

    def from_wire(self, wire: Any, where: str) -> Any:
        bounded(len(wire), MAX_MESSAGES, where)
        return tuple(self._each.from_wire(item, where) for item in wire)


class Choice(Generic[T]):
    """The converter of an enum; ``absent``: the value of 0, where that means something."""

    def __init__(self, numbers: Mapping[T, int], *, absent: T | None = None) -> None:
        self._numbers = dict(numbers)
        self._names: dict[int, T] = {number: name for name, number in numbers.items()}
        if absent is not None:
            self._names[0] = absent

    def to_wire(self, value: T) -> int:
        try:
            return self._numbers[value]
        except KeyError:
            raise InvalidRequest(f"{value!r} is none of {', '.join(map(str, self._numbers))}") from None

    def from_wire(self, wire: int, where: str) -> T:
        return choice(self._names, wire, where)


class Functions:
    """A converter of two functions."""

    def __init__(self, to_wire: Callable[[Any], Any], from_wire: Callable[[Any], Any]) -> None:
        self._to_wire = to_wire
        self._from_wire = from_wire

    def to_wire(self, value: Any) -> Any:
        return self._to_wire(value)

    def from_wire(self, wire: Any, where: str) -> Any:  # noqa: ARG002
        return self._from_wire(wire)


def choice(names: Mapping[int, T], number: int, where: str) -> T:
    """The value an enum's number stands for. Raises InvalidRequest for a number that is not known."""
    try:
        return names[number]
    except KeyError:
        known = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
        raise InvalidRequest(f"{where} is {number}; expected one of {known}") from None


def require(message: Message, *names: str) -> None:
    """Raises InvalidRequest for a field that is missing, where presence can be told (messages)."""
    for name in names:
        if not message.HasField(name):
            raise InvalidRequest(f"{message.DESCRIPTOR.name}.{name} is missing")


def bounded(count: int, most: int, where: str) -> None:
    """Raises InvalidRequest for a list that is too long."""
    if count > most:
        raise InvalidRequest(f"{where} has {count:,} entries; at most {most:,} are taken")


def checked_text(text: str, message: str, name: str) -> str:
    """A text, found short enough. Raises InvalidRequest."""
    most = MAX_SENTENCE_BYTES if name in _SENTENCES else MAX_TEXT_BYTES
    if len(text) * 4 > most and (size := len(text.encode())) > most:
        raise InvalidRequest(f"{message}.{name} has {size:,} bytes; at most {most:,} are taken")
    return text


def checked_time(seconds: float, message: str, name: str) -> float:
    """A time, found to be one: finite, not negative, not minus zero either. Raises InvalidRequest."""
    if not math.isfinite(seconds) or math.copysign(1.0, seconds) < 0.0:
        raise InvalidRequest(f"{message}.{name} is {seconds} seconds; it must be finite and at least 0")
    return seconds


def _numbers(values: Any, message: str, name: str) -> tuple[int, ...]:
    bounded(len(values), MAX_NUMBERS, f"{message}.{name}")
    return tuple(values)


def _texts(values: Any, message: str, name: str) -> tuple[str, ...]:
    bounded(len(values), MAX_MESSAGES, f"{message}.{name}")
    return tuple(checked_text(text, message, name) for text in values)


def _check(field: Any) -> Callable[[Any, str, str], Any] | None:
    """What every field of this kind is checked for, whatever the message. Times are known by their name."""
    if field.is_repeated:
        return _texts if field.type == FieldDescriptor.TYPE_STRING else _numbers
    if field.type == FieldDescriptor.TYPE_STRING:
        return checked_text
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT) and field.name.endswith("_s"):
        return checked_time
    return None


def _is_message(field: Any) -> bool:
    return field.message_type is not None and not field.is_repeated


def _made_to_message(
    message: type[MessageT], fields: list[Any], parts: Mapping[str, Converter], optional: tuple[str, ...]
) -> Callable[[Any], MessageT]:
    """The function that somebody would write by hand: ``lambda value: Message(a=value.a, b=b_to_wire(value.b), ...)``.

    Like ``dataclass``, by its text: a loop over the fields takes half as long again, for every message there is.
    """
    names: dict[str, Any] = {"_message": message}
    arguments = []
    for field in fields:
        name = field.name
        text = f"value.{name}"
        if name in parts:
            names[f"_{name}"] = parts[name].to_wire
            text = f"_{name}({text})" + (f" if {text} is not None else None" if name in optional else "")
        arguments.append(f"{name}={text}")
    made: Callable[[Any], MessageT] = eval(f"lambda value: _message({', '.join(arguments)})", names)
    return made


def _made_from_message(
    make: Callable[..., T], fields: list[Any], parts: Mapping[str, Converter], optional: tuple[str, ...]
) -> Callable[..., T]:
    """``lambda message, **more: make(a=message.a, b=b_from_wire(message.b, "Message.b"), ..., **more)``."""
    names: dict[str, Any] = {"_make": make}
    arguments = []
    for field in fields:
        name, message = field.name, field.containing_type.name
        text = f"message.{name}"
        if name in parts:
            names[f"_{name}"] = parts[name].from_wire
            text = f"_{name}({text}, {f'{message}.{name}'!r})"
            text += f" if message.HasField({name!r}) else None" if name in optional else ""
        elif (check := _check(field)) is not None:
            names[f"_{name}"] = check
            text = f"_{name}({text}, {message!r}, {name!r})"
        if name not in parts and field.has_presence:
            text += f" if message.HasField({name!r}) else None"
        arguments.append(f"{name}={text}")
    made: Callable[..., T] = eval(f"lambda message, **more: _make({', '.join([*arguments, '**more'])})", names)
    return made
