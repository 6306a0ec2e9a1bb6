"""A table's schema as JSON and back, exactly. A field that an older mempool did not write has its default."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, get_args

from mempool.checkpoint.format.json_values import Fields, Unfit
from mempool.errors import InvalidRequest
from mempool.types import (
    FlatKeySpec,
    KeySpec,
    OptimizerSpec,
    OwnKeySpec,
    ProductKeySpec,
    StorageDtype,
    TableSchema,
    TrainedKeySpec,
)
from mempool.types.schema import Algorithm, Layout, Rounding
from mempool.types.schema_checks import check_schema

_KEYS: Mapping[str, type[KeySpec]] = {
    "product": ProductKeySpec,
    "flat": FlatKeySpec,
    "trained": TrainedKeySpec,
    "own": OwnKeySpec,
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "dtype": get_args(StorageDtype),
    "layout": get_args(Layout),
    "rounding": get_args(Rounding),
    "algorithm": get_args(Algorithm),
}
_TEXTS = ("name",)
_NULLABLE = ("max_norm",)


def schema_json(schema: TableSchema) -> dict[str, Any]:
    """All of a schema. Numbers keep every bit: JSON has them as Python's repr."""
    found = asdict(schema)
    if schema.keys is not None:
        kind = next(name for name, each in _KEYS.items() if isinstance(schema.keys, each))
        found["keys"] = {"type": kind, **asdict(schema.keys)}
    return found


def parse_schema(value: object, path: str) -> TableSchema:
    """The schema. Raises Unfit for anything that is none, or that no table may have."""
    schema: TableSchema = _parse(TableSchema, Fields(value, path))
    try:
        check_schema(schema)
    except InvalidRequest as error:
        raise Unfit(f"{path} is no table's: {error}") from None
    return schema


def _parse(kind: type[Any], given: Fields) -> Any:
    """Any: of ``kind``, one of the schema's dataclasses."""
    found: dict[str, object] = {}
    for field in fields(kind):
        if not given.has(field.name) and field.default is not MISSING:
            continue
        found[field.name] = _value(field.name, str(field.type), given)
    given.done()
    return kind(**found)


def _value(name: str, annotation: str, given: Fields) -> object:
    if name in _CHOICES:
        return given.text(name, among=_CHOICES[name])
    if name in _TEXTS:
        return given.text(name)
    if name == "optimizer":
        return _parse(OptimizerSpec, Fields(given.take(name), given.path(name)))
    if name == "keys":
        return _keys(given)
    if name in _NULLABLE:
        value = given.take(name)
        return None if value is None else Fields({name: value}, given.path("")).number(name)
    if "bool" in annotation:
        return given.flag(name)
    return given.number(name) if "float" in annotation else given.integer(name)


def _keys(given: Fields) -> KeySpec | None:
    value = given.take("keys")
    if value is None:
        return None
    inner = Fields(value, given.path("keys"))
    keys: KeySpec = _parse(_KEYS[inner.text("type", among=_KEYS)], inner)
    return keys
