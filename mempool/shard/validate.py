"""The door of the engine: every request is checked here, and brought to the shard's device and dtypes.

Numbers, names and sizes of answers are for ``bounds``. Nothing behind the door looks at a request's tensors. Those may
be read-only views of a network frame, or the caller's own: they are never written to, and what is kept (``own``) is a
copy, as the caller may write to his and a small view would keep its whole frame in memory.
"""

import torch
from torch import Tensor

from mempool import kernels
from mempool.errors import ContextMissing, InvalidRequest
from mempool.shard.bounds import (
    check_lookup_id,
    check_released,
    check_reply,
    shown,
    shown_numbers,
)
from mempool.shard.pages.named_arrays import (
    KEYS,
    LAST_STEP,
    LAST_USE,
    SCALES,
    USES,
    VALUE_DTYPES,
    VALUES,
    Blocks,
    key_dim,
)
from mempool.shard.pages.scoring import Picked
from mempool.shard.pages.storage import Storage
from mempool.types import (
    GatherRequest,
    OwnKeySpec,
    ProductKeySpec,
    ReadRowsRequest,
    ScoreRequest,
    TableSchema,
    TrainedKeySpec,
    UpdateRequest,
)
from mempool.types.bags import Bags
from mempool.types.keys import grouping_of, key_table_name
from mempool.types.schema_checks import GROUP_RANGES

_FLOATS = (torch.float32, torch.bfloat16)
_IDS = (torch.int64, torch.uint32)
_REPLIES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
READ_ONLY = (SCALES, LAST_STEP, USES, LAST_USE)
_ADMITTED = "admitted"


def admit(tensor: Tensor, *, device: torch.device, dtype: torch.dtype, own: bool = False) -> Tensor:
    """The tensor on the device, contiguous, without gradient; with ``own`` in memory that nobody else has."""
    admitted = tensor.detach() if tensor.requires_grad else tensor
    if admitted.device != device or admitted.dtype != dtype:
        admitted = admitted.to(device=device, dtype=dtype)
    if not admitted.is_contiguous():
        admitted = admitted.contiguous()
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


def _check_vector(ids: Tensor, what: str = "ids") -> None:
    if ids.dim() != 1 or ids.dtype not in _IDS:
        raise InvalidRequest(f"{what} must be a vector of int64 or uint32, not {_shown(ids)}. Nothing was changed.")


def _check_range(schema: TableSchema, ids: Tensor, limit: int, *, what: str, kind: str) -> Tensor:
    _check_vector(ids, what)
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


def check_bags(
    table: Storage,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    *,
    own: bool,
    private: bool = False,
    bags: Bags | None = None,
) -> Bags:
    """Bags on the shard's device, ids in the table's ``id_dtype``. Ids and offsets are gone through once, whichever
    shards of this process are given the same ``bags``.

    Args:
        own: What is returned is in memory that nobody else has.
        private: What is given is not written to by anybody.
        bags: What the tensors belong to, where that is so.

    Raises:
        InvalidRequest: Wrong ids, weights that do not fit them, or offsets that do not ascend from 0 to their number.
    """
    as_here = _ADMITTED, table.schema.num_slots, table.id_dtype, table.device
    if bags is not None and (known := bags.made.get(as_here)) is not None:
        admitted_before: Bags = known
        return admitted_before
    _check_vector(ids)
    num_pairs = ids.shape[0]
    if weights is not None and (tuple(weights.shape) != (num_pairs,) or weights.dtype not in _FLOATS):
        raise InvalidRequest(
            f"weights must be [{num_pairs}] float32 or bfloat16, as there are {num_pairs} ids, not {_shown(weights)}. "
            "Nothing was changed."
        )
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
        raise InvalidRequest(f"offsets must be a vector of B + 1 int64, not {_shown(offsets)}. Nothing was changed.")
    offsets = offsets if offsets.device == ids.device else offsets.to(ids.device)
    # What goes on to a device is a copy there.
    own_here = own and table.device == ids.device
    # Bits of numbers below 2^31 are the same, and larger ones are below 0 then. But what others may write to is copied.
    same = private and ids.dtype == torch.uint32 and table.id_dtype == torch.int32
    admitted = kernels.admit_bags(
        ids.view(torch.int32) if same else ids,
        offsets,
        num_slots=table.schema.num_slots,
        dtype=table.id_dtype,
        own=own_here,
    )
    if admitted is None:
        raise _refused(table.schema, ids, offsets)
    found, bounds = admitted
    if table.device != ids.device:
        found, bounds = found.to(table.device), bounds.to(table.device)
    checked = Bags(
        ids=found,
        weights=None if weights is None else admit(weights, device=table.device, dtype=torch.float32, own=own),
        offsets=bounds,
    )
    if bags is not None:
        bags.made[as_here] = checked
    return checked


