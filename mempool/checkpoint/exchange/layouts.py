"""Which tensors of a file are a table's values and keys, by their names and shapes: pure.

Shapes: N slots, V value dim, H heads, n half-keys of a codebook, K key dim.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mempool.checkpoint.format.tensor_file import TensorEntry
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, OwnKeySpec, ProductKeySpec, TableSchema

VALUES = "values"
SCALES = "values.scales"
FLAT_KEYS = "keys"
HEAD_KEYS = "head_keys"

_BAG = "weight"
_SUFFIXES = (f"{VALUES}.{_BAG}", VALUES, _BAG)
"""Of the values' names, likeliest first: a memory layer's bag, its own parameter (and what we export), an embedding."""
_SCALED = ("int8", "float8_e4m3fn")
_SHOWN = 12

KeyForm = Literal["flat", "heads", "stacked", "pairs"]
"""[N, K] | [H, 2, n, K / 2] | [2 * H * n, K / 2], the same in two dimensions | [H, n, 2, K / 2]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """What of a file is what.

    Attributes:
        values: [N, V].
        scales: [N, blocks] float32, of values of one byte; None where they are numbers by themselves.
        keys: None where there are none beside the values.
    """

    values: TensorEntry
    scales: TensorEntry | None
    keys: TensorEntry | None


def find_layout(
    tensors: Mapping[str, TensorEntry], *, values: str | None = None, keys: str | None = None
) -> FileLayout:
    """Find a table in a file.

    Args:
        tensors: All that the file has, by name.
        values: The name of the values; None to find them: "[...]values.weight" and "[...]values" (memory layers),
            "[...]weight" (nn.EmbeddingBag, nn.Embedding).
        keys: The name of the keys; None for "keys" or "head_keys" beside the values.

    Raises:
        InvalidRequest: No tensor, or more than one, can be meant; with what was found.
    """
    found = _named(tensors, values) if values is not None else _found(tensors)
    if len(found.shape) != 2:
        raise InvalidRequest(f"{_shown([found])} are no values: they have two dimensions, [num_slots, value_dim]")
    prefix = _prefix(found.name)
    beside = [tensors[prefix + name] for name in (HEAD_KEYS, FLAT_KEYS) if prefix + name in tensors]
    scales = tensors.get(prefix + SCALES) if found.dtype in _SCALED else None
    if scales is not None and (len(scales.shape) != 2 or scales.shape[0] != found.shape[0] or not scales.shape[1]):
        raise InvalidRequest(f"{_shown([scales])} are no scales of {_shown([found])}: they are [num_slots, blocks]")
    return FileLayout(
        values=found,
        scales=scales,
        keys=_named(tensors, keys) if keys is not None else next(iter(beside), None),
    )


def check_values(layout: FileLayout, schema: TableSchema) -> None:
    """Raises InvalidRequest where the values are not those of such a table."""
    shape = (schema.num_slots, schema.value_dim)
    if layout.values.shape != shape:
        raise InvalidRequest(
            f"{_shown([layout.values])}: table {schema.name!r} has [{shape[0]}, {shape[1]}]. Make a table with "
            f"num_slots={layout.values.shape[0]:_}, value_dim={layout.values.shape[1]:_}"
        )


def key_form(tensor: TensorEntry, schema: TableSchema) -> KeyForm:
    """How the keys of a file lie, by the table that they are for. Raises InvalidRequest where they do not fit it."""
    fitting: list[tuple[KeyForm, tuple[int, ...]]] = []
    keys, product = schema.keys, (0, 2, 0, 0)
    if isinstance(keys, FlatKeySpec):
        fitting = [("flat", (schema.num_slots, keys.key_dim))]
    elif isinstance(keys, ProductKeySpec):
        product = (keys.heads, 2, math.isqrt(schema.num_slots), keys.key_dim // 2)
    elif isinstance(keys, OwnKeySpec) and keys.sections == 1:
        fitting = [("flat", (keys.rows, schema.value_dim))]
    elif isinstance(keys, OwnKeySpec):
        product = (keys.sections // keys.ways, keys.ways, keys.rows, schema.value_dim)
    heads, ways, n, width = product
    if heads:
        fitting = [
            ("heads", (heads, ways, n, width)),
            ("stacked", (ways * heads * n, width)),
            ("pairs", (heads, n, ways, width)),
        ]
    for form, shape in fitting:
        if tensor.shape == shape:
            return form
    wanted = " or ".join(str(list(shape)) for _, shape in fitting) or "no keys"
    raise InvalidRequest(f"{_shown([tensor])}: table {schema.name!r} takes {wanted}. Make the table with keys that fit")


def _found(tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    for suffix in _SUFFIXES:
        fitting = [
            entry
            for name, entry in tensors.items()
            if len(entry.shape) == 2 and (name == suffix or name.endswith(f".{suffix}"))
        ]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InvalidRequest(
                f"several tensors can be the values: {_shown(fitting)}. Say which: values={fitting[0].name!r}"
            )
    raise InvalidRequest(
        f"no tensor is named as values are ({', '.join(f'[...]{suffix}' for suffix in _SUFFIXES)}); there are: "
        f"{_shown(tensors.values())}. Say which: values=NAME"
    )


def _named(tensors: Mapping[str, TensorEntry], name: str) -> TensorEntry:
    if name not in tensors:
        raise InvalidRequest(f"there is no tensor {name!r}; there are: {_shown(tensors.values())}")
    return tensors[name]


def _prefix(values: str) -> str:
    """What stands before a table's own names: "layers.3.values.weight" -> "layers.3."."""
    for suffix in _SUFFIXES:
        if values == suffix or values.endswith(f".{suffix}"):
            return values.removesuffix(suffix)
    return values.rpartition(".")[0] + "." if "." in values else ""


def _shown(entries: Iterable[TensorEntry]) -> str:
    texts = [f"{entry.name} {entry.dtype} {list(entry.shape)}" for entry in entries]
    more = f", and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return (", ".join(texts[:_SHOWN]) + more) or "none"
