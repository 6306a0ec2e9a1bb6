"""Reading and writing rows: weighted sums of bags, rows by slot id, initial values.

Arguments are checked, the device picks the implementation.

Legend: B bags, L pairs in all bags, M rows asked for, R arena rows, W arena row width.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.checking import (
    check_bags,
    check_ids,
    check_matrix,
    check_output,
    check_output_dtype,
    check_weights,
)
from mempool.kernels.implementation import implementation_for


def weighted_sum(
    paged: Paged,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Sum the weighted values of each bag.

    Accumulates in float32, pair after pair, every column apart from the others and by fused multiply-adds, rounded once
    a pair: the sum over a slice of an arena's columns is bitwise the slice of the sum. Of packed rows, the weight is
    first multiplied with the block's scale, then with the element. The sum is rounded to ``dtype`` once, at the end.
    Where neither Numba nor Triton is there, torch's own operations round each product too.

    Args:
        paged: The values.
        ids: [L] int64, int32 or uint32 slot ids; pairs that are not here contribute nothing.
        weights: [L] float32, or None for all ones.
        offsets: [B + 1] int64; the pairs of bag b are ``offsets[b]:offsets[b + 1]``. Starts with 0, ends with L.
        dtype: Of the result: float32, bfloat16 or float16.
        out: [B, W] in ``dtype``, contiguous: where the result is written, every element. None: new memory.
        checked: All that is given is known to be as it must, ids int64 or int32: of a small call, looking once more
            takes as long as its sums. Offsets are looked at all the same.

    Returns:
        [B, W] in ``dtype``: ``out`` where it was given.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or offsets are not as above (on the CPU, before
            anything is written).
    """
    device = paged.rows.device
    if not checked:
        ids = check_bags(paged, ids, offsets)
        check_weights(weights, ids)
        check_output_dtype(dtype)
        check_output(out, (offsets.numel() - 1, paged.width), dtype, device)
    return implementation_for(device).weighted_sum(paged, ids, weights, offsets, dtype, out)


class ArraySums(Protocol):
    """See ``array_sums``."""

    def __call__(
        self,
        paged: Paged,
        ids: npt.NDArray[Any],
        weights: npt.NDArray[Any] | None,
        offsets: npt.NDArray[Any],
        *,
        num_slots: int,
        private: bool,
        out: npt.NDArray[Any],
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None: ...


@functools.cache
def array_sums() -> ArraySums | None:
    """``admit_bags`` and ``weighted_sum`` of bags that are arrays of the CPU; None where Numba is not there.

    Of a small call, making tensors of arrays and arrays of tensors takes longer than its sums. What is returned takes:

        paged: The values, on the CPU.
        ids: [L] uint32 slot ids, contiguous, of a table of at most 2**31 slots.
        weights: [L] float32, contiguous, or None for all ones.
        offsets: [B + 1] int64, contiguous.
        num_slots: Ids lie below.
        private: Nobody else writes to ids and offsets; else they are copied before they are relied on.
        out: [B, W] float32, contiguous: where the sums are written, every element, with the bits of ``weighted_sum``.

    It returns ids [L] int32 and offsets [B + 1] as they were read, nobody else's if not ``private``; None where an id
    or an offset is wrong, and then nothing is written.
    """
    module: Any = implementation_for(torch.device("cpu"))
    found: ArraySums | None = getattr(module, "sum_arrays", None)
    return found


def gather_rows(paged: Paged, ids: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Read rows.

    Args:
        paged: The values.
        ids: [M] int64, int32 or uint32 slot ids.
        dtype: Of the result: float32, bfloat16 or float16; None for ``paged.value_dtype``, the stored bits as they are.

    Returns:
        [M, W] in ``dtype``; zeros for slots that are not here.
    """
    ids = check_ids(paged, ids)
    dtype = paged.value_dtype if dtype is None else dtype
    check_output_dtype(dtype)
    return implementation_for(paged.rows.device).gather_rows(paged, ids, dtype)


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """Write rows in place; of repeated ids the last wins, slots that are not here are skipped.

    Packed rows get new scales, and elements rounded to nearest, ties to even.

    Args:
        paged: The values, written in place.
        ids: [M] int64, int32 or uint32 slot ids.
        values: [M, W] in ``paged.value_dtype``.
    """
    ids = check_ids(paged, ids)
    check_matrix("values", values, (ids.numel(), paged.width), paged.value_dtype, paged.rows.device)
    implementation_for(paged.rows.device).scatter_rows(paged, ids, values)


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Gradient of weighted_sum with respect to the weights: ``<grads[bag], V[id]>`` for each pair.

    Args:
        paged: The values.
        ids: [L] int64, int32 or uint32 slot ids.
        offsets: [B + 1] int64, as in weighted_sum.
        grads: [B, W] float32, the gradient of the sums.
        out: [L] float32, contiguous: where the result is written, every element. None: new memory.

    Returns:
        [L] float32, 0 for pairs that are not here, accumulated in float32: ``out`` where it was given.
    """
    ids = check_bags(paged, ids, offsets)
    check_output(out, (ids.numel(),), torch.float32, paged.rows.device)
    check_matrix("grads", grads, (offsets.numel() - 1, paged.width), torch.float32, paged.rows.device)
    return implementation_for(paged.rows.device).weight_gradient(paged, ids, offsets, grads, out)


def initial_values(
    seed: int, slots_start: int, num_slots: int, column_start: int, num_columns: int, std: float
) -> Tensor:
    """Initial values of a table: N(0, std**2), each a function of (seed, slot, column) alone.

    Every slicing, machine and implementation gives the same bits; see reference.initial_values for the generator.

    Args:
        seed: The table's seed.
        slots_start: First slot.
        num_slots: Slots, one a row.
        column_start: First column.
        num_columns: Columns.
        std: Standard deviation.

    Returns:
        [num_slots, num_columns] float32 on the CPU.
    """
    return implementation_for(torch.device("cpu")).initial_values(
        seed,
        slots_start=slots_start,
        num_slots=num_slots,
        column_start=column_start,
        num_columns=num_columns,
        std=std,
    )
