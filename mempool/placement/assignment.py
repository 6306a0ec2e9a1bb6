"""Which shard owns which page of one table: the value that the planner, the router and the moves share.

Knows nothing of bytes, addresses or epochs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mempool.errors import InvalidRequest

__all__ = ["MAX_SHARD", "Assignment", "Int32Array"]

Int32Array = npt.NDArray[np.int32]

MAX_SHARD = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """The owner of every page of one table; immutable.

    Args:
        owners: ``[P, C]`` integers, the shard that owns row page p of column block c.
        key_owners: ``[H]`` integers, the shard that owns the key page of head h; ``[0]`` where the table has none.

    Both are kept as read-only int32 arrays in C order; an array that could still be written to is copied.

    Raises:
        InvalidRequest: a wrong rank or dtype, no page at all, or a shard id outside 0 .. 2**31 - 1.
    """

    owners: Int32Array
    key_owners: Int32Array

    def __post_init__(self) -> None:
        owners = _frozen(self.owners, name="owners", rank=2)
        key_owners = _frozen(self.key_owners, name="key_owners", rank=1)
        if owners.size == 0:
            raise InvalidRequest(
                f"owners has shape {owners.shape}: a table has at least one row page and one column block."
            )
        object.__setattr__(self, "owners", owners)
        object.__setattr__(self, "key_owners", key_owners)

    @property
    def num_row_pages(self) -> int:
        return int(self.owners.shape[0])

    @property
    def num_blocks(self) -> int:
        return int(self.owners.shape[1])

    @property
    def num_key_pages(self) -> int:
        return int(self.key_owners.shape[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Assignment):
            return NotImplemented
        return np.array_equal(self.owners, other.owners) and np.array_equal(self.key_owners, other.key_owners)

    # Equal by content, and the content is large: not meant as a dictionary key.
    __hash__ = None  # type: ignore[assignment]


def _frozen(array: npt.NDArray[Any], *, name: str, rank: int) -> Int32Array:
    if not isinstance(array, np.ndarray) or array.ndim != rank or array.dtype.kind not in "iu":
        kind = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InvalidRequest(f"{name} must be an integer array of rank {rank}, not {kind}.")
    if array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > MAX_SHARD:
            raise InvalidRequest(f"{name} holds shard id {low if low < 0 else high}; shard ids are 0 .. {MAX_SHARD}.")
    # A view of something writable could change under us, so only an owner of its memory is taken as it is.
    if array.dtype == np.int32 and array.flags.c_contiguous and not array.flags.writeable and array.base is None:
        return array
    copied = np.array(array, dtype=np.int32, order="C")
    copied.flags.writeable = False
    return copied
