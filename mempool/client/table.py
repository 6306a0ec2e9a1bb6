"""A table as a trainer or reader uses it.

Keys are ``keys.keyed``'s. What it is given is checked in ``bags``, ``rows`` and ``lookup``, and sent from
``training.link`` (gathers and their gradients), ``rows`` (reads and writes) and ``training.session`` (the optimizer's
step).

Legend: B bags, L pairs per bag (or of all bags, with offsets), M rows, H heads, K top-k, D key dim, n half-keys, V
value dim.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from mempool.client.bags import checked_bags, without_padding
from mempool.client.counts import as_number
from mempool.client.gathers.autograd import gather
from mempool.client.gathers.hot_rows import CacheStatus
from mempool.client.gathers.pending import PendingGather
from mempool.client.gathers.pending import begin as begin_gather
from mempool.client.gathers.untraced import untraced
from mempool.client.opening.waiting import Begin, Run
from mempool.client.reading.versions import Versions
from mempool.client.routing.router import Router
from mempool.client.rows import Rows, checked_matrix, checked_rows, distinct_rows
from mempool.client.training.commitment import Prepared, together
from mempool.client.training.link import TableLink, WireDtype
from mempool.client.training.session import Session, SessionCounters
from mempool.client.training.state import checked_state, checked_step, names_to_read
from mempool.client.training.tables import TableCommit, commit_tables, discard_tables, prepare_tables
from mempool.errors import InvalidRequest
from mempool.types import StorageDtype, TableSchema
from mempool.types.bags import Bags

_STORAGE_DTYPES: dict[StorageDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class Table(Versions):
    """One named memory of a pool. Made by ``Pool.create_table`` and ``Pool.table``; all threads may use it.

    Gradients of its values are not tensors here: backward passes push them to the pool, where they are held until
    ``commit`` (or ``mempool.optim.PoolOptimizer.step``) applies them with the table's own optimizer.

    Attributes:
        schema: What the table is.
        wire_dtype: What weights, gradients and (where no shard adds to another's) pooled values are on the wire:
            "float32"; "bfloat16" for half the bytes; or "float8_e4m3fn" for nearly a quarter: values and gradients of a
            byte each with a float32 scale per bag and column block, off by at most 1/16 of themselves or 1/458,752 of
            the largest in their block, and weights of bfloat16. Sums are made in float32 in any case. May be set at
            any time.
        cache_bytes: What rows that this client keeps of the table may take: those that are read often by ``gather`` of
            one row a bag, without weights, that no shard is to remember (no_grad, or remember=False). What it answers
            is bitwise what shards answer, never older. 0, as it is at first: none. May be set at any time.
    """

    def __init__(
        self,
        schema: TableSchema,
        *,
        router: Router,
        session: Session,
        run: Run,
        begin: Begin,
        open_keys: Callable[["Table"], "Table"] | None = None,
    ) -> None:
        self.schema = schema
        self._open_keys = open_keys
        self._router = router
        self._session = session
        self._run = run
        self._begin = begin
        self._link = TableLink(schema, router=router, session=session, run=run, begin=begin)
        self._rows = Rows(schema, router=router, run=run)
        self._anchor = torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True)

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            f"table {self.name!r} is a connection and cannot be pickled. {self._router.tries.where.elsewhere_advice}"
        )

    def __copy__(self) -> "Table":
        """Itself: what is copied with a model is the model's, and the table is the pool's."""
        return self

    def __deepcopy__(self, memo: object) -> "Table":
        """Itself."""
        return self

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
    def address(self) -> str:
        """Of its pool, as ``connect`` was given it; "" for an embedded pool."""
        return self._router.tries.where.address

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
        return self._link.wire_dtype

    @wire_dtype.setter
    def wire_dtype(self, wire_dtype: WireDtype) -> None:
        self._link.wire_dtype = wire_dtype

    @property
    def cache_bytes(self) -> int:
        return self._link.cache_bytes

    @cache_bytes.setter
    def cache_bytes(self, cache_bytes: int) -> None:
        self._link.cache_bytes = cache_bytes

    @property
    def cache(self) -> CacheStatus | None:
        """What is kept here and how often it was of use, since ``cache_bytes`` was set; None where that is 0."""
        return None if self._link.hot_rows is None else self._link.hot_rows.status

    @property
    def requires_grad(self) -> bool:
        """Whether backward passes train the values. A frozen table still gives the gradient of the weights."""
        return self._anchor.requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> "Table":
        """Train the values, or freeze them, for gathers from now on."""
        self._anchor.requires_grad_(requires_grad)
        return self

    def gather(
        self,
        ids: Tensor,
        weights: Tensor | None = None,
        *,
        offsets: Tensor | None = None,
        padding_idx: int | None = None,
        remember: bool = True,
    ) -> Tensor:
        """Weighted sums of rows, differentiable in ``weights`` and in the values.

        A pair of weight 0 adds 0 times its row, as in torch: NaN where the row holds NaN or inf. What must not count
        whatever it holds is named by ``padding_idx``.

        Args:
            ids: [B, L] int64 slot ids, or [L] with ``offsets``; on any device.
            weights: Of the shape of ids, any floating dtype, on any device; None means all ones.
            offsets: [B + 1] int64: bag b holds pairs offsets[b] to offsets[b + 1], offsets[0] is 0, offsets[B] is L (as
                torch.nn.EmbeddingBag has it with include_last_offset=True).
            padding_idx: Pairs of this slot are left out: they add nothing, and get and give no gradient. A negative one
                counts from the end. As in torch.nn.functional.embedding_bag.
            remember: Let shards keep ids and weights for the backward pass, where one may come. Say False in
                evaluation: a backward pass that comes all the same sends them again.

        Returns:
            [B, value_dim] float32, on the device of weights, or of ids where there are none. Under torch.compile this
            is an operator of the graph, which does not break, but for padding_idx, whose pairs must be counted.

        Raises:
            InvalidRequest: A wrong shape, dtype or id; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
            DataLoss: Pages of the table are gone.
        """
        if padding_idx is not None:
            ids, weights, offsets = without_padding(
                ids, weights, offsets, padding_idx=padding_idx, num_slots=self.num_slots, table=self.name
            )
        return gather(
            self._link,
            ids,
            weights,
            offsets,
            anchor=self._anchor,
            trained=self._anchor.requires_grad,
            remember=remember,
        )

    def gather_async(
        self,
        ids: Tensor,
        weights: Tensor | None = None,
        *,
        offsets: Tensor | None = None,
        padding_idx: int | None = None,
        remember: bool = True,
    ) -> PendingGather:
        """Start a ``gather``, and go on: ``result()`` of what this answers waits for it and is what ``gather`` returns.

        Arguments are those of ``gather``, are checked here and may be written to from here on. In the backward pass the
        gradient of the weights is waited for where the gather was started, not where its result was taken. Waits only
        where 256 MiB of this table's are under way. A graph break under torch.compile.

        Raises:
            InvalidRequest: As ``gather``; nothing was sent. Other errors are the result's.
            DeadlineExceeded: What is under way was not answered within the pool's timeout_s; nothing was sent.
        """
        if padding_idx is not None:
            ids, weights, offsets = without_padding(
                ids, weights, offsets, padding_idx=padding_idx, num_slots=self.num_slots, table=self.name
            )
        return begin_gather(
            self._link,
            ids,
            weights,
            offsets,
            anchor=self._anchor,
            trained=self._anchor.requires_grad,
            remember=remember,
        )

    @untraced
    def prefetch(
        self,
        ids: Tensor,
        *,
        offsets: Tensor | None = None,
        padding_idx: int | None = None,
        remember: bool = True,
    ) -> bool:
        """Start the gather of ids that are known before the forward pass: a later ``gather`` of the same takes it.

        For sums without weights, as n-gram memories read them (one pair a bag gives the rows themselves). It serves one
        ``gather`` of the same ids, offsets and padding_idx, bitwise with what shards would answer then: it counts only
        while this client knows of no newer version of the table and has written no rows; what counts no more is asked
        for anew, by that gather itself. So all micro-batches of a step may be started at once, after the commit before.

        Args:
            ids, offsets, padding_idx, remember: As of ``gather``.

        Returns:
            Whether it was started: at most 256 MiB of ids and answers are kept, until they are taken or count no more.

        Raises:
            InvalidRequest: As ``gather``; nothing was sent.
        """
        if padding_idx is not None:
            ids, _, offsets = without_padding(
                ids, None, offsets, padding_idx=padding_idx, num_slots=self.num_slots, table=self.name
            )
        flat_ids, _, flat_offsets = checked_bags(ids, None, offsets, num_slots=self.num_slots, table=self.name)
        if not flat_ids.shape[0]:
            return True
        remember = remember and torch.is_grad_enabled() and self._anchor.requires_grad
        return self._link.prefetch(Bags(ids=flat_ids, weights=None, offsets=flat_offsets), remember=remember)

    @untraced
    def rows(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Values as they are stored: ids [M] int64, or a list of int -> [M, value_dim] on the CPU. No gradient.

        In the table's dtype; in float32 where that is float8_e4m3fn or int8.

        Raises:
            InvalidRequest: Wrong ids; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
            DataLoss: Pages of the table are gone.
        """
        return self._rows.read("values", checked_rows(ids, num_slots=self.num_slots, table=self.name))

    @untraced
    def state(self, ids: Tensor | Sequence[int], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Optimizer state of slots, as it is kept: what ``write_state`` takes.

        Args:
            ids: [M] int64 slot ids, or a list of int.
            names: Which; by default all that can be written. Names are those of torch behind the array's:
                "values.momentum_buffer", "values.sum", "values.exp_avg", "values.exp_avg_sq"; row-wise
                "values.row_sum", "values.row_exp_avg_sq"; "values.master" where float32 values are kept. Only read:
                "values.scales" (of one-byte values) and "values.last_step" (of a dense optimizer).

        Returns:
            By name, on the CPU: [M, value_dim] float32; of row-wise state and scales [M, column blocks]; last steps
            [M, column blocks] int32. A momentum of -0.0 has had no gradient yet.

        Raises:
            InvalidRequest: Wrong ids, or the table's optimizer has no state of that name; nothing was sent.
        """
        own_ids = checked_rows(ids, num_slots=self.num_slots, table=self.name)
        return self._rows.read_arrays(names_to_read(self.schema, names), own_ids)

    @untraced
    def write_state(self, ids: Tensor | Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Overwrite optimizer state of slots; values stay, but with "values.master" they are rounded from it.

        To continue training from elsewhere: ``write`` the values, then their state, then ``set_step``.

        Args:
            ids: [M] int64, or a list of int; distinct.
            state: By name as in ``state``, each as that returns it; what is left out stays.

        Raises:
            InvalidRequest: Wrong ids, names or shapes; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s; some rows may be written.
        """
        own_ids = distinct_rows(ids, num_slots=self.num_slots, table=self.name)
        checked = checked_state(self.schema, state, own_ids.shape[0])
        with self._link.prefetched.writing():
            for name, matrix in checked.items():
                self._rows.write(name, own_ids, matrix)

    def step_count(self) -> int:
        """How many steps the table's optimizer counts: its commits, or what ``set_step`` said and those after.

        Where whoever called ``set_step`` died before all shards had heard it, this tells the others.

        Raises:
            StepConflict: Somebody commits meanwhile.
        """
        return self._run(self._router.step_count(self.schema.table_id))

    def set_step(self, step: int) -> None:
        """Let the optimizer count on from ``step``, as after so many steps.

        It is torch's ``state["step"]`` and FBGEMM's ``iter``: Adam's bias correction, Adagrad's learning rate decay and
        stochastic rounding follow it. While nobody trains: a commit in between may find it set on some shards only.

        Raises:
            InvalidRequest: No whole number, or below 0; nothing was sent.
            StepConflict: Somebody commits meanwhile; set it again.
        """
        number = checked_step(self.schema, step)
        with self._link.prefetched.writing():
            self._run(self._router.step_count(self.schema.table_id, to=number))

    @untraced
    def write(self, ids: Tensor | Sequence[int], values: Tensor) -> None:
        """Overwrite values; optimizer state stays. Atomic on one shard, not across shards; repeating it is safe.

        Args:
            ids: [M] int64, or a list of int; distinct.
            values: [M, value_dim] floating; rounded to the table's dtype, to nearest, and kept whole in a master.

        Raises:
            InvalidRequest: Wrong ids or values; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s; some rows may be written.
        """
        own_ids = distinct_rows(ids, num_slots=self.num_slots, table=self.name)
        short = self.schema.dtype == "bfloat16" and not self.schema.master  # rounded here, it is half the bytes
        dtype = torch.bfloat16 if short else torch.float32
        shape = [own_ids.shape[0], self.value_dim]
        checked = checked_matrix("values", values, shape, dtype, table=self.name)
        with self._link.prefetched.writing():
            self._rows.write("values", own_ids, checked)

    def _pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.gather(ids, weights)

    def rebind(self, schema: TableSchema, session: Session) -> None:
        """For ``Pool``: from now on it is another table of the same name, slots and width."""
        session.counters = self._session.counters  # they are this client's, and no number comes twice
        self.schema, self._session, self._keys = schema, session, None
        self._rows = Rows(schema, router=self._router, run=self._run)
        self._link.rebind(schema, session)

    @property
    def link(self) -> TableLink:
        """For ``mempool.nn``: what gathers go through."""
        return self._link

    @property
    def pending(self) -> int:
        """Updates pushed by backward passes and not yet committed or discarded; 0 once a module has zeroed them."""
        return 0 if self._session.pending and self._link.markers.zeroed() else self._session.pending

    @property
    def pending_bytes(self) -> int:
        """Bytes of ids, weights and gradients that are kept here until those are committed or discarded."""
        return self._session.pending_bytes

    @property
    def counters(self) -> SessionCounters:
        """What this client has done on this table."""
        return self._session.counters

    def prepare(self, *, want_norm: bool = True, norm_order: float = 0.0) -> Prepared | None:
        """Make everything pending ready to commit, and learn its norm. None where nothing is pending.

        With ``norm_order`` (above 0, inf for the largest element) it answers the norm of that order, too. Keys that are
        trained have their part in all of it.

        For what needs one decision over several tables: clipping by global norm, gradient scalers. ``commit`` or
        ``discard`` must follow soon: pages cannot move meanwhile.
        """
        links = self.step_links
        for link in links:
            link.drop_zeroed()
        return together(prepare_tables(links, want_norm=want_norm, norm_order=norm_order), norm_order=norm_order)

    def commit(self, *, lr: float | None = None, grad_scale: float = 1.0, keys_lr: float | None = None) -> int:
        """Apply everything pending as one step of the table's optimizer; does nothing where nothing is pending.

        It is acknowledged once it is decided: every later lookup of this client sees it. A commit that failed on its
        way is continued by the next call, with the lr and grad_scale it was sent with; the error says what is known.
        Keys that are trained are in the same step.

        Args:
            lr: Learning rate of this step; None takes the table's own.
            grad_scale: Multiplies the gradient first (clipping, unscaling, mean).
            keys_lr: Learning rate of keys that are trained; None takes their own.

        Returns:
            How many updates were committed, of values and of keys.
        """
        if keys_lr is not None and not self.trains_keys:
            raise InvalidRequest(f"table {self.name!r}: keys_lr = {keys_lr!r}, and it trains no keys; leave it out.")
        links = self.step_links
        rates = [link.own_lr if rate is None else rate for link, rate in zip(links, (lr, keys_lr), strict=False)]
        for name, number in (*zip(("lr", "keys_lr"), rates, strict=False), ("grad_scale", grad_scale)):
            if not math.isfinite(as_number(number)):
                raise InvalidRequest(f"table {self.name!r}: {name} = {number!r} must be a finite number.")
        for link in links:
            link.drop_zeroed()
        commits = zip(links, rates, strict=True)
        return sum(commit_tables([TableCommit(link, float(rate), float(grad_scale)) for link, rate in commits]))

    def discard(self) -> int:
        """Drop what is pending; answers how many updates. A step whose commit is under way is decided and stays.

        Where nothing is pending this is free: nothing is sent and nobody is waited for.
        """
        return sum(discard_tables(self.step_links))
