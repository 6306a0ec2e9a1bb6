"""A table as a trainer or reader uses it: checks what it is given, moves tensors, waits for the router and the session.

Legend: B bags, L pairs per bag (or of all bags, with offsets), M rows, H heads, K top-k, D key dim, n half-keys, V
value dim.
"""

import math
from collections.abc import Callable, Coroutine
from typing import Any, Literal, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from mempool.client.autograd import pooled_gather
from mempool.client.bags import checked_bags, checked_rows, own_copy
from mempool.client.lookup import Lookup, checked_queries, without_heads
from mempool.client.routing.attempt import LookupRecord
from mempool.client.routing.router import Router
from mempool.client.session import Prepared, Session, SessionCounters
from mempool.client.untraced import untraced
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, ProductKeySpec, StorageDtype, TableSchema
from mempool.types.bags import Bags

T = TypeVar("T")

WireDtype = Literal["float32", "bfloat16"]

_WIRE_DTYPES: dict[WireDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STORAGE_DTYPES: dict[StorageDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# Reads and writes of rows are cut into messages of about this size.
_ROWS_MESSAGE_BYTES = 32 * 1024 * 1024


class Run(Protocol):
    """Runs a coroutine on the event loop, from any other thread, and waits for it."""

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> T: ...


class Table:
    """One named memory of a pool. Made by ``Pool.create_table`` and ``Pool.table``; all threads may use it.

    Gradients of its values are not tensors here: backward passes push them to the pool, where they are held until
    ``commit`` (or ``mempool.optim.PoolOptimizer.step``) applies them with the table's own optimizer.

    Attributes:
        schema: What the table is.
        wire_dtype: What weights, gradients and (where no shard adds to another's) pooled values are on the wire:
            "float32", or "bfloat16" for half the bytes. Sums are float32 in either case. May be set at any time.
    """

    def __init__(self, schema: TableSchema, *, router: Router, session: Session, run: Run) -> None:
        self.schema = schema
        self._router = router
        self._session = session
        self._run = run
        self._anchor = torch.zeros(0, requires_grad=True)
        self._wire_dtype: WireDtype = "float32"

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            f"table {self.name!r} is a connection and cannot be pickled; in the other process, connect to the pool and "
            f"take pool.table({self.name!r})"
        )

    def __repr__(self) -> str:
        schema = self.schema
        return (
            f"Table({schema.name!r}, num_slots={schema.num_slots}, value_dim={schema.value_dim}, "
            f"dtype={schema.dtype!r})"
        )

    @property
    def name(self) -> str:
        return self.schema.name

    @property
    def num_slots(self) -> int:
        return self.schema.num_slots

    @property
    def value_dim(self) -> int:
        return self.schema.value_dim

    @property
    def dtype(self) -> torch.dtype:
        """What the values are stored as; float8_e4m3fn and int8 with a float32 scale per slot and column block."""
        return _STORAGE_DTYPES[self.schema.dtype]

    @property
    def wire_dtype(self) -> WireDtype:
        return self._wire_dtype

    @wire_dtype.setter
    def wire_dtype(self, wire_dtype: WireDtype) -> None:
        if wire_dtype not in _WIRE_DTYPES:
            raise InvalidRequest(f"wire_dtype = {wire_dtype!r}: must be 'float32' or 'bfloat16'.")
        self._wire_dtype = wire_dtype

    @property
    def requires_grad(self) -> bool:
        """Whether backward passes train the values. A frozen table still gives the gradient of the weights."""
        return self._anchor.requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> "Table":
        """Train the values, or freeze them, for gathers from now on."""
        self._anchor.requires_grad_(requires_grad)
        return self

    @untraced
    def gather(
        self, ids: Tensor, weights: Tensor | None = None, *, offsets: Tensor | None = None, remember: bool = True
    ) -> Tensor:
        """Weighted sums of rows, differentiable in ``weights`` and in the values.

        Args:
            ids: [B, L] int64 slot ids, or [L] with ``offsets``; on any device.
            weights: Of the shape of ids, any floating dtype, on any device; None means all ones.
            offsets: [B + 1] int64: bag b holds pairs offsets[b] to offsets[b + 1], offsets[0] is 0, offsets[B] is L (as
                torch.nn.EmbeddingBag has it with include_last_offset=True).
            remember: Let shards keep ids and weights for the backward pass, where one may come. Say False in
                evaluation: a backward pass that comes all the same sends them again.

        Returns:
            [B, value_dim] float32, on the device of weights, or of ids where there are none. Inside torch.compile
            this is a graph break.

        Raises:
            InvalidRequest: A wrong shape, dtype or id; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
            DataLoss: Pages of the table are gone.
        """
        flat_ids, flat_weights, flat_offsets = checked_bags(
            ids, weights, offsets, num_slots=self.num_slots, table=self.name
        )
        return pooled_gather(
            self,
            anchor=self._anchor,
            ids=flat_ids,
            weights=flat_weights,
            offsets=flat_offsets,
            remember=remember,
            device=ids.device if weights is None else weights.device,
        )

    @untraced
    def lookup(self, queries: Tensor, topk: int) -> Lookup:
        """Score queries against the keys in the pool, take the best ``topk`` per head, softmax, weighted sum of values.

        Nothing of it is differentiable. To train the values, pass its ids and weights to ``gather``.

        Args:
            queries: [B, H, D] for product keys, [B, D] for flat keys; floating, finite, on any device.
            topk: Slots per head, at most num_slots.

        Returns:
            ids, scores, weights [B, H, K] ([B, K] for flat keys) and values [B, value_dim], on the device of queries.

        Raises:
            InvalidRequest: The table has no keys in the pool, or queries are not what they ask for; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
            DataLoss: Pages of the table are gone.
        """
        checked = checked_queries(queries, topk, schema=self.schema)
        lookup, _ = self._run(
            self._router.lookup(self.schema.table_id, queries=checked, topk=topk, reply_dtype=self._wire_dtype)
        )
        if isinstance(self.schema.keys, FlatKeySpec):
            lookup = without_heads(lookup)
        return Lookup(*(part.to(queries.device) for part in lookup))

    @untraced
    def rows(self, ids: Tensor) -> Tensor:
        """Values as they are stored: ids [M] int64 -> [M, value_dim] on the CPU. No gradient.

        In the table's dtype; in float32 where that is float8_e4m3fn or int8.

        Raises:
            InvalidRequest: Wrong ids; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
            DataLoss: Pages of the table are gone.
        """
        return self._read("values", checked_rows(ids, num_slots=self.num_slots, table=self.name))

    @untraced
    def state(self, name: str, ids: Tensor) -> Tensor:
        """Optimizer state by name: ids [M] int64 -> [M, value_dim], or [M, column blocks] for row-wise state.

        Also "master", the float32 values of a table that keeps them, and "scales" of one-byte values, [M, blocks].

        Raises:
            InvalidRequest: Wrong ids, or the table's optimizer has no state of that name.
        """
        return self._read(name, checked_rows(ids, num_slots=self.num_slots, table=self.name))

    @untraced
    def write(self, ids: Tensor, values: Tensor) -> None:
        """Overwrite values; optimizer state stays. Atomic on one shard, not across shards; repeating it is safe.

        Args:
            ids: [M] int64, distinct.
            values: [M, value_dim] floating; rounded to the table's dtype, to nearest, and kept whole in a master.

        Raises:
            InvalidRequest: Wrong ids or values; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s; some rows may be written.
        """
        own_ids = self._distinct(checked_rows(ids, num_slots=self.num_slots, table=self.name))
        short = self.schema.dtype == "bfloat16" and not self.schema.master  # rounded here, it is half the bytes
        dtype = torch.bfloat16 if short else torch.float32
        shape = [own_ids.shape[0], self.value_dim]
        self._write("values", own_ids, self._checked_matrix("values", values, shape, dtype))

    @untraced
    def read_keys(self, ids: Tensor | None = None) -> Tensor:
        """Keys kept in the pool, float32 on the CPU.

        Args:
            ids: [M] int64: slots for flat keys, heads for product keys; None means all.

        Returns:
            Flat keys: [M, D]. Product keys: [M, 2, n, D / 2].
        """
        key_ids, shape = self._key_ids(ids)
        return self._read("keys", key_ids).reshape(shape)

    @untraced
    def write_keys(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Overwrite keys kept in the pool.

        Args:
            keys: [M, D] for flat keys, [M, 2, n, D / 2] for product keys; floating and finite.
            ids: [M] int64, distinct: slots for flat keys, heads for product keys; None means all.

        Raises:
            InvalidRequest: The table has no keys in the pool, or keys or ids are not as they must be; nothing was sent.
        """
        key_ids, shape = self._key_ids(ids)
        checked = self._checked_matrix("keys", keys, shape, torch.float32)
        if not bool(torch.isfinite(checked).all()):
            raise InvalidRequest(
                f"table {self.name!r}: keys must be finite; a key of NaN or inf makes every lookup NaN."
            )
        self._write("keys", self._distinct(key_ids), checked.reshape(key_ids.shape[0], -1))

    @property
    def pending(self) -> int:
        """Updates pushed by backward passes and not yet committed or discarded."""
        return self._session.pending

    @property
    def counters(self) -> SessionCounters:
        """What this client has done on this table."""
        return self._session.counters

    def prepare(self, *, want_norm: bool = True) -> Prepared | None:
        """Make everything pending ready to commit, and learn its norm. None where nothing is pending.

        For what needs one decision over several tables: clipping by global norm, gradient scalers. ``commit`` or
        ``discard`` must follow soon: pages cannot move meanwhile.
        """
        return self._run(self._session.prepare(want_norm=want_norm))

    def commit(self, *, lr: float | None = None, grad_scale: float = 1.0) -> int:
        """Apply everything pending as one step of the table's optimizer; does nothing where nothing is pending.

        A commit that failed on its way is continued by the next call, with the lr and grad_scale it was decided with.

        Args:
            lr: Learning rate of this step; None takes the table's own.
            grad_scale: Multiplies the gradient first (clipping, unscaling, mean).

        Returns:
            How many updates were committed.
        """
        return self._run(self._session.commit(lr=self.schema.optimizer.lr if lr is None else lr, grad_scale=grad_scale))

    def discard(self) -> int:
        """Drop what is pending; answers how many updates. A step whose commit is under way is decided and stays."""
        return self._run(self._session.discard())

    def send_gather(self, bags: Bags, *, remember: bool) -> tuple[Tensor, LookupRecord]:
        """For ``mempool.client.autograd``: pooled values [B, V] float32 on the CPU."""
        return self._run(self._session.gather(bags, remember=remember, reply_dtype=self._wire_dtype))

    def send_update(self, record: LookupRecord, grads: Tensor, *, hold: bool, want_weight_grad: bool) -> Tensor | None:
        """For ``mempool.client.autograd``: grads [B, V] on any device -> d_weights [L] float32 on the CPU."""
        if not (hold or want_weight_grad):
            return None
        own = own_copy(grads, _WIRE_DTYPES[self._wire_dtype])
        return self._run(self._session.update(record, own, hold=hold, want_weight_grad=want_weight_grad))

    def release(self, record: LookupRecord) -> Callable[[], None]:
        """For ``mempool.client.autograd``."""
        return self._router.release(record)

    def wire_weights(self, weights: Tensor | None) -> Tensor | None:
        """For ``mempool.client.autograd``: weights as they are sent."""
        return None if weights is None else own_copy(weights, _WIRE_DTYPES[self._wire_dtype])

    def _read(self, array: str, ids: Tensor) -> Tensor:
        rows = [
            self._run(self._router.read_rows(self.schema.table_id, array=array, ids=chunk))
            for chunk in torch.split(ids, self._rows_per_message(array))
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _write(self, array: str, ids: Tensor, rows: Tensor) -> None:
        if ids.numel() == 0:
            return
        size = self._rows_per_message(array)
        for id_chunk, row_chunk in zip(torch.split(ids, size), torch.split(rows, size), strict=True):
            self._run(self._router.write_rows(self.schema.table_id, array=array, ids=id_chunk, rows=row_chunk))

    def _rows_per_message(self, array: str) -> int:
        keys = self.schema.keys
        width = self.value_dim
        if array == "keys" and keys is not None:
            width = keys.key_dim if isinstance(keys, FlatKeySpec) else keys.key_dim * math.isqrt(self.num_slots)
        return max(1, _ROWS_MESSAGE_BYTES // (4 * width))

    def _key_ids(self, ids: Tensor | None) -> tuple[Tensor, list[int]]:
        """Ids of keys [M], all where None, and the shape of those keys."""
        keys = self.schema.keys
        if keys is None:
            raise InvalidRequest(
                f"table {self.name!r} has no keys in the pool; make it with keys=ProductKeys(...) or FlatKeys(...)."
            )
        count = keys.heads if isinstance(keys, ProductKeySpec) else self.num_slots
        if ids is None:
            key_ids = torch.arange(count, dtype=torch.int64)
        elif isinstance(keys, ProductKeySpec):
            key_ids = checked_rows(ids, num_slots=keys.heads, table=self.name, what="heads")
        else:
            key_ids = checked_rows(ids, num_slots=count, table=self.name)
        if isinstance(keys, ProductKeySpec):
            return key_ids, [key_ids.shape[0], 2, math.isqrt(self.num_slots), keys.key_dim // 2]
        return key_ids, [key_ids.shape[0], keys.key_dim]

    def _checked_matrix(self, name: str, matrix: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            kind = str(matrix.dtype) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise InvalidRequest(f"table {self.name!r}: {name} must be a floating torch.Tensor, not {kind}.")
        if list(matrix.shape) != shape:
            raise InvalidRequest(f"table {self.name!r}: {name} has shape {list(matrix.shape)}, must be {shape}.")
        return own_copy(matrix, dtype)

    def _distinct(self, ids: Tensor) -> Tensor:
        ordered, order = torch.sort(ids, stable=True)
        repeats = torch.nonzero(ordered[1:] == ordered[:-1])
        if repeats.numel():
            at = int(repeats[0])
            raise InvalidRequest(
                f"table {self.name!r}: ids[{int(order[at])}], ids[{int(order[at + 1])}] are both {int(ordered[at])}; "
                "ids of a write must be distinct."
            )
        return ids
