"""The three services as tables: which call of which protocol answers which method."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
import numpy as np

from mempool.errors import MempoolError
from mempool.placement.changes import ToldViews, changed
from mempool.server.calls import Door, handler, streaming_handler
from mempool.server.turns import LARGE_BYTES
from mempool.types import (
    AttachTable,
    CommitRequest,
    DropTable,
    GatherReply,
    GatherRequest,
    PoolApi,
    PoolStatus,
    PrepareRequest,
    RescaleProgress,
    ShardHost,
    ShardStatus,
    TableSchema,
    TableView,
    UpdateReply,
    UpdateRequest,
)
from mempool.types.caller import current_caller
from mempool.types.messages import ArrayGather, ArrayGathered
from mempool.wire import methods
from mempool.wire.codecs import arrays
from mempool.wire.codecs.lines import OpenedLine, OpenLine
from mempool.wire.codecs.lookup import LookupReply, LookupRequest
from mempool.wire.codecs.pages import AttachView, ForgetTable, FreezeTable, SetView, ThawTable
from mempool.wire.codecs.tables import AskTable, ToldTable
from mempool.wire.methods import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
Handlers = dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]
Space = Callable[[tuple[int, ...], "torch.dtype"], "Tensor | None"]
ArraySpace = Callable[[int, int], Any]
Tell = Callable[[Any, BaseException | None], None]
TakeBack = Callable[[], None]
Lookup = Callable[[LookupRequest], Awaitable[LookupReply]]
_FEW_PAIRS = 4096
"""Of a gather that takes less time than two threads take to hand it over."""


class AtOnce(Protocol):
    """A shard, by whoever is in its process: answers threads without an event loop. None, and whatever it raises, or
    tells, of mempool's errors: it is to be asked by its own calls, which say why."""

    def gather(self, request: GatherRequest, *, caller: str, space: Space | None = None) -> GatherReply | None:
        """Where the shard has nothing else to do. space: gives the memory that the answer is written to."""

    def gather_arrays(self, asked: ArrayGather, *, cost: int, caller: str, space: ArraySpace) -> ArrayGathered | None:
        """The same of arrays; None, too, where ``space`` gives none."""

    def update(self, request: UpdateRequest, *, caller: str, space: Space | None = None) -> UpdateReply | None: ...

    def line_up_gather(
        self, request: GatherRequest, *, caller: str, timeout_s: float, tell: Tell, space: Space | None = None
    ) -> TakeBack:
        """When its turn comes: ``tell`` is given the answer then, on any thread."""

    def line_up_update(
        self, request: UpdateRequest, *, caller: str, timeout_s: float, tell: Tell, space: Space | None = None
    ) -> TakeBack: ...

    def line_up_prepare(self, request: PrepareRequest, *, caller: str, timeout_s: float, tell: Tell) -> TakeBack | None:
        """None, too: nobody is told."""

    def line_up_commit(
        self, request: CommitRequest, *, caller: str, timeout_s: float, tell: Tell
    ) -> TakeBack | None: ...

    def take_turn(self) -> bool:
        """Do what waits, or a piece of it, on the caller's thread; False: ``hand_over`` is to see to it."""

    def hand_over(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Makes the handlers of services, by method name.

    Args:
        max_message_bytes: Larger replies are refused.
        door: What every call passes.
    """

    max_message_bytes: int
    door: Door

    def memory(
        self,
        shard: ShardHost | None,
        lookup: Lookup,
        *,
        at_once: AtOnce | None = None,
        open_line: Callable[[OpenLine], Awaitable[OpenedLine]] | None = None,
    ) -> Handlers:
        """``MemoryService``. Without a shard, as on the controller's address, it has Lookup alone.

        at_once: Answers small gathers where they arrive. open_line: Gives lines; None: there are none.
        """
        if shard is None:
            return dict([self._of(methods.LOOKUP, lookup)])

        async def gather(request: GatherRequest) -> GatherReply:
            reply = None
            if at_once is not None and request.ids.numel() <= _FEW_PAIRS:
                reply = at_once.gather(request, caller=current_caller().name)
            return await shard.gather(request) if reply is None else reply

        def small_gather(frame: bytes, caller: str) -> bytes | None:
            assert at_once is not None, "it was asked for"
            stages, came_s = self.door.stages, time.perf_counter()
            asked = arrays.read_gather(frame)
            if asked is None or asked.ids.shape[0] > _FEW_PAIRS:
                return None
            decoded_s = time.perf_counter() - came_s
            try:
                reply = at_once.gather_arrays(asked, cost=len(frame), caller=caller, space=_small_values)
            except MempoolError:
                return None  # the call knows what to say
            if reply is None:
                return None
            stages.record("decode", decoded_s)
            came_s = time.perf_counter()
            encoded = arrays.gathered(reply)
            stages.record("encode", time.perf_counter() - came_s)
            return encoded

        return dict(
            [
                self._of(methods.LOOKUP, lookup),
                self._of(methods.GATHER, gather, at_once=None if at_once is None else small_gather),
                self._of(methods.UPDATE, shard.update),
                self._of(methods.PREPARE, shard.prepare),
                self._of(methods.COMMIT, shard.commit),
                self._of(methods.DISCARD, shard.discard),
                self._of(methods.HEARTBEAT, shard.heartbeat),
                self._of(methods.SCORE, shard.score),
                self._of(methods.READ_ROWS, shard.read_rows),
                self._of(methods.WRITE_ROWS, shard.write_rows),
                self._of(methods.STEP_COUNT, shard.step_count),
                self._of(methods.USAGE, shard.usage),
                self._of(methods.MEET, shard.meet),
                self._of(methods.PIN, shard.pin),
                self._of(methods.OPEN_LINE, open_line or _no_line),
            ]
        )

    def shard(self, shard: ShardHost, *, clients: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> Handlers:
        """``ShardService``: what the controller and peers ask. clients: How many the status is to say, by
        lines that have shared memory and by TCP."""

        told = ToldViews()

        async def attach(request: AttachView) -> None:
            view = request.view
            if view is None:
                assert request.known is not None, "the codec lets nothing else in"
                view = told.view(request.known)
            told.tell(view)
            attached = AttachTable(
                view=view,
                mode=request.mode,
                ledger=request.ledger,
                pending=request.pending,
                source=request.source,
                fork=request.fork,
                also=request.also,
            )
            await shard.attach_table(attached)

        async def freeze(request: FreezeTable) -> int:
            return await shard.freeze(
                request.table_id, request.timeout_s, token=request.token, lease_s=request.lease_s, renew=request.renew
            )

        async def drop(request: ForgetTable) -> None:
            await shard.drop_table(request.table_id, unmade=request.unmade)

        async def thaw(request: ThawTable) -> None:
            await shard.thaw(request.table_id, token=request.token)

        async def set_view(request: SetView) -> None:
            view = request.view
            if view is None:
                assert request.change is not None, "the codec lets nothing else in"
                view = changed(await shard.views(), request.change)
            await shard.set_view(view, token=request.token)

        async def status(_: None) -> ShardStatus:
            near, tcp = clients()
            return replace(await shard.status(), near_clients=near, tcp_line_clients=tcp)

        return dict(
            [
                self._of(methods.ATTACH_TABLE, attach),
                self._of(methods.SHARD_DROP_TABLE, drop),
                self._of(methods.FREEZE, freeze),
                self._of(methods.THAW, thaw),
                self._of(methods.RESOLVE, shard.resolve),
                self._of(methods.EXPORT_PAGES, shard.export_pages),
                self._of(methods.EXPORT_LEDGER, shard.export_ledger),
                self._of(methods.PULL_PAGES, shard.pull_pages),
                self._of(methods.SET_VIEW, set_view),
                self._of(methods.MARK_TABLE, shard.mark_table),
                self._of(methods.WRITE_PART, shard.write_part),
                self._of(methods.RELEASE_MARK, shard.release_mark),
                self._of(methods.READ_HEAT, shard.read_heat),
                self._of(methods.STATUS, status),
            ]
        )

    def pool(self, pool: PoolApi) -> Handlers:
        """``PoolService``."""

        told = ToldViews()

        async def create(schema: TableSchema) -> TableView:
            view = await pool.create_table(schema)
            told.tell(view)
            return view

        async def table(request: AskTable) -> ToldTable:
            view = await pool.table(request.name)
            told.tell(view)
            change = None if request.known is None else told.change(request.known, view)
            return ToldTable(view=view) if change is None else ToldTable(change=change)

        async def tables(_: None) -> tuple[TableView, ...]:
            return await pool.tables()

        async def status(_: None) -> PoolStatus:
            return await pool.status()

        def rebalance(dry_run: bool) -> AsyncIterator[RescaleProgress]:
            return pool.rebalance(dry_run=dry_run)

        async def drop(request: DropTable) -> None:
            await pool.drop_table(request.name, table_id=request.table_id)

        return dict(
            [
                self._of(methods.CREATE_TABLE, create),
                self._of(methods.DROP_TABLE, drop),
                self._of(methods.GET_TABLE, table),
                self._of(methods.LIST_TABLES, tables),
                self._of(methods.GET_STATUS, status),
                self._of(methods.RESTORE, pool.restore),
                self._of(methods.FORK_TABLE, pool.fork),
                (methods.RESCALE.name, streaming_handler(methods.RESCALE, pool.rescale, door=self.door)),
                (methods.REBALANCE.name, streaming_handler(methods.REBALANCE, rebalance, door=self.door)),
                (methods.CHECKPOINT.name, streaming_handler(methods.CHECKPOINT, pool.checkpoint, door=self.door)),
            ]
        )

    def _of(
        self,
        method: Method[RequestT, ReplyT],
        call: Callable[[RequestT], Awaitable[ReplyT]],
        *,
        at_once: Callable[[bytes, str], bytes | None] | None = None,
    ) -> tuple[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        return method.name, handler(
            method, call, door=self.door, max_message_bytes=self.max_message_bytes, at_once=at_once
        )


def line_calls(shard: ShardHost) -> dict[str, Callable[[Any], Awaitable[Any]]]:
    """What clients ask of a shard by lines, by a method's path."""
    return {
        methods.GATHER.path: shard.gather,
        methods.UPDATE.path: shard.update,
        methods.PREPARE.path: shard.prepare,
        methods.COMMIT.path: shard.commit,
        methods.DISCARD.path: shard.discard,
        methods.HEARTBEAT.path: shard.heartbeat,
        methods.SCORE.path: shard.score,
        methods.READ_ROWS.path: shard.read_rows,
        methods.WRITE_ROWS.path: shard.write_rows,
        methods.STEP_COUNT.path: shard.step_count,
    }


def _small_values(num_bags: int, width: int) -> Any:
    """Memory of an answer for which nobody has to make room."""
    return np.empty((num_bags, width), np.float32) if 4 * num_bags * width < LARGE_BYTES // 2 else None


async def _no_line(_: OpenLine) -> OpenedLine:
    return OpenedLine(why="this shard has no lines")
