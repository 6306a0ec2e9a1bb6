"""Rows of a table's named arrays: the checks of a caller's ids and matrices, and how reads and writes become messages.

Leaves which shard owns which row to the router. Legend: M rows, D key dim, n half-keys.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mempool.client.bags import own_copy, require_dense, require_in_range, require_integers
from mempool.client.opening.waiting import Run
from mempool.client.routing.router import Router
from mempool.client.routing.slices import MESSAGE_BYTES, together, windows
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, OwnKeySpec, ProductKeySpec, TableSchema, TrainedKeySpec
from mempool.types.keys import grouping_of, least_root


class Rows:
    """Reads and writes of one table's named arrays, of any size: cut into messages, a few of them under way at a time.

    Args:
        schema: The table.
        router: Carries the messages.
        run: Waits for them.
    """

    def __init__(self, schema: TableSchema, *, router: Router, run: Run) -> None:
        self._schema = schema
        self._router = router
        self._run = run

    def read(self, array: str, ids: Tensor) -> Tensor:
        """Rows [M, ..] of an array in its dtype; ids: [M] int64, checked."""
        return self.read_arrays([array], ids)[array]

    def read_arrays(self, arrays: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
        """The same rows of several arrays, by name; each of them once."""
        arrays = list(dict.fromkeys(arrays))
        table_id = self._schema.table_id
        pieces = [(array, chunk) for array in arrays for chunk in torch.split(ids, self._rows_per_message(array))]
        read: dict[str, list[Tensor]] = {array: [] for array in arrays}
        for window in windows(pieces):
            calls = [partial(self._router.read_rows, table_id, array=array, ids=chunk) for array, chunk in window]
            for (array, _), rows in zip(window, self._run(together(calls)), strict=True):
                read[array].append(rows)
        return {array: rows[0] if len(rows) == 1 else torch.cat(rows) for array, rows in read.items()}

    def write(self, array: str, ids: Tensor, rows: Tensor, *, fresh: bool = False) -> None:
        """Overwrite rows [M, ..] of an array; ids: [M] int64, checked and distinct.

        fresh: As of ``WriteRowsRequest``; of no rows at all every owner is asked then whether it may be.
        """
        if ids.numel() == 0 and not fresh:
            return
        table_id, size = self._schema.table_id, self._rows_per_message(array)
        pieces = list(zip(torch.split(ids, size), torch.split(rows, size), strict=True))
        write = partial(self._router.write_rows, table_id, array=array, fresh=fresh)
        for window in windows(pieces):
            self._run(together([partial(write, ids=chunk, rows=part) for chunk, part in window]))

    def _rows_per_message(self, array: str) -> int:
        keys, width = self._schema.keys, self._schema.value_dim
        if array in ("values.uses", "values.last_use"):
            width = 2
        if array == "keys" and isinstance(keys, FlatKeySpec | ProductKeySpec):
            width = keys.key_dim if isinstance(keys, FlatKeySpec) else keys.key_dim * math.isqrt(self._schema.num_slots)
        return max(1, MESSAGE_BYTES // (4 * width))


def checked_rows(ids: Tensor | Sequence[int], *, num_slots: int, table: str, what: str = "slots") -> Tensor:
    """Ids of rows, [M] integers on any device or a list of them, as int64 on the CPU, a copy of its own.

    Raises:
        InvalidRequest: Not of one dimension, not integers, or out of range.
    """
    named = (
        torch.tensor(_listed(ids, table), dtype=torch.int64, device="cpu")
        if isinstance(ids, list | tuple | range)
        else ids
    )
    require_integers("ids", named, table=table)
    assert isinstance(named, Tensor)
    if named.dim() != 1:
        raise InvalidRequest(f"table {table!r}: ids has shape {list(named.shape)}; rows are named by ids [M].")
    own_ids = own_copy(named, torch.int64)
    require_in_range(own_ids, num_slots=num_slots, table=table, what=what)
    return own_ids


def _listed(ids: Sequence[object], table: str) -> Sequence[object]:
    if not all(type(value) is int and -(2**63) <= value < 2**63 for value in ids):
        raise InvalidRequest(f"table {table!r}: ids must be integers, as a tensor or as a list of int.")
    return ids


def distinct_rows(ids: Tensor | Sequence[int], *, num_slots: int, table: str) -> Tensor:
    """As ``checked_rows``, for a write: also distinct."""
    own_ids = checked_rows(ids, num_slots=num_slots, table=table)
    require_distinct(own_ids, table=table)
    return own_ids


def require_distinct(ids: Tensor, *, table: str) -> None:
    """Raises InvalidRequest for the first of ``ids`` [M] that is there twice."""
    ordered, order = torch.sort(ids, stable=True)
    repeats = torch.nonzero(ordered[1:] == ordered[:-1])
    if repeats.numel():
        at = int(repeats[0])
        raise InvalidRequest(
            f"table {table!r}: ids[{int(order[at])}], ids[{int(order[at + 1])}] are both {int(ordered[at])}; "
            "ids of a write must be distinct."
        )


def checked_matrix(name: str, matrix: Tensor, shape: list[int], dtype: torch.dtype, *, table: str) -> Tensor:
    """What a caller wants written, as ``dtype`` on the CPU, a copy of its own.

    Raises:
        InvalidRequest: Not a floating tensor, or of another shape.
    """
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        kind = str(matrix.dtype) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise InvalidRequest(f"table {table!r}: {name} must be a floating torch.Tensor, not {kind}.")
    require_dense(name, matrix, table=table)
    if list(matrix.shape) != shape:
        raise InvalidRequest(f"table {table!r}: {name} has shape {list(matrix.shape)}, must be {shape}.")
    return own_copy(matrix, dtype)


def checked_key_rows(ids: Tensor | None, *, schema: TableSchema) -> tuple[Tensor, list[int]]:
    """Ids of keys in the pool [M], all where None, and the shape of those keys: [M, D], or [M, ways, n, D / ways].

    Raises:
        InvalidRequest: The table has no keys in the pool, or ids are wrong.
    """
    keys, table = schema.keys, schema.name
    if keys is None or isinstance(keys, OwnKeySpec):
        raise InvalidRequest(
            f"table {table!r} has no keys in the pool; make it with keys=ProductKeys(...), FlatKeys(...) or "
            "HierarchicalKeys(...)."
        )
    heads = isinstance(keys, ProductKeySpec) or (isinstance(keys, TrainedKeySpec) and keys.product)
    grouping = grouping_of(keys, schema.num_slots)
    if grouping is not None:
        count, what = grouping.num_rows, "groups and slots"
    elif not isinstance(keys, FlatKeySpec) and heads:
        count, what = keys.heads, "heads"
    else:
        count, what = schema.num_slots, "slots"
    if ids is None:
        key_ids = torch.arange(count, dtype=torch.int64, device="cpu")
    else:
        key_ids = checked_rows(ids, num_slots=count, table=table, what=what)
    if heads:
        ways = keys.ways if isinstance(keys, TrainedKeySpec) else 2
        return key_ids, [key_ids.shape[0], ways, least_root(schema.num_slots, ways), keys.key_dim // ways]
    return key_ids, [key_ids.shape[0], keys.key_dim]
