"""Gathers as arrays: what a small one on the CPU is asked and answered by, as to make a tensor costs as much as to sum
one of its bags. Named tuples, which are made by the interpreter's own code.

Legend: B bags, L pairs of all bags together, W columns.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mempool.types.messages import Envelope, Stamp

Array: TypeAlias = npt.NDArray[np.generic]


class ArrayGather(NamedTuple):
    """A ``GatherRequest`` whose answer is to be float32.

    Attributes:
        ids: [L] uint32.
        weights: [L] float32; None: all ones.
        offsets: [B + 1] int64.
        private: Nobody writes to the arrays.
    """

    envelope: Envelope
    lookup_id: int
    ids: Array
    weights: Array | None
    offsets: Array
    remember: bool
    release: tuple[int, ...]
    private: bool


class ArrayGathered(NamedTuple):
    """A ``GatherReply``. values: [B, W] float32, contiguous."""

    stamp: Stamp
    blocks: tuple[int, ...]
    values: Any
