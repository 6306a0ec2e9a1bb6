"""The checks of a memory layer's sizes and choices, before anything is made."""

import math

from mempool.client import Table
from mempool.client.counts import as_count, as_number
from mempool.errors import InvalidRequest


def checked_int(name: str, number: object, *, at_least: int = 1) -> int:
    """An integer of any kind; raises InvalidRequest for what is none, or too small."""
    value = as_count(number)
    if value is None:
        raise InvalidRequest(f"{name} must be an integer, got {number!r}")
    if value < at_least:
        raise InvalidRequest(f"{name} must be at least {at_least}, got {value}")
    return value


def checked_key_dim(key_dim: object) -> int:
    """Raises InvalidRequest where a query has no two halves."""
    value = checked_int("key_dim", key_dim, at_least=2)
    if value % 2:
        raise InvalidRequest(f"key_dim must be even and at least 2 (two halves), got {value}")
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


def codebook_size(name: str, num_slots: int) -> int:
    """n of n * n slots; raises InvalidRequest where they are no square."""
    size = math.isqrt(num_slots)
    if size * size != num_slots:
        raise InvalidRequest(
            f"table {name!r} has {num_slots:_} slots, which is not a square; product keys need n * n."
            f" Nearest: {size**2:_} ({size}^2) or {(size + 1) ** 2:_} ({size + 1}^2)"
        )
    return size
