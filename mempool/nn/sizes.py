"""The checks of a memory layer's sizes and choices, before anything is made."""

import math

from mempool.client import Table
from mempool.client.counts import as_count, as_number
from mempool.errors import InvalidRequest
from mempool.types import TrainedKeySpec
from mempool.types.keys import least_root


def checked_int(name: str, number: object, *, at_least: int = 1) -> int:
    """An integer of any kind; raises InvalidRequest for what is none, or too small."""
    value = as_count(number)
    if value is None:
        raise InvalidRequest(f"{name} must be an integer, got {number!r}")
    if value < at_least:
        raise InvalidRequest(f"{name} must be at least {at_least}, got {value}")
    return value


def checked_key_dim(key_dim: object, *, parts: int = 2) -> int:
    """Width of a query; None: 128, or the next that can be cut. Raises InvalidRequest where it has no such parts."""
    if key_dim is None:
        return parts * -(-128 // parts)
    value = checked_int("key_dim", key_dim)
    if value % parts:
        if parts == 2:
            raise InvalidRequest(f"key_dim must be even and at least 2 (two halves), got {value}")
        above = parts * -(-value // parts)
        raise InvalidRequest(f"key_dim must be a multiple of {parts} (as many parts of a query), got {value}: {above}?")
    return value


def checked_topk(topk: object, *, num_slots: int) -> int:
    """Raises InvalidRequest where there are not as many slots."""
    value = checked_int("topk", topk)
    if value > num_slots:
        raise InvalidRequest(f"topk must be from 1 to the table's {num_slots} slots, got {value}")
    return value


def checked_dropout(name: str, dropout: object) -> float:
    """Raises InvalidRequest for what is no probability in [0, 1)."""
    probability = as_number(dropout)
    if not 0.0 <= probability < 1.0:
        raise InvalidRequest(f"{name} = {dropout!r} must be a probability: at least 0, below 1")
    return probability


def checked_std(name: str, std: object) -> float:
    """Raises InvalidRequest for what is no finite number of at least 0."""
    value = as_number(std)
    if not 0.0 <= value < math.inf:
        raise InvalidRequest(f"{name} = {std!r} must be a finite number of at least 0")
    return value


def checked_table(table: object) -> Table:
    """Raises InvalidRequest for what is no table."""
    if isinstance(table, Table):
        return table
    how = f"pool.table({table!r})" if isinstance(table, str) else "pool.table(name) or pool.create_table(...)"
    raise InvalidRequest(f"table = {table!r} is no table of a pool: give {how}")


def checked_pool_keys(
    table: Table, heads: int | None, key_dim: int | None, ways: int | None, **others: object
) -> TrainedKeySpec:
    """What a table says of the keys that it trains, where a layer has none of its own.

    Args:
        heads, key_dim, ways: As the layer was given them; None: as the table has them.
        others: By name what the layer was given that is of keys in the model alone; None and False where it was not.

    Raises:
        InvalidRequest: The table trains none, or others than the layer asks for.
    """
    keys = table.schema.keys
    if not isinstance(keys, TrainedKeySpec):
        raise InvalidRequest(
            f'keys = "pool", and table {table.name!r} trains no keys: make it with keys=mempool.ProductKeys(...,'
            ' optimizer=...) or HierarchicalKeys(...), or leave the keys in the model (keys="model")'
        )
    there = {"heads": keys.heads, "key_dim": keys.key_dim, "ways": keys.ways if keys.product else 1}
    if keys.groups:
        del there["heads"]  # which share them
    for name, asked in (("heads", heads), ("key_dim", key_dim), ("ways", ways)):
        if asked is not None and asked != there.get(name, asked):
            raise InvalidRequest(
                f"{name} = {asked!r}, and the keys of table {table.name!r} have {name} = {there[name]}: they"
                " are the pool's, so leave it out"
            )
    if wrong := [name for name, given in others.items() if given is not None and given is not False]:
        raise InvalidRequest(f'{wrong[0]} is of keys in the model, and with keys = "pool" there are none; leave it out')
    return keys


def codebook_size(name: str, num_slots: int, ways: int) -> int:
    """The fewest half-keys n of a codebook with n ** ways >= num_slots.

    Raises:
        InvalidRequest: A codebook would have one half-key, which chooses nothing.
    """
    if ways > 2 and num_slots < 2**ways:
        most = max(2, num_slots.bit_length() - 1)
        raise InvalidRequest(
            f"ways = {ways} needs {2**ways:_} slots, two half-keys in each codebook, and table {name!r} has"
            f" {num_slots:_}: give at most {most} ways, or more slots"
        )
    return least_root(num_slots, ways)
