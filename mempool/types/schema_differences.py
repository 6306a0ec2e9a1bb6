"""In which fields two schemas differ: one comparison for all who ask. Wording is theirs."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields

from mempool.types.schema import FlatKeySpec, OptimizerSpec, OwnKeySpec, ProductKeySpec, TableSchema, TrainedKeySpec

_NESTED = (TableSchema, OptimizerSpec, ProductKeySpec, FlatKeySpec, TrainedKeySpec, OwnKeySpec)
_FOLLOWS = "stride"
"""Of num_slots: nobody asked for it, so it differs from nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field: its path ("optimizer.lr"; "keys" where they are of another kind), and both values."""

    path: str
    first: object
    second: object


def schema_differences(
    first: TableSchema, second: TableSchema, *, aside: Collection[str] = ("table_id",)
) -> Iterator[Difference]:
    """Fields that differ, in order, down into optimizer and keys of one kind.

    Args:
        first, second: The schemas.
        aside: Names of fields that do not count; the pool's own number of a table is no part of what it is.
    """
    yield from _differences(first, second, aside, "")


def _differences(first: object, second: object, aside: Collection[str], path: str) -> Iterator[Difference]:
    if type(first) is type(second) and isinstance(first, _NESTED):
        for field in fields(first):
            if field.name not in aside and field.name != _FOLLOWS:
                inner = f"{path}.{field.name}".lstrip(".")
                yield from _differences(getattr(first, field.name), getattr(second, field.name), aside, inner)
    elif first != second:
        yield Difference(path=path, first=first, second=second)
