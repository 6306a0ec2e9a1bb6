"""The tables that a model holds, wherever it holds them: attributes, lists, dicts, dataclasses."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from mempool.client import Table, TableAt
from mempool.errors import InvalidRequest
from mempool.nn.layer import MemoryLayer
from mempool.nn.ngrams.lookup import NgramLookup

# Deeper, or in more entries, nobody holds tables; and a model may hold a whole data set.
_MAX_DEPTH = 8
_MAX_ENTRIES = 10_000


def tables_of(model: nn.Module) -> list[Table]:
    """Each table once, in the order of the model's modules and of their attributes; then the keys that they train."""
    found: dict[int, Table] = {}
    seen = {id(module) for module in model.modules()}
    for module in model.modules():
        seen.add(id(module._modules))
        for part in vars(module).values():
            for table in _tables_in(part, seen, _MAX_DEPTH):
                found[id(table)] = table
    for keys in keys_of(list(found.values())):
        found.setdefault(id(keys), keys)
    return list(found.values())


def keys_of(tables: Sequence[Table]) -> list[Table]:
    """The keys that tables train in the pool; none of those that are read at a version."""
    return [table.keys for table in tables if table.trains_keys and not isinstance(table, TableAt)]


@contextmanager
def reading(model: nn.Module, *versions: TableAt) -> Iterator[None]:
    """Within this, the model's memory layers and n-grams look up in their tables as they were at these versions.

    To evaluate a model while its tables are trained: every look-up is of the one version. Use the model in no other
    thread meanwhile; a copy (``copy.deepcopy``) has the same tables and is its own. A backward pass is refused.

    Args:
        model: Whose layers; those of tables that are not named look up as ever.
        versions: Made by ``Table.at``; at most one of each table.

    Raises:
        InvalidRequest: No layer of the model has such a table, or one is named twice.
    """
    by_id = {version.schema.table_id: version for version in versions}
    layers = [each for each in model.modules() if isinstance(each, (MemoryLayer, NgramLookup))]
    layers = [layer for layer in layers if layer.table.schema.table_id in by_id]
    unused = by_id.keys() - {layer.table.schema.table_id for layer in layers}
    if unused or len(by_id) < len(versions):
        names = [version.name for version in versions if version.schema.table_id in unused]
        what = f"has no layer of table {names[0]!r}" if unused else "is given two versions of one table"
        raise InvalidRequest(f"the model {what}: give a version, of table.at(...), of each table that its layers have")
    before = [(layer, layer.table) for layer in layers]
    try:
        for layer in layers:
            layer.use_table(by_id[layer.table.schema.table_id])
        yield
    finally:
        for layer, table in before:
            layer.use_table(table)


def values_of(model: nn.Module, table: Table) -> list[nn.Parameter]:
    """The parameters by which the model's layers stand for the table's values, or for its rows where they are another
    one's keys; not those that FSDP manages."""
    readers = [module for module in model.modules() if isinstance(module, (MemoryLayer, NgramLookup))]
    for reader in readers:
        reader.follow_values()
    found = [reader.values for reader in readers if reader.table is table]
    layers = [module for module in readers if isinstance(module, MemoryLayer)]
    found += [layer.pool_keys for layer in layers if layer.pool_keys is not None and layer.table.keys is table]
    return [parameter for parameter in found if type(parameter) is nn.Parameter]


def lr_factor_of(model: nn.Module, table: Table) -> float:
    """What a model's learning rate is multiplied with for a table.

    Raises:
        InvalidRequest: Modules that read it say different ones.
    """
    lookups = [each for each in model.modules() if isinstance(each, NgramLookup) and each.table is table]
    factors = sorted({lookup.lr_factor for lookup in lookups})
    if len(factors) > 1:
        raise InvalidRequest(
            f"lookups in table {table.name!r} have lr_factor {factors}, and it has one learning rate: give all the same"
        )
    return factors[0] if factors else 1.0


def _tables_in(part: Any, seen: set[int], depth: int) -> Iterator[Table]:
    if isinstance(part, Table):
        yield part
        return
    if depth == 0 or isinstance(part, (str, bytes, Tensor, type)) or id(part) in seen:
        return
    inner = _parts_of(part)
    if inner is not None:
        seen.add(id(part))
        for each in inner:
            yield from _tables_in(each, seen, depth - 1)


def _parts_of(part: Any) -> Iterable[Any] | None:
    """What a container holds; None where it is none, or one too large to hold tables."""
    if isinstance(part, Mapping):
        return None if len(part) > _MAX_ENTRIES else list(part.values())
    if isinstance(part, (list, tuple, set, frozenset)):
        return None if len(part) > _MAX_ENTRIES else list(part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return [getattr(part, each.name, None) for each in dataclasses.fields(part)]
    if isinstance(part, (nn.Module, SimpleNamespace)):
        return list(vars(part).values())
    return None
