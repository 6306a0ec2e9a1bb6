"""Where each token is within its sequence, whatever way a batch says it: nothing looks back over a sequence's begin.

Legend: B batch, T tokens.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from mempool.errors import InvalidRequest

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Packing(TypedDict, total=False):
    """How a batch says where its sequences are; at most one of the first three.

    Keys:
        segment_ids: [..., T] integers: tokens beside each other are of one sequence where they are equal.
        positions: [..., T] integers: 0 where a sequence begins, and one more with each token (``position_ids``).
        cu_seqlens: [S + 1] integers, from 0 to T: where sequences begin in one row of tokens, as FlashAttention has it.
        mask: [..., T] bool, or integers of 0 and 1: False for padding, wherever it is (``attention_mask``).
    """

    segment_ids: Tensor | None
    positions: Tensor | None
    cu_seqlens: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Attributes:
    positions: [B, T] int64 on the CPU, within a sequence from 0; 0 of padding.
    real: [B, T] bool on the CPU, False for padding; None: there is none.
    """

    positions: Tensor
    real: Tensor | None


def places_of(
    tokens: Tensor,
    *,
    segment_ids: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Places:
    """Where the tokens of a batch are.

    Args:
        tokens: [..., T].
        segment_ids, positions, cu_seqlens, mask: As of ``Packing``.

    Raises:
        InvalidRequest: They contradict each other, or are of another shape than the tokens.
    """
    given = [
        name
        for name, each in (("segment_ids", segment_ids), ("positions", positions), ("cu_seqlens", cu_seqlens))
        if each is not None
    ]
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} both say where sequences begin: give one of them")
    length = tokens.shape[-1]
    rows = tokens.numel() // length if length else 0
    index = torch.arange(length, dtype=torch.int64, device="cpu").expand(rows, length)
    if not given and mask is None:
        return Places(index, None)
    starts = torch.zeros(rows, length, dtype=torch.bool, device="cpu")
    starts[:, :1] = True
    real = None if mask is None else _real(mask, tokens).reshape(rows, length)
    if segment_ids is not None:
        segments = _integers("segment_ids", segment_ids, tokens).reshape(rows, length)
        starts[:, 1:] |= segments[:, 1:] != segments[:, :-1]
    if positions is not None:
        checked = _integers("positions", positions, tokens).reshape(rows, length)
        _require_whole(checked, real)
        starts |= checked == 0
    if cu_seqlens is not None:
        starts[0, _begins(cu_seqlens, rows, length)] = True
    if real is not None:
        starts[:, 1:] |= real[:, 1:] & ~real[:, :-1]
    begins = torch.where(starts, index, 0)
    within = index - begins.cummax(dim=1).values if length else begins
    return Places(within if real is None else torch.where(real, within, 0), real)


def _real(mask: Tensor, tokens: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        raise InvalidRequest(f"mask is {_shape(mask)} for tokens of {list(tokens.shape)}; they must agree")
    here = mask.detach().to("cpu", copy=True)  # of a prefetch it is read later
    if here.dtype != torch.bool and not bool(((here == 0) | (here == 1)).all()):
        raise InvalidRequest("mask has values that are neither 0 nor 1: give True (or 1) for tokens, False for padding")
    return here.to(torch.bool)


def _integers(name: str, given: Tensor, tokens: Tensor) -> Tensor:
    if not isinstance(given, Tensor) or given.dtype not in _INTEGERS:
        raise InvalidRequest(f"{name} must be a tensor of integers, got {getattr(given, 'dtype', type(given))}")
    if given.shape != tokens.shape:
        raise InvalidRequest(f"{name} is {_shape(given)} for tokens of {list(tokens.shape)}; they must agree")
    return given.detach().to("cpu", torch.int64)


def _require_whole(positions: Tensor, real: Tensor | None) -> None:
    """A token that is not the first of its sequence comes right after the one before."""
    follows = torch.zeros_like(positions, dtype=torch.bool)
    follows[:, 1:] = positions[:, 1:] == positions[:, :-1] + 1
    follows &= positions > 0
    if real is not None:
        follows[:, 1:] &= real[:, :-1]
    wrong = ~(follows | (positions == 0))
    if real is not None:
        wrong &= real
    if bool(wrong.any()):
        row, at = torch.nonzero(wrong)[0].tolist()
        before = f"{int(positions[row, at - 1])}" if at else "nothing"
        raise InvalidRequest(
            f"positions[{row}, {at}] = {int(positions[row, at])} comes after {before}: positions count from 0 where a"
            " sequence begins, and the tokens before are needed; give whole sequences"
        )


def _begins(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    """Of sequences that have tokens."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in _INTEGERS or cu_seqlens.dim() != 1:
        raise InvalidRequest(f"cu_seqlens must be a tensor [sequences + 1] of integers, got {_shape(cu_seqlens)}")
    bounds = cu_seqlens.detach().to("cpu", torch.int64)
    if rows != 1:
        raise InvalidRequest(f"cu_seqlens are of one row of tokens, got {rows} rows: give tokens [1, T], or [T]")
    ends = bounds[[0, -1]].tolist() if bounds.numel() else []
    if ends != [0, length] or bool((bounds[1:] < bounds[:-1]).any()):
        raise InvalidRequest(f"cu_seqlens must rise from 0 to the {length} tokens, got {_short(bounds)}")
    return bounds[:-1][bounds[:-1] < length]


def _shape(given: object) -> str:
    return str(list(given.shape)) if isinstance(given, Tensor) else type(given).__name__


def _short(numbers: Tensor) -> str:
    shown = ", ".join(map(str, numbers[:8].tolist()))
    return f"[{shown}{', ...' if numbers.numel() > 8 else ''}]"
