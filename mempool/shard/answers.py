"""What a shard answers to clients: each request is fenced, checked and sized, then done; nothing changes before.

All runs on the engine's thread. Long reads are done in pieces, others in between: each bag, query or row is of one
version of the table, none older than the one the answer is stamped with. Writes are never cut.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mempool import kernels
from mempool.errors import InvalidRequest
from mempool.observe import Stages
from mempool.shard import bounds, validate
from mempool.shard.array_gathers import ArrayGathers
from mempool.shard.durable.records import Held
from mempool.shard.experts.answers import AskedExperts, ExpertAnswers, answer_of, held_twice, joined_gradients
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.scoring import Picked
from mempool.shard.parking import Parked
from mempool.shard.reading.begun import BegunGather, Pieces, Read, Space, form_of, parts_at_once, row_bytes
from mempool.shard.reading.pieces import queries_at_once
from mempool.shard.reading.pinned import PinnedTable, answered_pin, pinned
from mempool.shard.reading.rows import RowAnswers
from mempool.shard.steps.contexts import Contexts, joined
from mempool.shard.steps.held import HeldUpdate
from mempool.shard.tenancy import Tenancy
from mempool.shard.work import pace as of_pace
from mempool.shard.work.beside import Beside
from mempool.shard.work.jobs import SMALL_BYTES, Shared
from mempool.shard.work.pace import BAG_ROWS, Pace
from mempool.types import (
    Envelope,
    GatherReply,
    GatherRequest,
    PinReply,
    PinRequest,
    ReadRowsRequest,
    ScoreReply,
    ScoreRequest,
    UpdateReply,
    UpdateRequest,
)
from mempool.types.bags import Bags
from mempool.types.messages import ArrayGather

LEAST_TOGETHER, LEAST_TOGETHER_ON_CPU = 2, 4
"""Gathers that are summed by one kernel. A CPU's is begun so soon that what joining costs is not saved before."""