def _refused(schema: TableSchema, ids: Tensor, offsets: Tensor) -> InvalidRequest:
    """What is wrong with ids or offsets, which were refused."""
    try:
        check_ids(schema, ids)
    except InvalidRequest as error:
        return error
    num_pairs = ids.shape[0]
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_pairs:
        return InvalidRequest(
            f"offsets go from {int(offsets[0])} to {int(offsets[-1])}; they must go from 0 to {num_pairs}, the number "
            "of ids. Nothing was changed."
        )
    # Compared in pairs: differences of numbers that far apart would wrap.
    falls = offsets[1:] < offsets[:-1]
    position = int(falls.nonzero()[0, 0]) if bool(falls.any()) else 0
    return InvalidRequest(
        f"offsets must not descend: offsets[{position}] = {int(offsets[position])} is followed by "
        f"{int(offsets[position + 1])}. Nothing was changed."
    )


def check_gather(table: Storage, request: GatherRequest, *, reply_bytes: int | None) -> tuple[Bags, torch.dtype]:
    """The gather's bags on the shard's device, and the dtype of its answer.

    Raises:
        InvalidRequest: Wrong bags, an unknown dtype, too many lookups to release.
        RequestTooLarge: The answer would have more than ``reply_bytes``.
    """
    check_lookup_id(request.lookup_id)
    if request.release:
        check_released(request.release)
    dtype = _REPLIES.get(request.reply_dtype)
    if dtype is None:
        raise InvalidRequest(f"reply_dtype = {shown(request.reply_dtype)} must be one of {', '.join(_REPLIES)}")
    if request.inputs is not None and not request.act:
        raise InvalidRequest("inputs are of experts, and no act was given: give one, or leave out inputs")
    if reply_bytes is not None:
        # Of packed rows too: what they are made of is here as float32.
        bag_bytes = (4 if dtype == torch.float8_e4m3fn else dtype.itemsize) * table.width
        check_reply(bag_bytes * max(0, request.offsets.numel() - 1), reply_bytes, lambda: _bags_of(request))
    own = request.remember and not request.private
    return _bags_of_request(table, request, request.ids, request.offsets, own=own), dtype


