"""The checks of a caller's bags before anything is sent, and of ids in general.

Legend: B bags, L pairs of all bags together.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mempool.client.counts import as_count
from mempool.client.gathers.untraced import untraced
from mempool.errors import InvalidRequest

_NARROW_SLOTS = 2**31
"""Of tables whose ids are kept and sent in half the bytes."""
_CACHED_BAGS = 2**16
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def checked_bags(
    ids: Tensor, weights: Tensor | None, offsets: Tensor | None, *, num_slots: int, table: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A caller's bags as flat tensors, after all checks.

    Args:
        ids: [B, L] integers; or [L] with ``offsets``.
        weights: The shape of ids, floating; None means all ones.
        offsets: [B + 1] integers from 0 to L, ascending; only with ids of one dimension.

    Returns:
        ids [L] on the CPU, a copy of its own, int32 where the table has at most 2^31 slots, else int64; weights [L], a
        differentiable view of the caller's, on its device; offsets [B + 1] int64 on the CPU, not the caller's, which
        nobody writes to.

    Raises:
        InvalidRequest: Naming the tensor, the value and its position.
    """
    require_integers("ids", ids, table=table)
    if weights is not None:
        _require_weights(weights, ids, table=table)
    if offsets is None:
        if ids.dim() != 2:
            raise InvalidRequest(
                f"gather of table {table!r}: ids has shape {list(ids.shape)}; give ids [B, L], or ids [L] with "
                "offsets [B + 1]."
            )
        num_bags, bag_pairs = ids.shape
        checked_offsets = _even_offsets(num_bags, bag_pairs)
    else:
        checked_offsets = _checked_offsets(offsets, ids, table=table)
    here = ids if ids.device.type == "cpu" else ids.cpu()
    require_in_range(here, num_slots=num_slots, table=table)
    own_ids = own_copy(here, torch.int32 if num_slots <= _NARROW_SLOTS else torch.int64)
    return own_ids.reshape(-1), None if weights is None else weights.reshape(-1), checked_offsets


@lru_cache(maxsize=32)
def _cached_offsets(num_bags: int, bag_pairs: int) -> Tensor:
    return torch.from_numpy(np.arange(num_bags + 1, dtype=np.int64) * bag_pairs)


def _even_offsets(num_bags: int, bag_pairs: int) -> Tensor:
    """Of bags that have as many pairs each; those of one training step are those of the next."""
    make = _cached_offsets if num_bags <= _CACHED_BAGS else _cached_offsets.__wrapped__
    return make(num_bags, bag_pairs)


