"""Taking values out of JSON that somebody else wrote: each of its type, or an error with its path."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

ValueT = TypeVar("ValueT")

MAX_INTEGER = 2**64 - 1

_SPAN = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?", re.ASCII)


class Unfit(Exception):
    """A value is not what it must be. The text begins with its path."""


class Fields:
    """The members of one JSON object, taken one by one; ``done`` refuses those that nobody took."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise Unfit(f"{path or 'it'} is no object")
        self._left: dict[str, Any] = dict(value)
        self._path = path

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str) -> Any:
        """Any: whatever JSON has there."""
        if name not in self._left:
            raise Unfit(f"{self.path(name)} is missing")
        return self._left.pop(name)

    def has(self, name: str) -> bool:
        return name in self._left

    def text(self, name: str, *, among: Collection[str] | None = None) -> str:
        value = self.take(name)
        if not isinstance(value, str) or (among is not None and value not in among):
            raise Unfit(f"{self.path(name)} is {value!r:.80}" + (f", none of {', '.join(among)}" if among else ""))
        return value

    def text_or_none(self, name: str) -> str | None:
        if self._left.get(name, "") is None:
            del self._left[name]
            return None
        return self.text(name)

    def integer(self, name: str, *, low: int = 0, high: int = MAX_INTEGER) -> int:
        return whole_number(self.take(name), self.path(name), low=low, high=high)

    def number(self, name: str) -> float:
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise Unfit(f"{self.path(name)} is {value!r:.80}, no number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise Unfit(f"{self.path(name)} is {value!r:.80}, not true or false")
        return value

    def items(self, name: str) -> list[tuple[str, Any]]:
        """The elements of an array with their paths."""
        value = self.take(name)
        if not isinstance(value, list):
            raise Unfit(f"{self.path(name)} is no array")
        return [(f"{self.path(name)}[{index}]", element) for index, element in enumerate(value)]

    def members(self, name: str) -> list[tuple[str, str, Any]]:
        """Of an object: (name, path, value)."""
        value = self.take(name)
        if not isinstance(value, dict):
            raise Unfit(f"{self.path(name)} is no object")
        return [(key, f"{self.path(name)}[{key!r:.80}]", element) for key, element in value.items()]

    def done(self) -> None:
        """Raises Unfit where something is left: a newer version wrote it, and it may matter."""
        if self._left:
            raise Unfit(f"{self.path(next(iter(self._left)))} is not known here: a newer mempool wrote it")


def whole_number(value: object, path: str, *, low: int = 0, high: int = MAX_INTEGER) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Unfit(f"{path} is {value!r:.80}, no number from {low} to {high}")
    return value


def each(parse: Callable[[object, str], ValueT], items: list[tuple[str, Any]]) -> tuple[ValueT, ...]:
    return tuple(parse(value, path) for path, value in items)


def span_text(numbers: Collection[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    parts: list[str] = []
    first = last = -2
    for number in (*numbers, -2):
        if number == last + 1:
            last = number
            continue
        if last >= 0:
            parts.append(f"{first}" if first == last else f"{first}-{last}")
        first = last = number
    return ",".join(parts)


def spans(text: object, path: str, *, below: int) -> tuple[int, ...]:
    """What ``span_text`` wrote: numbers below ``below``, ascending."""
    found: list[int] = []
    if not isinstance(text, str):
        raise Unfit(f"{path} is {text!r:.80}, no text as '0-3,7'")
    for part in text.split(",") if text else ():
        match = _SPAN.fullmatch(part)
        if match is None:
            raise Unfit(f"{path} is {text!r:.80}, no text as '0-3,7'")
        begin, end = int(match[1]), int(match[2] or match[1])
        if end < begin or end >= below or (found and begin <= found[-1]):
            raise Unfit(f"{path} has {part!r}, which is out of order or not below {below}")
        found += range(begin, end + 1)
    return tuple(found)


JsonObject = Mapping[str, Any]
"""Any: JSON of the user's own."""
