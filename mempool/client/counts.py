"""Numbers as callers give them: any kind of integer or real number, numpy's and torch's too, but no bool or text."""

import math
import operator

from mempool.errors import InvalidRequest


def as_count(value: object) -> int | None:
    """``value`` as an int; None where it is no integer, or a bool (of Python, numpy or torch)."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # that it may have no __index__ is the question
    except TypeError:
        return None


def as_number(value: object) -> float:
    """``value`` as a float; NaN where it is no number, a bool or text."""
    if isinstance(value, (bool, str, bytes)):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]  # that it may have no __float__ is the question
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def shard_count(shards: object) -> int:
    """Raises InvalidRequest unless a pool can have so many shards."""
    count = as_count(shards)
    if count is None or count < 1:
        raise InvalidRequest(f"shards = {shards!r}: a pool has at least 1 shard, a whole number.")
    return count
