"""The door of the engine: every request is checked here, and brought to the shard's device and dtypes.

Nothing behind it looks at a request's tensors. Those may be read-only views of a network frame, or the caller's own:
they are never written to, and what is kept (``own``) is a copy, as the caller may write to his and a small view would
keep its whole frame in memory.
"""

import math

import torch
from torch import Tensor

from mempool.errors import ContextMissing, InvalidRequest
from mempool.kernels import LAST_STEP
from mempool.shard.pages.named_arrays import KEYS, SCALES, Blocks, key_dim
from mempool.shard.pages.storage import Storage
from mempool.types import (
    CommitRequest,
    ProductKeySpec,
    ScoreRequest,
    StepId,
    TableSchema,
    UpdateRequest,
)
from mempool.types.bags import Bags

_FLOATS = (torch.float32, torch.bfloat16)
_IDS = (torch.int64, torch.uint32)
READ_ONLY = (SCALES, LAST_STEP)


def admit(tensor: Tensor, *, device: torch.device, dtype: torch.dtype, own: bool = False) -> Tensor:
    """The tensor on the device, contiguous, without gradient; with ``own`` in memory that nobody else has."""
    admitted = tensor.detach().to(device=device, dtype=dtype).contiguous()
    if own and admitted.data_ptr() == tensor.data_ptr() and tensor.numel():
        return admitted.clone()
    return admitted


def check_ids(schema: TableSchema, ids: Tensor, *, what: str = "ids") -> Tensor:
    """Slot ids as int64, where they are.

    Raises:
        InvalidRequest: Not a vector of int64 or uint32, or an id that is no slot of the table.
    """
    return _check_range(schema, ids, schema.num_slots, what=what, kind="a slot")


def check_heads(schema: TableSchema, heads: Tensor) -> Tensor:
    """Head numbers as int64, where they are. Raises InvalidRequest as ``check_ids`` does."""
    return _check_range(schema, heads, schema.num_key_pages, what="ids", kind="a head of the keys")


def _check_range(schema: TableSchema, ids: Tensor, limit: int, *, what: str, kind: str) -> Tensor:
    if ids.dim() != 1 or ids.dtype not in _IDS:
        raise InvalidRequest(f"{what} must be a vector of int64 or uint32, not {_shown(ids)}. Nothing was changed.")
    numbers = ids.detach().to(torch.int64)
    if numbers.numel():
        lowest, highest = numbers.aminmax()
        if int(lowest) < 0 or int(highest) >= limit:
            position = int(((numbers < 0) | (numbers >= limit)).nonzero()[0, 0])
            raise InvalidRequest(
                f"{what}[{position}] = {int(numbers[position])} is not {kind} of table {schema.name!r}, which has "
                f"{limit:,} (0 to {limit - 1}). Nothing was changed."
            )
    return numbers


def check_bags(table: Storage, ids: Tensor, weights: Tensor | None, offsets: Tensor, *, own: bool) -> Bags:
    """Bags on the shard's device.

    Raises:
        InvalidRequest: Wrong ids, weights that do not fit them, or offsets that do not ascend from 0 to their number.
    """
    numbers = check_ids(table.schema, ids)
    num_pairs = numbers.shape[0]
    if weights is not None and (tuple(weights.shape) != (num_pairs,) or weights.dtype not in _FLOATS):
        raise InvalidRequest(
            f"weights must be [{num_pairs}] float32 or bfloat16, as there are {num_pairs} ids, not {_shown(weights)}. "
            "Nothing was changed."
        )
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
        raise InvalidRequest(f"offsets must be a vector of B + 1 int64, not {_shown(offsets)}. Nothing was changed.")
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_pairs:
        raise InvalidRequest(
            f"offsets go from {int(offsets[0])} to {int(offsets[-1])}; they must go from 0 to {num_pairs}, the number "
            "of ids. Nothing was changed."
        )
    steps = offsets.diff()
    if steps.numel() and int(steps.min()) < 0:
        position = int((steps < 0).nonzero()[0, 0])
        raise InvalidRequest(
            f"offsets must not descend: offsets[{position}] = {int(offsets[position])} is followed by "
            f"{int(offsets[position + 1])}. Nothing was changed."
        )
    own_ids = own and numbers.data_ptr() == ids.data_ptr()
    return Bags(
        ids=admit(numbers, device=table.device, dtype=torch.int64, own=own_ids),
        weights=None if weights is None else admit(weights, device=table.device, dtype=torch.float32, own=own),
        offsets=admit(offsets, device=table.device, dtype=torch.int64, own=own),
    )


def check_update(table: Storage, request: UpdateRequest, remembered: Bags | None) -> tuple[Bags, Tensor]:
    """The update's bags, those it brings or else those remembered, and its gradient [B, W] float32.

    Raises:
        InvalidRequest: Wrong bags, blocks or gradient, or a step or sequence below 0.
        ContextMissing: It brings no bags and none are remembered.
    """
    check_step(request.step_id, (request.sequence,))
    _check_blocks(table, request.blocks, table.blocks)
    if (request.ids is None) != (request.offsets is None):
        raise InvalidRequest("an update brings both ids and offsets, or neither. Nothing was changed.")
    if request.ids is not None and request.offsets is not None:
        bags = check_bags(table, request.ids, request.weights, request.offsets, own=request.hold)
    elif remembered is None:
        raise ContextMissing(
            f"shard {table.shard} does not remember lookup {request.lookup_id}; send its ids, weights, offsets again",
            shard=table.shard,
        )
    else:
        bags = remembered
    shape = (bags.num_bags, table.schema.width(table.blocks))
    if tuple(request.grads.shape) != shape or request.grads.dtype not in _FLOATS:
        raise InvalidRequest(
            f"grads must be {list(shape)} float32 or bfloat16 ({shape[0]} bags, {shape[1]} columns of blocks "
            f"{table.blocks}), not {_shown(request.grads)}. Nothing was changed."
        )
    return bags, admit(request.grads, device=table.device, dtype=torch.float32, own=request.hold)