def check_update(
    table: Storage, request: UpdateRequest, remembered: Bags | None, *, reply_bytes: int | None
) -> tuple[Bags, Tensor]:
    """The update's bags, those it brings or else those remembered, and its gradient [B, W] float32.

    Raises:
        InvalidRequest: Wrong bags, blocks or gradient, or a step or sequence out of range.
        RequestTooLarge: The answer would have more than ``reply_bytes``.
        ContextMissing: It brings no bags and none are remembered.
    """
    check_lookup_id(request.lookup_id)
    if request.want_weight_grad and request.ids is not None:
        check_reply(4 * request.ids.numel(), reply_bytes, f"the gradient of {request.ids.numel():,} weights")
    if request.input_dim and not request.act:
        raise InvalidRequest(f"input_dim = {request.input_dim} is of experts, and no act was given: give one, or 0")
    own = request.hold and not request.private
    _check_blocks(table, request.blocks, table.blocks)
    if (request.ids is None) != (request.offsets is None):
        raise InvalidRequest("an update brings both ids and offsets, or neither. Nothing was changed.")
    if request.ids is not None and request.offsets is not None:
        bags = _bags_of_request(table, request, request.ids, request.offsets, own=own)
    elif remembered is None:
        raise ContextMissing(
            f"shard {table.shard} does not remember lookup {request.lookup_id}; send its ids, weights, offsets again",
            shard=table.shard,
        )
    else:
        bags = remembered
    shape, packed = tuple(request.grads.shape), table.packed_sums
    if request.grads.dtype in _FLOATS and shape == (bags.num_bags, table.width):
        return bags, admit(request.grads, device=table.device, dtype=torch.float32, own=own)
    if request.grads.dtype == torch.uint8 and packed is not None and shape == (bags.num_bags, packed.row_bytes):
        return bags, kernels.unpack_rows(packed, admit(request.grads, device=table.device, dtype=torch.uint8))
    or_packed = "" if packed is None else f", or {[bags.num_bags, packed.row_bytes]} uint8"
    raise InvalidRequest(
        f"grads must be {[bags.num_bags, table.width]} float32 or bfloat16 ({bags.num_bags} bags, {table.width} "
        f"columns of blocks {table.blocks}){or_packed}, not {_shown(request.grads)}. Nothing was changed."
    )


def held_bytes(table: Storage, request: UpdateRequest, remembered: Bags | None) -> int:
    """What holding an update takes, near enough to refuse it before it is copied. One of experts is held twice."""
    times = 2 if request.act else 1
    num_bytes = 4 * request.grads.numel()
    if request.ids is None:
        return times * (num_bytes + (0 if remembered is None else remembered.num_bytes))
    weights = 0 if request.weights is None else 4 * request.weights.numel()
    return times * (num_bytes + table.id_dtype.itemsize * request.ids.numel() + weights)


def check_score(table: Storage, request: ScoreRequest, *, reply_bytes: int | None) -> Tensor:
    """Queries [B, H, D] float32 on the shard's device.

    Raises:
        InvalidRequest: The table keeps no keys in the pool, another shape or dtype, a query that is not finite, or a
            top-k the keys cannot give.
        RequestTooLarge: The answer would have more than ``reply_bytes``.
    """
    schema, queries, keys = table.schema, request.queries, table.schema.keys
    if isinstance(keys, TrainedKeySpec):
        raise InvalidRequest(
            f"table {schema.name!r} trains its keys, which are the rows of table {key_table_name(schema.name)!r}: "
            "score queries against that one"
        )
    if keys is None:
        raise InvalidRequest(
            f"table {schema.name!r} has no keys in the pool to score queries against; make it with "
            "keys=mempool.ProductKeys(...) or mempool.FlatKeys(...), or keep the keys in the model"
        )
    heads, width, most, what = schema.num_key_pages or 1, key_dim(schema), schema.num_slots, "slots"
    if isinstance(keys, OwnKeySpec):
        heads, width, most, what = keys.sections, schema.value_dim, keys.rows, "keys of a section"
        if keys.groups:
            most, what = (keys.groups, "groups") if request.groups is None else (most - keys.groups, "slots in groups")
    if queries.dim() != 3 or tuple(queries.shape[1:]) != (heads, width) or queries.dtype != torch.float32:
        raise InvalidRequest(
            f"queries must be [B, {heads}, {width}] float32 (bags, heads, key_dim), not {_shown(queries)}"
        )
    if not 1 <= request.topk <= most:
        raise InvalidRequest(
            f"topk = {request.topk} must be 1 to {most}, the number of {what} of table {schema.name!r}"
        )
    answered = len(table.scored_heads)
    check_reply(
        12 * queries.shape[0] * answered * request.topk,
        reply_bytes,
        f"topk = {request.topk:,} of {queries.shape[0]:,} queries and {answered} heads",
    )
    finite = queries.isfinite()
    if not bool(finite.all()):
        bag, head, column = (int(number) for number in (~finite).nonzero()[0])
        raise InvalidRequest(
            f"queries[{bag}, {head}, {column}] = {float(queries[bag, head, column])}: a query that is not finite has "
            "no top-k; look where it comes from"
        )
    return admit(queries, device=table.device, dtype=torch.float32)