class Answers(RowAnswers):
    """The data half of a shard.

    Args:
        tenancy: The tables.
        contexts: Lookups remembered.
        stages: Where time is counted.
        reply_bytes: What values, scores and rows may have; None: as much as there is.
        message_bytes: What any answer may have.
        pace: Says how much is read before others have their turn.
        reserve: Told the bytes of an answer before it is made; may refuse.
        asked_s: When the request that is being answered came, on the shard's clock, which leases of pins are told by.
        beside: Lets others read while a kernel does.
    """

    def __init__(
        self,
        tenancy: Tenancy,
        *,
        contexts: Contexts,
        stages: Stages,
        reply_bytes: int | None,
        message_bytes: int | None,
        pace: Pace,
        reserve: Callable[[int], None] = lambda _: None,
        asked_s: Callable[[], float] = lambda: 0.0,
        beside: Beside | None = None,
    ) -> None:
        self._tenancy = tenancy
        self._contexts = contexts
        self._stages = stages
        self.arrays = ArrayGathers(tenancy, contexts=contexts, stages=stages, reply_bytes=reply_bytes, pace=pace)
        self._experts = ExpertAnswers(
            stages=stages, reply_bytes=reply_bytes, message_bytes=message_bytes, reserve=reserve
        )
        self._reply_bytes = reply_bytes
        self._message_bytes = message_bytes
        self._pace = pace
        self._reserve = reserve
        self._asked_s = asked_s
        self._clock = pace.clock
        self._beside = beside or Beside()

    def is_long(self, request: GatherRequest | UpdateRequest, caller: str) -> bool:
        """Whether it is answered in pieces, as far as is seen without opening it. For any thread: it only looks."""
        table = self._tenancy.tables.get(request.envelope.table_id)
        if table is None or request.ids is None:
            return False
        return self._pace.is_long(row_bytes(table) * request.ids.numel(), caller)

    def is_little(self, asked: ArrayGather) -> bool:
        """Whether it reads so little that whoever it is read beside waits no longer than for a small piece. For any
        thread, likewise."""
        table = self._tenancy.tables.get(asked.envelope.table_id)
        num_rows = asked.ids.shape[0] + BAG_ROWS * asked.offsets.shape[0]
        return table is not None and row_bytes(table) * num_rows <= of_pace.LEAST_PIECE_BYTES

    def lets_in(self, request: GatherRequest) -> bool:
        """Whether it is done in pieces beside which others may read, as far as is seen. For any thread, likewise."""
        table = self._tenancy.tables.get(request.envelope.table_id)
        if table is None or request.act or request.pin or not table.storage.has_array_rows:
            return False
        return row_bytes(table) * request.ids.numel() > 2 * of_pace.LEAST_PIECE_BYTES

    def gather(
        self, request: GatherRequest, *, space: Space | None = None
    ) -> GatherReply | Parked | Pieces[GatherReply]:
        """The sums of bags; space: gives the memory that they are written to."""
        return self._gather(self._of(request), request, space)

    def reading_gather(self, request: GatherRequest) -> GatherReply | Parked | Pieces[GatherReply] | None:
        """As ``gather``, where that only reads: it may be cut off anywhere. None where it would write."""
        table = self._of(request)
        if table.storage.schedule is not None:
            return None
        try:
            return self._gather(table, request, None)
        except BaseException:
            self._contexts.recount()
            raise

    def shared_gather(
        self,
        request: GatherRequest,
        answered: Callable[[Callable[[GatherRequest], Any], GatherRequest], Any],
        *,
        space: Space | None = None,
    ) -> Shared | None:
        """How a gather is done together with others; None where that gains nothing. For any thread: it only looks.

        Args:
            request: What is asked.
            answered: Given ``begin_gather`` and a request, answers as ``gather``'s caller answers.
            space: As of ``gather``.
        """
        table = self._tenancy.tables.get(request.envelope.table_id)
        if table is None or request.pin or request.act:
            return None
        ids, offsets = request.ids, request.offsets
        num_bytes = ids.nbytes + offsets.nbytes + row_bytes(table) * (ids.numel() + BAG_ROWS * offsets.numel())
        if num_bytes > SMALL_BYTES:
            return None
        return Shared(
            num_bytes=num_bytes,
            least=LEAST_TOGETHER_ON_CPU if table.storage.device.type == "cpu" else LEAST_TOGETHER,
            begin=partial(answered, partial(self.begin_gather, space=space)),
            end=self.end_gathers,
        )

    def begin_gather(
        self, request: GatherRequest, *, space: Space | None = None
    ) -> BegunGather | Parked | Pieces[GatherReply]:
        """As ``gather``, but for the sums; ``end_gathers`` must follow in the same turn."""
        begun = self._begun(self._of(request), request, space)
        if isinstance(begun, Parked) or not self._is_long_gather(begun):
            return begun
        return self._gather_in_pieces(begun)

    def end_gathers(self, several: Sequence[BegunGather]) -> list[GatherReply]:
        """The answers of gathers that are alike, by one kernel, each with the bits that it has alone."""
        bags = joined([begun.bags for begun in several]) if len(several) > 1 else None
        if bags is None:
            return [self._whole_gather(begun) for begun in several]
        first = several[0]
        sums = self._pooled(first.table, bags, first.dtype, for_step=first.request.remember, out=None)
        parts = torch.split(sums, [begun.bags.num_bags for begun in several])
        # Copies: an answer that waits to be sent would keep all the others', of which nobody counts a byte any more.
        return [
            self._gathered(begun, part.clone() if begun.out is None else begun.out.copy_(part))
            for begun, part in zip(several, parts, strict=True)
        ]

    def _gather(
        self, table: Read, request: GatherRequest, space: Space | None
    ) -> GatherReply | Parked | Pieces[GatherReply]:
        if request.act:
            waits = self._waits(table, request.envelope)
            return self._experts_gathered(table, request) if waits is None else waits
        begun = self._begun(table, request, space)
        if isinstance(begun, Parked):
            return begun
        return self._gather_in_pieces(begun) if self._is_long_gather(begun) else self._whole_gather(begun)

    def _begun(self, table: Read, request: GatherRequest, space: Space | None) -> BegunGather | Parked:
        if (waits := self._waits(table, request.envelope)) is not None:
            return waits
        began_s = time.perf_counter()
        bags, dtype = validate.check_gather(table.storage, request, reply_bytes=self._reply_bytes)
        self._stages.note(("copy in", time.perf_counter() - began_s))
        shape, form = form_of(table, bags, dtype)
        self._reserve(form.itemsize * shape[0] * shape[1])
        return BegunGather(request, table, bags, dtype, None if space is None else space(shape, form))

    def _experts_gathered(self, table: Read, request: GatherRequest) -> GatherReply | Pieces[GatherReply]:
        asked = self._experts.checked_gather(table, request)
        begun = BegunGather(request, table, asked.bags, asked.dtype, None)
        if self._is_long_gather(begun):
            return self._experts_in_pieces(begun, asked)
        return self._gathered(begun, self._experts.sums(table.storage, asked, request))

    def _experts_in_pieces(self, begun: BegunGather, asked: AskedExperts) -> Pieces[GatherReply]:
        request, table, some = begun.request, begun.table, []
        stamp = table.stamp
        for first, end, part in parts_at_once(asked.bags, row_bytes(table), self._pace):
            table = self._of(request)
            part_asked = replace(asked, bags=part, inputs=asked.inputs[first:end])
            some.append(self._experts.sums(table.storage, part_asked, request))
            yield
        return replace(self._gathered(replace(begun, table=table), torch.cat(some)), stamp=stamp)

    def _is_long_gather(self, begun: BegunGather) -> bool:
        return self._pace.is_long(row_bytes(begun.table) * (begun.bags.num_pairs + BAG_ROWS * begun.bags.num_bags))

    def _whole_gather(self, begun: BegunGather) -> GatherReply:
        values = self._pooled(begun.table, begun.bags, begun.dtype, for_step=begun.request.remember, out=begun.out)
        return self._gathered(begun, values)

    def _pooled(self, table: Read, bags: Bags, dtype: torch.dtype, *, for_step: bool, out: Tensor | None) -> Tensor:
        def sums() -> Tensor:
            began_s = self._pace.clock()
            values = self._summed(table, bags, dtype, for_step=for_step, out=out)
            self._pace.took(row_bytes(table) * bags.num_pairs, self._pace.clock() - began_s)
            return values

        only_reads = isinstance(table, HostedTable) and table.storage.has_array_rows
        return self._beside.letting_in(sums) if only_reads else sums()

    def _summed(self, table: Read, bags: Bags, dtype: torch.dtype, *, for_step: bool, out: Tensor | None) -> Tensor:
        storage = table.storage
        if dtype == torch.float8_e4m3fn:
            packed = storage.packed_sums
            with self._stages.measure("kernel"):
                values = storage.pooled(bags, for_step=for_step)
                rows = values.to(torch.uint8) if packed is None else kernels.pack_rows(packed, values)
            return self._copy_out(rows, out)
        on_cpu = storage.device.type == "cpu"
        began_s = time.perf_counter()
        values = storage.pooled(bags, dtype, for_step=for_step, out=out if on_cpu else None)
        self._stages.note(("kernel", time.perf_counter() - began_s))
        return values if on_cpu else self._copy_out(values, out)

    def _gather_in_pieces(self, begun: BegunGather) -> Pieces[GatherReply]:
        request, table, bags, dtype, out = begun.request, begun.table, begun.bags, begun.dtype, begun.out
        stamp, (shape, form) = table.stamp, form_of(table, bags, dtype)
        values = torch.empty(shape, dtype=form) if out is None else out
        for first, end, part in parts_at_once(bags, row_bytes(table), self._pace):
            table = self._of(request)  # it may have moved, or been dropped, meanwhile
            self._pooled(table, part, dtype, for_step=request.remember, out=values[first:end])
            yield
        reply = self._gathered(BegunGather(request, table, bags, dtype, out), values)
        return GatherReply(stamp=stamp, blocks=reply.blocks, values=reply.values)

    def _gathered(self, begun: BegunGather, values: Tensor) -> GatherReply:
        request, table = begun.request, begun.table
        if request.release:
            self._contexts.release(request.release)
        if request.remember:
            self._contexts.remember(request.lookup_id, table_id=table.table_id, epoch=table.epoch, bags=begun.bags)
        table.lookups += 1
        table.storage.heat.used(begun.bags.ids)
        return GatherReply(stamp=table.stamp, blocks=table.storage.blocks, values=values)

    def update(
        self, request: UpdateRequest, *, caller: str = "", space: Space | None = None
    ) -> UpdateReply | Parked | Pieces[UpdateReply]:
        """What holds an update; space: gives the memory that the weights' gradient is written to."""
        table = self._tenancy.fenced(request.envelope)
        bounds.check_step(request.step_id, (request.sequence,))
        held = table.updates.get(request.step_id, request.sequence) if request.hold else None
        reads = request.want_weight_grad or (bool(request.act) and held is None)
        if reads and (waits := self._waits(table, request.envelope)) is not None:
            return waits
        if request.hold:
            table.require_newest(request.step_id)
        if held is not None and request.act and request.want_weight_grad:
            return self._updated(request, table, None, self._experts.again(table, request, held), caller)
        if held is not None:
            # A repeat is answered from what is held, whatever it brings: its context may be gone by now.
            if held.input_dim and request.want_weight_grad:
                raise InvalidRequest(
                    f"update {request.sequence} is held, of experts, and no act was given. Nothing was changed."
                )
            update = held
        else:
            bounds.check_lookups(request.lookups)
            remembered = self._contexts.recall(
                request.lookup_id,
                request.lookups,
                table_id=table.table_id,
                epoch=table.epoch,
                reserve=self._reserve,
            )
            if request.hold and not table.is_decided(request.step_id):
                table.updates.require_room(
                    request.step_id, validate.held_bytes(table.storage, request, remembered), caller=caller
                )
            if request.grads.dtype == torch.uint8:
                self._reserve(4 * request.grads.numel())  # unpacked, that is more than the message
            if request.act:
                bags, grads = self._experts.checked_update(table, request, remembered)
                if self._pace.is_long(row_bytes(table) * (bags.num_pairs + bags.num_bags)):
                    return self._expert_update_in_pieces(request, table, bags, grads, caller)
                found = self._experts.gradients(table.storage, bags, grads, request)
                return self._expert_updated(request, table, bags, grads, found, caller)
            with self._stages.measure("copy in"):
                update = HeldUpdate(
                    *validate.check_update(table.storage, request, remembered, reply_bytes=self._message_bytes)
                )
        new = request.hold and held is None
        if not request.want_weight_grad:
            return self._updated(request, table, update if new else None, None, caller)
        self._reserve(4 * update.bags.num_pairs)
        out = None if space is None else space((update.bags.num_pairs,), torch.float32)
        if self._pace.is_long(row_bytes(table) * (update.bags.num_pairs + update.bags.num_bags)):
            return self._update_in_pieces(request, table, update, new, caller, out)
        weight_grad = self._weight_grad(table, update.bags, update.grads, out=out)
        return self._updated(request, table, update if new else None, weight_grad, caller)

    def _weight_grad(self, table: HostedTable, bags: Bags, grads: Tensor, *, out: Tensor | None) -> Tensor:
        on_cpu = table.storage.device.type == "cpu"
        with self._stages.measure("kernel"):
            weight_grad = table.storage.weight_grad(bags, grads, out=out if on_cpu else None)
        return weight_grad if on_cpu else self._copy_out(weight_grad, out)

    def _update_in_pieces(
        self,
        request: UpdateRequest,
        table: HostedTable,
        update: HeldUpdate,
        new: bool,
        caller: str,
        out: Tensor | None,
    ) -> Pieces[UpdateReply]:
        weight_grad = torch.empty(update.bags.num_pairs, dtype=torch.float32) if out is None else out
        at = 0
        for first, end, part in parts_at_once(update.bags, row_bytes(table), self._pace):
            table = self._tenancy.fenced(request.envelope)
            self._weight_grad(table, part, update.grads[first:end], out=weight_grad[at : at + part.num_pairs])
            at += part.num_pairs
            yield
        new = new and table.updates.get(request.step_id, request.sequence) is None
        return self._updated(request, table, update if new else None, weight_grad, caller)

    def _expert_update_in_pieces(
        self, request: UpdateRequest, table: HostedTable, bags: Bags, grads: Tensor, caller: str
    ) -> Pieces[UpdateReply]:
        some = []
        for first, end, part in parts_at_once(bags, row_bytes(table), self._pace):
            table = self._tenancy.fenced(request.envelope)
            some.append(self._experts.gradients(table.storage, part, grads[first:end], request))
            yield
        return self._expert_updated(request, table, bags, grads, joined_gradients(some), caller)

    def _expert_updated(
        self,
        request: UpdateRequest,
        table: HostedTable,
        bags: Bags,
        grads: Tensor,
        found: kernels.ExpertGradients,
        caller: str,
    ) -> UpdateReply:
        new = request.hold and table.updates.get(request.step_id, request.sequence) is None
        update = held_twice(bags, grads, request.input_dim, found) if new else None
        return self._updated(request, table, update, answer_of(found) if request.want_weight_grad else None, caller)

    def _updated(
        self,
        request: UpdateRequest,
        table: HostedTable,
        new: HeldUpdate | None,
        weight_grad: Tensor | None,
        caller: str,
    ) -> UpdateReply:
        if new is not None and not table.is_decided(request.step_id):
            self._tenancy.log.require(new.num_bytes)
            table.updates.hold(request.step_id, request.sequence, new, caller=caller)
            pairs = new.bags.num_pairs // 2 if new.input_dim else new.bags.num_pairs  # those of experts are there twice
            table.storage.heat.used(new.bags.ids[:pairs])
            if self._tenancy.log.keeps:
                self._tenancy.log.add(Held(table.table_id, request.step_id, request.sequence, new))
            self._tenancy.make_room()
        return UpdateReply(stamp=table.stamp, weight_grad=weight_grad)

    def score(self, request: ScoreRequest) -> ScoreReply | Parked | Pieces[ScoreReply]:
        table = self._of(request)
        if (waits := self._waits(table, request.envelope)) is not None:
            return waits
        with self._stages.measure("copy in"):
            queries = validate.check_score(table.storage, request, reply_bytes=self._reply_bytes)
            picked = validate.check_picked(table.storage, request)
        self._reserve(12 * queries.shape[0] * max(1, len(table.storage.scored_heads)) * request.topk)
        probes = 0 if picked is None else picked.groups.shape[1]
        num_queries = queries_at_once(table.storage, request.topk, probes=probes)
        if queries.shape[0] > num_queries:
            return self._score_in_pieces(request, table, queries, picked, num_queries)
        with self._stages.measure("kernel"):
            heads, scores, ids = table.storage.score(queries, request.topk, picked=picked)
        return ScoreReply(stamp=table.stamp, heads=heads, scores=self._copy_out(scores), ids=self._copy_out(ids))

    def _score_in_pieces(
        self, request: ScoreRequest, table: Read, queries: Tensor, picked: Picked | None, num_queries: int
    ) -> Pieces[ScoreReply]:
        stamp = table.stamp
        heads = table.storage.scored_heads
        shape = queries.shape[0], len(heads), request.topk
        scores, ids = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.int64)
        for first in range(0, queries.shape[0], num_queries):
            table, end = self._of(request), first + num_queries
            some = None if picked is None else picked.some(first, end)
            # Of groups the first version, of their slots the last one: a client sees where a commit came between.
            stamp = stamp if picked is None else table.stamp
            with self._stages.measure("kernel"):
                _, best, found = table.storage.score(queries[first:end], request.topk, picked=some)
            scores[first:end] = self._copy_out(best)
            ids[first:end] = self._copy_out(found)
            yield
        return ScoreReply(stamp=stamp, heads=heads, scores=scores, ids=ids)

    def _of(self, request: GatherRequest | ScoreRequest | ReadRowsRequest) -> Read:
        """What it reads. Raises as ``Tenancy.fenced``, and VersionGone."""
        table = self._tenancy.fenced(request.envelope)
        return pinned(table, request.pin) if request.pin else table

    def pin(self, request: PinRequest) -> PinReply | Parked:
        """See ``answered_pin``."""
        table = self._tenancy.fenced(request.envelope)
        waits = self._waits(table, request.envelope) if request.do in ("arm", "settle") else None
        return answered_pin(table, request, now_s=self._clock()) if waits is None else waits

    def _waits(self, table: Read, envelope: Envelope) -> Parked | None:
        """What a reader has to wait for: a version that it has seen, or a step that may be acknowledged by now."""
        if isinstance(table, PinnedTable):
            return None
        if envelope.table_version <= table.order.applied and table.is_settled:
            return None
        asked_s = self._asked_s()
        waits = table.lacks(envelope, waits_since_s=asked_s)
        return table.in_doubt(waits_since_s=asked_s) if waits is None else waits

    def _copy_out(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        if tensor.device.type == "cpu" and out is None:
            return tensor
        # On a GPU this waits for the kernel too: its launch alone is counted as "kernel".
        with self._stages.measure("copy out"):
            return tensor.cpu() if out is None else out.copy_(tensor)
