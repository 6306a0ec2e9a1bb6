"""Amounts as people write them in a configuration: "2GiB" as bytes, "7100-7199" as a range of ports."""

import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)")
_PORTS = re.compile(r"(\d{1,5})\s*-\s*(\d{1,5})")


def parse_bytes(value: object) -> int:
    """Bytes of "2GiB", "1.5 GiB", "500MB" or a plain whole number; GiB is 1024^3, GB is 1000^3, in any case of letters.

    A fraction of a byte is dropped.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    factor = _BY_LOWER.get(found[2].lower() or "b") if found else None
    if found is None or factor is None:
        raise ValueError('is not an amount of memory; write for example "512MiB" or "2GiB"')
    return int(Decimal(found[1].replace("_", "")) * factor)


def format_bytes(num_bytes: int) -> str:
    """The shortest exact way to write it: 2147483648 -> "2GiB"; ``parse_bytes`` reads it back."""
    for power, letter in reversed(list(enumerate("KMGT", 1))):
        if num_bytes and num_bytes % 1024**power == 0:
            return f"{num_bytes // 1024**power}{letter}iB"
    return f"{num_bytes}B"


def parse_ports(value: object) -> tuple[int, int] | None:
    """First and last port of "7100-7199"; None for 0 and None, which mean any free port.

    Raises:
        ValueError: It is no such range within 1 to 65535.
    """
    if value is None or (value == 0 and not isinstance(value, bool)):
        return None
    if isinstance(value, tuple | list) and len(value) == 2:
        value = f"{value[0]}-{value[1]}"
    found = _PORTS.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError('is not a range of ports; write for example "7100-7199", or 0 for any free port')
    first, last = int(found[1]), int(found[2])
    if not 1 <= first <= last <= 65535:
        raise ValueError(
            "is not a range of ports; the first is at least 1, not above the last, and the last at most 65535"
        )
    return first, last


ByteCount = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=int | str)]
PortRange = Annotated[
    tuple[int, int] | None,
    BeforeValidator(parse_ports, json_schema_input_type=int | str | None),
    PlainSerializer(lambda ports: None if ports is None else f"{ports[0]}-{ports[1]}", return_type=str | None),
]
