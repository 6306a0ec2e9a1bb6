"""The safetensors format: a header that can be written before its tensors are there, and a strict reading of it.

Eight bytes with the header's length, little-endian; the header, JSON; the tensors' bytes side by side, C order.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mempool.checkpoint.stores import Store
from mempool.checkpoint.stores.store import place_of
from mempool.errors import DataLoss, InvalidRequest

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "int64": 8,
    "uint64": 8,
    "float32": 4,
    "int32": 4,
    "uint32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "uint16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of an element, by torch's names of dtypes."""

_CODES = {
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
    "float32": "F32",
    "int32": "I32",
    "uint32": "U32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "uint16": "U16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""What readers of the format take."""
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor of a file. dtype: By torch's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file has.

    Attributes:
        tensors: name -> the tensor and where it begins in the file.
        metadata: The file's own texts.
        num_bytes: Of length and header together: the first tensor begins there.
    """

    tensors: Mapping[str, tuple[TensorEntry, int]]
    metadata: Mapping[str, str]
    num_bytes: int


def header_of(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the tensors, which follow in this order with nothing between them.

    Raises:
        InvalidRequest: More tensors than a header has room for.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        fields[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise InvalidRequest(f"{len(entries):_} tensors are too many for one safetensors file; write several files")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(store: Store, path: str, size: int) -> Header:
    """Read a file's header. size: The file's.

    Raises:
        DataLoss: It is no safetensors file, or not whole.
    """
    where = place_of(store.url, path)
    if size < _LENGTH_BYTES:
        raise DataLoss(f"{where} has {size} bytes: it is no safetensors file, or cut off")
    length = int.from_bytes(_read(store, path, 0, _LENGTH_BYTES), "little")
    if length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise DataLoss(f"{where} is no safetensors file, or cut off: its header would have {length:_} bytes")
    try:
        return _parsed(_read(store, path, _LENGTH_BYTES, length), data_bytes=size - _LENGTH_BYTES - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataLoss(f"{where} is no safetensors file, or damaged: {error or type(error).__name__}") from None


def _read(store: Store, path: str, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    store.read_into(path, offset, memoryview(buffer))
    return bytes(buffer)


def _parsed(text: bytes, *, data_bytes: int) -> Header:
    fields = json.loads(text)
    metadata = fields.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts")
    first = _LENGTH_BYTES + len(text)
    tensors: dict[str, tuple[TensorEntry, int]] = {}
    for name, field in fields.items():
        if field["dtype"] not in _DTYPES:
            continue  # of another kind than any table has; it may stand beside what is wanted
        shape = tuple(field["shape"])
        begin, end = field["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"tensor {name!r} has a strange shape or place")
        entry = TensorEntry(name=name, dtype=_DTYPES[field["dtype"]], shape=shape)
        if end - begin != entry.num_bytes or end > data_bytes:
            raise ValueError(f"tensor {name!r} does not lie where it should; is the file cut off?")
        tensors[name] = (entry, first + begin)
    return Header(tensors=tensors, metadata=metadata, num_bytes=first)