@untraced  # how many pairs are left depends on the ids
def without_padding(
    ids: Tensor, weights: Tensor | None, offsets: Tensor | None, *, padding_idx: object, num_slots: int, table: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A caller's bags less the pairs of one slot, as torch.nn.functional.embedding_bag leaves them out.

    Args:
        ids, weights, offsets: As of ``checked_bags``.
        padding_idx: The slot; a negative one counts from the end.

    Returns:
        ids [L'] on the caller's device; weights [L'], differentiable, with gradient 0 where a pair was left out;
        offsets [B + 1].

    Raises:
        InvalidRequest: As ``checked_bags``; or there is no such slot.
    """
    slot = as_count(padding_idx)
    if slot is None or not -num_slots <= slot < num_slots:
        raise InvalidRequest(
            f"gather of table {table!r}: padding_idx = {padding_idx!r} must be one of its {num_slots} slots (a "
            "negative one counts from the end, as in torch); its row is left out, whatever it holds."
        )
    flat_ids, flat_weights, flat_offsets = checked_bags(ids, weights, offsets, num_slots=num_slots, table=table)
    kept = flat_ids != slot % num_slots
    before = torch.zeros(flat_ids.shape[0] + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(kept, dim=0, out=before[1:])
    if flat_weights is not None:
        flat_weights = flat_weights[kept.to(flat_weights.device)]
    return flat_ids[kept].to(ids.device), flat_weights, before[flat_offsets]


def require_in_range(ids: Tensor, *, num_slots: int, table: str, what: str = "slots") -> None:
    """Raises InvalidRequest for the first of ``ids`` that is not from 0 to num_slots - 1, with its position."""
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < num_slots:
        return
    position = torch.nonzero((ids < 0) | (ids >= num_slots))[0].tolist()
    value = int(ids[tuple(position)])
    raise InvalidRequest(
        f"ids{position} = {value} is outside table {table!r}: it has {num_slots} {what}, 0 to {num_slots - 1}."
    )


def own_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` on the CPU, contiguous, without its graph, sharing no memory with the caller's.

    What is sent is kept until the step is committed and an embedded shard remembers it: the caller may write over
    its own tensors meanwhile.
    """
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def require_integers(name: str, tensor: object, *, table: str) -> None:
    """Raises InvalidRequest unless ``tensor`` is a tensor of integers."""
    if not isinstance(tensor, Tensor):
        raise InvalidRequest(f"table {table!r}: {name} must be a torch.Tensor, not {type(tensor).__name__}.")
    if tensor.dtype not in _INTEGERS:
        raise InvalidRequest(f"table {table!r}: {name} must be of an integer dtype (int64), not {tensor.dtype}.")
    require_dense(name, tensor, table=table)


def require_dense(name: str, tensor: Tensor, *, table: str) -> None:
    """Raises InvalidRequest for a tensor without data, or whose data are not one block of numbers."""
    if tensor.is_meta:
        raise InvalidRequest(f"table {table!r}: {name} is on the meta device, and has no data to send.")
    if tensor.is_nested:
        raise InvalidRequest(
            f"table {table!r}: {name} is a nested tensor; give its values() and offsets(), as with EmbeddingBag."
        )
    if tensor.layout is not torch.strided:
        raise InvalidRequest(f"table {table!r}: {name} is of layout {tensor.layout}; give {name}.to_dense().")


def _require_weights(weights: object, ids: Tensor, *, table: str) -> None:
    if not isinstance(weights, Tensor):
        raise InvalidRequest(
            f"gather of table {table!r}: weights must be a torch.Tensor, not {type(weights).__name__}."
        )
    if not weights.is_floating_point():
        raise InvalidRequest(f"gather of table {table!r}: weights must be of a floating dtype, not {weights.dtype}.")
    require_dense("weights", weights, table=table)
    if weights.shape != ids.shape:
        raise InvalidRequest(
            f"gather of table {table!r}: weights has shape {list(weights.shape)}, ids has {list(ids.shape)}; "
            "they must agree."
        )


def _checked_offsets(offsets: Tensor, ids: Tensor, *, table: str) -> Tensor:
    require_integers("offsets", offsets, table=table)
    if ids.dim() != 1 or offsets.dim() != 1 or offsets.shape[0] == 0:
        raise InvalidRequest(
            f"gather of table {table!r}: with offsets, ids must be [L] and offsets [B + 1]; they have shapes "
            f"{list(ids.shape)} and {list(offsets.shape)}."
        )
    checked = own_copy(offsets, torch.int64)
    first, last, num_pairs = int(checked[0]), int(checked[-1]), ids.shape[0]
    if first != 0 or last != num_pairs:
        raise InvalidRequest(
            f"gather of table {table!r}: offsets must begin with 0 and end with the number of pairs, {num_pairs}; they "
            f"begin with {first} and end with {last}. {_offsets_advice(first, last, num_pairs)}"
        )
    falls = torch.nonzero(checked[1:] < checked[:-1])
    if falls.numel():
        at = int(falls[0]) + 1
        raise InvalidRequest(
            f"gather of table {table!r}: offsets must not fall, but offsets[{at}] = {int(checked[at])} follows "
            f"{int(checked[at - 1])}."
        )
    return checked


def _offsets_advice(first: int, last: int, num_pairs: int) -> str:
    if first == 0 and 0 <= last < num_pairs:
        return (
            f"(torch.nn.EmbeddingBag leaves out the pairs from {last} on if include_last_offset=True: for that give "
            f"ids[:{last}]. Without it its offsets are [B], and the last bag has all the rest: for that append "
            f"{num_pairs}.)"
        )
    return "(offsets [B + 1]: as of torch.nn.EmbeddingBag with include_last_offset=True.)"