def check_picked(table: Storage, request: ScoreRequest) -> Picked | None:
    """The groups whose slots are scored, on the shard's device; None where the request names none.

    Raises:
        InvalidRequest: The table has none, they are not those of its queries, or scores of groups are not finite.
    """
    schema, groups, scores = table.schema, request.groups, request.group_scores
    if groups is None and scores is None:
        return None
    grouping = grouping_of(schema.keys, schema.num_slots)
    if grouping is None:
        raise InvalidRequest(f"table {schema.name!r} has no keys in groups, and groups were given: leave them out")
    if groups is None or scores is None:
        raise InvalidRequest("groups and group_scores go together: give both, or neither")
    num_queries = request.queries.shape[0]
    most = min(grouping.groups, int(GROUP_RANGES["probes"].high))
    fits = groups.dim() == 2 and groups.shape[0] == num_queries and 1 <= groups.shape[1] <= most
    if not fits or groups.dtype != torch.int64 or scores.dtype != torch.float32 or scores.shape != groups.shape:
        raise InvalidRequest(
            f"groups and group_scores must be [{num_queries}, G] int64 and float32, G from 1 to {most} of the "
            f"{grouping.groups} groups of table {schema.name!r}, not {_shown(groups)} and {_shown(scores)}"
        )
    there = bool(((groups >= 0) & (groups < grouping.groups)).all())
    if not there or not bool((groups[:, 1:] > groups[:, :-1]).all()):
        raise InvalidRequest(
            f"groups of a query must ascend, from 0 to {grouping.groups - 1}, each named once: others were given"
        )
    if not bool(scores.isfinite().all()):
        raise InvalidRequest("group_scores must be finite: they are what Score answers of the groups")
    return Picked(
        admit(groups, device=table.device, dtype=torch.int64), admit(scores, device=table.device, dtype=torch.float32)
    )


def check_read(table: Storage, request: ReadRowsRequest, *, reply_bytes: int | None) -> Tensor:
    """Ids of rows to read, int64 on the shard's device.

    Raises:
        InvalidRequest: As ``check_array`` does.
        RequestTooLarge: The answer would have more than ``reply_bytes``.
    """
    ids = check_array(table, request.array, request.ids)
    if ids.numel() > 1:  # one row travels whatever its size
        num_bytes = row_bytes(table, request.array) * ids.numel()
        check_reply(num_bytes, reply_bytes, f"{ids.numel():,} rows of {request.array!r}")
    return ids


def row_bytes(table: Storage, name: str) -> int:
    """Bytes of a row of a named array here, as it is read."""
    array = table.arrays.get(name)
    if array is None:
        return 4 * table.row_width(name)
    dtype = VALUE_DTYPES[table.schema.dtype] if name == VALUES else array.dtype
    return dtype.itemsize * table.row_width(name)


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
        raise InvalidRequest(f"table {schema.name!r} has no array {shown(name)}; it has {', '.join(names)}")
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
            f"blocks {shown_numbers(blocks)} are not those that shard {table.shard} owns of table "
            f"{table.schema.name!r}, {expected}. Nothing was changed."
        )


def _bags_of_request(
    table: Storage, request: GatherRequest | UpdateRequest, ids: Tensor, offsets: Tensor, *, own: bool
) -> Bags:
    return check_bags(table, ids, request.weights, offsets, own=own, private=request.private, bags=request.bags)


def _bags_of(request: GatherRequest) -> str:
    return f"a gather of {max(0, request.offsets.numel() - 1):,} bags of {request.ids.numel():,} pairs"


def _shown(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