def check_step(step_id: StepId, sequences: tuple[int, ...]) -> None:
    """Raises InvalidRequest for negative numbers, and for a sequence named twice."""
    if step_id.step < 0 or step_id.rank < 0 or any(sequence < 0 for sequence in sequences):
        raise InvalidRequest(
            f"step {step_id.step}, rank {step_id.rank} and the sequences must not be negative. Nothing was changed."
        )
    if len(set(sequences)) != len(sequences):
        twice = next(sequence for sequence in sequences if sequences.count(sequence) > 1)
        raise InvalidRequest(f"sequence {twice} is named twice in step {step_id.step}. Nothing was changed.")


def check_commit(request: CommitRequest) -> None:
    """Raises InvalidRequest for wrong sequences and for a learning rate or scale that no step can have."""
    check_step(request.step_id, request.sequences)
    if not math.isfinite(request.lr) or request.lr < 0:
        raise InvalidRequest(f"lr = {request.lr} must be a finite number, 0 or more. Nothing was changed.")
    if not math.isfinite(request.grad_scale):
        raise InvalidRequest(
            f"grad_scale = {request.grad_scale} must be finite; discard a step whose gradient overflowed. "
            "Nothing was changed."
        )


def check_score(table: Storage, request: ScoreRequest) -> Tensor:
    """Queries [B, H, D] float32 on the shard's device.

    Raises:
        InvalidRequest: The table keeps no keys in the pool, another shape or dtype, a query that is not finite, or a
            top-k the keys cannot give.
    """
    schema, queries = table.schema, request.queries
    if schema.keys is None:
        raise InvalidRequest(
            f"table {schema.name!r} has no keys in the pool to score queries against; make it with "
            "keys=mempool.ProductKeys(...) or mempool.FlatKeys(...), or keep the keys in the model"
        )
    heads = schema.num_key_pages or 1
    if queries.dim() != 3 or tuple(queries.shape[1:]) != (heads, key_dim(schema)) or queries.dtype != torch.float32:
        raise InvalidRequest(
            f"queries must be [B, {heads}, {key_dim(schema)}] float32 (bags, heads, key_dim), not {_shown(queries)}"
        )
    if not 1 <= request.topk <= schema.num_slots:
        raise InvalidRequest(
            f"topk = {request.topk} must be 1 to {schema.num_slots}, the number of slots of table {schema.name!r}"
        )
    finite = queries.isfinite()
    if not bool(finite.all()):
        bag, head, column = (int(number) for number in (~finite).nonzero()[0])
        raise InvalidRequest(
            f"queries[{bag}, {head}, {column}] = {float(queries[bag, head, column])}: a query that is not finite has "
            "no top-k; look where it comes from"
        )
    return admit(queries, device=table.device, dtype=torch.float32)


def check_array(table: Storage, name: str, ids: Tensor) -> Tensor:
    """Ids of rows of a named array, int64 on the shard's device.

    Raises:
        InvalidRequest: No such array, or ids that it has no rows for.
    """
    schema = table.schema
    if name == KEYS and isinstance(schema.keys, ProductKeySpec):
        numbers = check_heads(schema, ids)
    elif name in table.arrays:
        numbers = check_ids(schema, ids)
    else:
        names = [*table.arrays, *([KEYS] if isinstance(schema.keys, ProductKeySpec) else [])]
        raise InvalidRequest(f"table {schema.name!r} has no array {name!r}; it has {', '.join(names)}")
    return admit(numbers, device=table.device, dtype=torch.int64)


def check_rows(table: Storage, name: str, ids_M: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
    """Rows to write, on the shard's device.

    Raises:
        InvalidRequest: Other blocks than those owned, another shape or dtype, or an array that is only read.
    """
    if name in READ_ONLY:
        raise InvalidRequest(f"{name!r} follows from what else is written and is only read; write the values")
    _check_blocks(table, blocks, table.row_blocks(name))
    shape = (ids_M.shape[0], table.row_width(name))
    if tuple(rows.shape) != shape or rows.dtype not in _FLOATS:
        raise InvalidRequest(
            f"rows of {name!r} must be {list(shape)} float32 or bfloat16, not {_shown(rows)}. Nothing was changed."
        )
    return admit(rows, device=table.device, dtype=rows.dtype)


def _check_blocks(table: Storage, blocks: Blocks, expected: Blocks) -> None:
    if tuple(blocks) != expected:
        raise InvalidRequest(
            f"blocks {tuple(blocks)} are not those that shard {table.shard} owns of table {table.schema.name!r}: "
            f"{expected}. Nothing was changed."
        )


def _shown(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
