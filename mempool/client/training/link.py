"""What ties the autograd of gathers to a table in a pool: bags and gradients as they are sent, and the waits for them.

Legend: B bags, L pairs of all bags together, V value dim.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mempool import kernels
from mempool.client.bags import own_copy
from mempool.client.counts import as_count
from mempool.client.experts.asked import Experts
from mempool.client.gathers.hot_rows import HotRows
from mempool.client.gathers.lease import Remembering
from mempool.client.gathers.links import LINKS, PendingAnswer
from mempool.client.gathers.markers import Markers
from mempool.client.gathers.parts import merged, part_of
from mempool.client.gathers.prefetched import Prefetched
from mempool.client.gathers.window import Room, Window
from mempool.client.opening.waiting import Begin, Run
from mempool.client.routing.attempt import LookupRecord
from mempool.client.routing.plan import packed_sums
from mempool.client.routing.router import Router
from mempool.client.training.begun import BegunGather, Told
from mempool.client.training.cautions import Cautions
from mempool.client.training.session import Session
from mempool.errors import InvalidRequest
from mempool.types import TableSchema
from mempool.types.bags import Act, Bags
from mempool.types.messages import ReplyDtype

WireDtype = Literal["float32", "bfloat16", "float8_e4m3fn"]

_WIRE_DTYPES: dict[WireDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.bfloat16,  # of weights: they have no blocks that could share a scale
}


class TableLink:
    """A table as ``mempool.client.gathers`` sees it (its ``Link``). Lives as long as a graph, or the table, needs it.

    Life of a gather: [TRAINER] ``wire_weights`` copies, ``send_gather`` waits for pooled values; in the backward pass
    ``send_update`` copies and waits for d_weights; ``release`` lets the shards forget once the graph is gone.

    It goes on with another table of the same name where ``rebind`` says so; graphs of the one before cannot.

    Attributes:
        name, num_slots, value_dim: As of the table's schema: the same for good.
        number: In ``LINKS``.
        markers: Of the modules whose ``zero_grad`` drops what is pending.
        session: The table's updates and steps.
        run: Waits for the IO loop.
        prefetched: Gathers of this table that were started ahead.
        hot_rows: Rows of it that are kept here; None: none are.
        looked_up: The version that the last look-up was answered from.
    """

    def __init__(self, schema: TableSchema, *, router: Router, session: Session, run: Run, begin: Begin) -> None:
        self._schema = schema
        self.name, self.num_slots, self.value_dim = schema.name, schema.num_slots, schema.value_dim
        self._router = router
        self.session = session
        self.run = run
        self._begin = begin
        self._window = Window()
        self.prefetched = Prefetched()
        self.hot_rows: HotRows | None = None
        self._cache_bytes = 0
        self._wire_dtype: WireDtype = "float32"
        self._cautions = Cautions(schema.name)
        self.markers = Markers()
        self.looked_up: int | None = None
        self.number = LINKS.add(self)

    @property
    def wire_dtype(self) -> WireDtype:
        """What weights, gradients and whole pooled values are on the wire. Sums are float32 in either case."""
        return self._wire_dtype

    @wire_dtype.setter
    def wire_dtype(self, wire_dtype: WireDtype) -> None:
        if wire_dtype not in _WIRE_DTYPES:
            raise InvalidRequest(f"wire_dtype = {wire_dtype!r}: must be 'float32', 'bfloat16' or 'float8_e4m3fn'.")
        self._wire_dtype = wire_dtype

    @property
    def cache_bytes(self) -> int:
        """What rows that are kept here may take; 0: none are."""
        return self._cache_bytes

    @cache_bytes.setter
    def cache_bytes(self, cache_bytes: object) -> None:
        num_bytes = as_count(cache_bytes)
        if num_bytes is None or num_bytes < 0:
            raise InvalidRequest(
                f"table {self.name!r}: cache_bytes = {cache_bytes!r}: must be a number of bytes, 0 for no cache"
            )
        self.hot_rows = self._new_hot_rows(num_bytes)
        self._cache_bytes = num_bytes

    def _new_hot_rows(self, num_bytes: int) -> HotRows | None:
        if not num_bytes:
            return None
        return HotRows(num_bytes=num_bytes, num_slots=self.num_slots, value_dim=self.value_dim, table=self.name)

    def wire_weights(self, weights: Tensor | None, *, kept: bool = True) -> Tensor | None:
        """Weights as they are sent. kept: Beyond the call: what the caller may write to by then is copied."""
        if weights is None:
            return None
        dtype = _WIRE_DTYPES[self._wire_dtype]
        if not kept and weights.dtype == dtype and weights.device.type == "cpu" and weights.is_contiguous():
            return weights.detach() if weights.requires_grad else weights
        return own_copy(weights, dtype)

    def send_gather(self, bags: Bags, *, remember: bool) -> tuple[Tensor, LookupRecord]:
        """Pooled values [B, V] float32 on the CPU."""
        fetched = self.prefetched.take(
            bags,
            known_version=lambda: self.session.known_version,
            commits=self.session.commits,
            reply_dtype=self._wire_dtype,
        )
        if fetched is not None:
            return fetched if remember else self._not_remembered(*fetched)
        if self.hot_rows is not None and not remember:
            answer = self._kept(self.hot_rows, bags)
            if answer is not None:
                return answer
        return self._ask(bags, remember=remember)

    def _kept(self, hot_rows: HotRows, bags: Bags) -> tuple[Tensor, LookupRecord] | None:
        """What rows that are kept here have a part in; None: shards are to be asked."""
        plan = self._router.plan_now(self.session.table_id)
        if plan is None:
            return None
        return hot_rows.gather(
            bags,
            plan=plan,
            known_version=self.session.known_version or 0,
            reply_dtype=self._wire_dtype,
            ask=partial(self._ask, remember=False),
        )

    def _ask(self, bags: Bags, *, remember: bool) -> tuple[Tensor, LookupRecord]:
        answer = self._answer_to(bags, remember=remember)
        self._looked(answer[1])
        return answer

    def _answer_to(self, bags: Bags, *, remember: bool) -> tuple[Tensor, LookupRecord]:
        session, reply_dtype, began_s = self.session, self._wire_dtype, time.monotonic()
        answer = session.gather_at_once(bags, remember=remember, reply_dtype=reply_dtype)
        if answer is None:
            timeout_s = session.left_s(began_s)
            answer = self.run(session.gather(bags, remember=remember, reply_dtype=reply_dtype, timeout_s=timeout_s))
        return answer

    def _looked(self, record: LookupRecord) -> None:
        self.looked_up = record.seen.newest_version
        self._cautions.after_gather(record.seen)

    def begin_gather(self, bags: Bags, *, remember: bool) -> BegunGather:
        """As ``send_gather``, whose answer is taken later."""
        num_bytes, reply_dtype = self._bytes_of(bags), self._wire_dtype
        session, window, release, remembering = self.session, self._window, self._router.release, Remembering()

        async def gather() -> tuple[Tensor, LookupRecord]:
            try:
                values, record = await session.gather(bags, remember=remember, reply_dtype=reply_dtype)
            finally:
                window.leave(room)
            if record.remembered_by:
                remembering.remembered(release(record))
            return values, record

        room = window.enter(num_bytes, timeout_s=self._router.timeout_s)
        try:
            pending = self._begin(gather())
        except BaseException:
            window.leave(room)
            raise
        return BegunGather(pending, remembering, lambda answer: self._looked(answer[1]))

    def _gather_here(self, bags: Bags, *, remember: bool) -> BegunGather:
        """As ``begin_gather``, done by this thread where shards are of this process: two threads less take turns."""
        answer = None
        if self.session.shards_are_here:
            answer = self.session.gather_at_once(bags, remember=remember, reply_dtype=self._wire_dtype)
        return self.begin_gather(bags, remember=remember) if answer is None else self._done(answer)

    def _done(self, answer: tuple[Tensor, LookupRecord]) -> BegunGather:
        done, remembering = Future[tuple[Tensor, LookupRecord]](), Remembering()
        done.set_result(answer)
        if answer[1].remembered_by:
            remembering.remembered(self.release(answer[1]))
        return BegunGather(done, remembering, lambda answer: self._looked(answer[1]))

    def prefetch(self, bags: Bags, *, remember: bool, may_wait: bool = False) -> bool:
        """Start a gather whose answer a later one of the same bags takes; False where there is no room for it.

        may_wait: This thread has nothing better to do until the answer is there.
        """
        begin = self._gather_here if may_wait else self.begin_gather
        return self._start_ahead([bags], lambda: [begin(bags, remember=remember)])

    def prefetch_each(self, parts: Sequence[Bags]) -> bool:
        """The same of several, of bags of one pair each, whose rows are asked for in one gather, each once. Waits for
        its answer, and cuts it up: what is kept is what others can take."""

        def ask() -> list[BegunGather]:
            whole, places = merged(parts)
            values, record = self._answer_to(whole, remember=False)
            return [self._done(part_of(values, record, part, own)) for part, own in zip(parts, places, strict=True)]

        return self._start_ahead(parts, ask)

    def _start_ahead(self, parts: Sequence[Bags], ask: Callable[[], Sequence[PendingAnswer]]) -> bool:
        return self.prefetched.start(
            [(part, self._bytes_of(part)) for part in parts],
            version=self.session.known_version,
            commits=self.session.commits,
            reply_dtype=self._wire_dtype,
            ask=ask,
        )

    def reserve_ahead(self, num_rows: int) -> Room | None:
        """Keep room for a ``prefetch`` of at most so many bags of one pair each, until ``prefetched.release`` of it;
        None where there is not as much."""
        num_bytes = num_rows * (8 + 8 + 4 * self.value_dim)
        return self.prefetched.reserve(num_bytes, version=self.session.known_version)

    def _bytes_of(self, bags: Bags) -> int:
        """Of a gather and its answer."""
        return bags.num_bytes + 4 * bags.num_bags * self.value_dim

    def _not_remembered(self, values: Tensor, record: LookupRecord) -> tuple[Tensor, LookupRecord]:
        if record.remembered_by:
            self.release(record)()
        return values, replace(record, remembered_by=frozenset())

    def begin_update(self, record: LookupRecord, grads: Tensor, *, hold: bool) -> Told[Tensor | None]:
        """As ``send_update`` with want_weight_grad, whose answer is taken later."""
        own = self._before_update(grads, hold=hold)
        pending = self.session.weight_grad_later(record, own, hold=hold, begin=self._begin)
        return Told(pending, lambda _: self._after_update(hold=hold))

    def send_update(self, record: LookupRecord, grads: Tensor, *, hold: bool, want_weight_grad: bool) -> Tensor | None:
        """grads [B, V] on any device -> d_weights [L] float32 on the CPU."""
        if not (hold or want_weight_grad):
            return None
        own = self._before_update(grads, hold=hold)
        if want_weight_grad:
            answer = self.session.weight_grad(record, own, hold=hold, run=self.run)
        else:
            answer = self.run(self.session.update(record, own, hold=hold, want_weight_grad=False))
        self._after_update(hold=hold)
        return answer

    def send_experts(self, bags: Bags, inputs: Tensor, *, act: Act, remember: bool) -> tuple[Tensor, LookupRecord]:
        """Sums of experts [B, V - I] float32 on the CPU; inputs: [B, I] as ``wire_weights`` answers them."""
        reply_dtype: ReplyDtype = "float32" if self._wire_dtype == "float32" else "bfloat16"
        answer = self.run(
            self.session.gather(bags, remember=remember, reply_dtype=reply_dtype, experts=Experts(act, inputs))
        )
        self._looked(answer[1])
        return answer

    def send_expert_update(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, want_grads: bool
    ) -> tuple[Tensor, Tensor] | None:
        """grads [B, V - I] on any device -> d_weights [L] and d_inputs [B, I], float32 on the CPU, where wanted."""
        experts = record.experts
        assert experts is not None, "the lookup was of experts"
        if not (hold or want_grads):
            return None
        both = torch.cat(
            [experts.inputs.to(torch.float32), grads.detach().to(device="cpu", dtype=torch.float32)], dim=1
        )
        # Inputs and gradients that shared a scale would be of the larger ones' precision: the gradients perhaps zeros.
        own = self._before_update(both, hold=hold, may_pack=experts.input_dim % self._schema.block_dim == 0)
        answer = self.run(self.session.update(record, own, hold=hold, want_weight_grad=want_grads))
        self._after_update(hold=hold)
        if answer is None:
            return None
        num_pairs = record.bags.num_pairs
        return answer[:num_pairs], answer[num_pairs:].view(-1, experts.input_dim)

    def _before_update(self, grads: Tensor, *, hold: bool, may_pack: bool = True) -> Tensor:
        if hold:
            coordinator = self.session.coordinator
            if coordinator.found is not None:
                self.run(coordinator.joined())
            self._cautions.before_update(grouped=coordinator.group is not None or coordinator.alone)
            self._begin_gradient()
        if self._wire_dtype == "float8_e4m3fn" and may_pack:
            return kernels.pack_rows(packed_sums(self._schema), grads.detach().to(torch.float32)).cpu()
        return own_copy(grads, _WIRE_DTYPES[self._wire_dtype])

    def _after_update(self, *, hold: bool) -> None:
        if hold:
            self._cautions.after_update(pending=self.session.pending, pending_bytes=self.session.pending_bytes)

    @property
    def own_lr(self) -> float:
        """The learning rate of the table's optimizer."""
        return self._schema.optimizer.lr

    @property
    def steps_together(self) -> bool:
        """Whether it is committed by a group's ranks together: also by those that have nothing pending."""
        coordinator = self.session.coordinator
        group = self.run(coordinator.joined()) if coordinator.found is not None else coordinator.group
        return group is not None and group.steps_together

    @property
    def counts_steps(self) -> bool:
        """Whether ranks of its group wait for the number of this one's steps, those that it skips among them."""
        group = self.session.coordinator.group
        return group is not None and group.counts_steps

    @property
    def place(self) -> tuple[int, int]:
        """Where its group is, as this rank knows: steps that are committed, and the generation; 0, 0 without one."""
        group = self.session.coordinator.group
        return (0, 0) if group is None else group.place

    def version(self) -> int:
        """The table's version, as the shards of its first slot have it now."""
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        weights = torch.ones(1, dtype=torch.float32, device="cpu")  # so that shards are asked, whatever was prefetched
        bags = Bags(ids=first, weights=weights, offsets=torch.tensor([0, 1], dtype=torch.int64, device="cpu"))
        _, record = self.send_gather(bags, remember=False)
        return record.seen.newest_version

    @property
    def known_version(self) -> int | None:
        """The newest version of the table that this client knows of; None before it has heard of any."""
        return self.session.known_version

    def expect(self, version: int | None, *, whose: str) -> None:
        """State was loaded that was saved beside this version; the next look that meets another one warns."""
        self._cautions.expect(version, known=self.known_version, whose=whose)

    def rebind(self, schema: TableSchema, session: Session) -> None:
        """From now on it is another table of the same name, slots and width."""
        self.markers.reset()
        self._schema, self.session = schema, session
        self.prefetched.drop()
        self.hot_rows = self._new_hot_rows(self._cache_bytes)

    def drop_zeroed(self) -> int:
        """Discard what is pending if a module that holds the table has zeroed it; answers how many updates."""
        if self.session.nothing_to_drop or not self.markers.zeroed():
            return 0
        self.markers.reset()
        return self.run(self.session.discard())

    def _begin_gradient(self) -> None:
        self.drop_zeroed()
        if not self.session.pending:
            self.markers.reset()

    def release(self, record: LookupRecord) -> Callable[[], None]:
        """A function that lets shards forget a lookup, with the next gather; for any thread, at any moment."""
        return self._router.release(record)
