"""JSON documents that carry their own checksum: one flipped bit anywhere is found, and a newer format is told apart.

A document is one JSON object: "format", "format_version", its fields, and last "sha256" over all bytes before that.
"""

import hashlib
import json
import re
from typing import Any

from mempool.errors import DataLoss, InvalidRequest

FORMAT_VERSION = 1
_MARK = b',\n "sha256": "'
_END = re.compile(re.escape(_MARK) + rb'([0-9a-f]{64})"\n}\n\Z')
_SEAL_BYTES = len(_MARK) + 64 + len(b'"\n}\n')


def sealed(kind: str, fields: dict[str, Any]) -> bytes:
    """The document. kind: What it is, as "mempool.checkpoint"."""
    # A member a line: json's own indentation is many times slower.
    members = {"format": kind, "format_version": FORMAT_VERSION, **fields}.items()
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in members]
    body = ("{\n " + ",\n ".join(lines)).encode()
    return body + _MARK + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def unsealed(data: bytes, kind: str, where: str) -> dict[str, Any]:
    """Its fields, once the checksum is right. where: How messages name it.

    Raises:
        DataLoss: It is damaged.
        InvalidRequest: It is of a newer format, or something else.
    """
    seal = _END.search(data, max(0, len(data) - _SEAL_BYTES))
    if seal is not None and hashlib.sha256(data[: seal.start()]).hexdigest().encode() != seal[1]:
        raise DataLoss(
            f"{where} is damaged: its checksum is another one. Copy it again from where it is whole, or use "
            f"another checkpoint"
        )
    try:
        found = json.loads(data)
        form, version = found.pop("format"), found.pop("format_version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataLoss(
            f"{where} is damaged or cut off: it is no JSON of mempool's. Copy it again from where it is whole, or use "
            f"another checkpoint"
        ) from None
    if form != kind:
        raise InvalidRequest(f"{where} is {str(form)[:80]!r}, and {kind!r} is expected")
    if type(version) is int and version > FORMAT_VERSION:
        raise InvalidRequest(
            f"{where} has format version {version}; this mempool reads up to {FORMAT_VERSION}. Use a newer mempool"
        )
    if seal is None or version != FORMAT_VERSION:
        raise DataLoss(f"{where} is damaged: it does not end with its checksum. Use another checkpoint")
    del found["sha256"]
    return dict(found)
