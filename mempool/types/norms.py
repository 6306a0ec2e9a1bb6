"""Norms of any order above 0, of parts that come one after another: on shards of elements, in trainers of shards."""

import math
from collections.abc import Iterable


def joined_norm(norms: Iterable[float], order: float) -> float:
    """The norm of everything, of the norms of its parts. Neither overflows nor underflows where the answer does not."""
    parts = [norm for norm in norms if norm != 0.0]
    if not parts:
        return 0.0
    if any(math.isnan(part) for part in parts):
        return math.nan
    largest = max(parts)
    if order == math.inf or math.isinf(largest):
        return largest
    return float(largest * math.fsum((part / largest) ** order for part in parts) ** (1.0 / order))
