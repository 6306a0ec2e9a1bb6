"""The engine: one shard's whole work, behind the ``ShardHost`` protocol.

A request becomes a job. The life of one: it is counted and lined up on its caller's event loop (``jobs``), fenced,
checked, sized and answered on the engine's thread (``answers`` and ``committing`` for clients, ``tenancy`` for tables
and pages). Waiting (for a freeze to end, for a peer's pages) is done on the loop, never on the thread; views and
status do not line up.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from mempool.errors import MempoolError, Overloaded, ShardUnavailable, StepConflict
from mempool.observe import Stages
from mempool.shard import bounds
from mempool.shard.answers import Answers
from mempool.shard.committing import Committing
from mempool.shard.durable.changes import Changes
from mempool.shard.durable.records import Begun
from mempool.shard.meeting import Meetings
from mempool.shard.parking import Parked, answered
from mempool.shard.pulling import Pulling
from mempool.shard.saving.marks import Saving
from mempool.shard.saving.restoring import Restoring, check_source
from mempool.shard.steps.budget import MIB, Budget
from mempool.shard.steps.contexts import Contexts
from mempool.shard.steps.resolver import Resolver
from mempool.shard.tenancy import Tenancy
from mempool.shard.work.at_once import AtOnce
from mempool.shard.work.jobs import JOB_BYTES, Answered, Shared, cost_of, cost_of_parts, open_writes
from mempool.shard.work.thread import EngineThread
from mempool.shard.work.trying import probe
from mempool.types import (
    AttachTable,
    CommitReply,
    CommitRequest,
    DiscardReply,
    DiscardRequest,
    ExportLedger,
    ExportPages,
    GatherReply,
    GatherRequest,
    HeartbeatReply,
    HeartbeatRequest,
    LedgerPart,
    MarkTable,
    PageBatch,
    PageHeat,
    PartProgress,
    PinReply,
    PinRequest,
    PrepareReply,
    PrepareRequest,
    PullPages,
    PullReport,
    ReadRowsReply,
    ReadRowsRequest,
    ReleaseMark,
    ResolveReply,
    ResolveRequest,
    ScoreReply,
    ScoreRequest,
    ShardHost,
    ShardInfo,
    ShardStatus,
    StepCountReply,
    StepCountRequest,
    TableView,
    UpdateReply,
    UpdateRequest,
    WritePart,
    WriteRowsReply,
    WriteRowsRequest,
)
from mempool.types.caller import Caller, current_caller
from mempool.types.running import THREADS, TRAINER_LEASE_S, Clock, Runner
from mempool.types.usage import UsageReply, UsageRequest

if TYPE_CHECKING:  # the wire's codecs come with them, which an embedded pool that keeps nothing does not need
    from mempool.shard.durable.store import Store
    from mempool.shard.durable.taking import Taking

_TABLES = Caller(name="tables")
"""Who asks for the long work on tables and pages, as far as fairness goes."""


class Engine:
    """One shard.

    Args:
        info: Which shard this is, and which start of it.
        device: Where its pages lie, "cpu" or "cuda...". Requests and replies are on the CPU.
        peers: Reaches another shard, to pull pages from it; the engine never closes it. None: none are ever pulled.
        pool: Name of the pool, for messages.
        memory_bytes: Bytes of pages, of all tables together, at rest; a new table, or pages of a move, that would
            exceed them are refused with InvalidRequest. None: whatever the device has.
        client_memory_bytes: What clients may make the shard hold: updates that are not committed, calls that wait or
            are answered, lookups remembered for their gradients. Each trainer has a fair share. What is too much is
            refused with Overloaded, or RequestTooLarge where it could never fit; lookups are forgotten, oldest first.
        context_budget_bytes: Of these, for lookups remembered; None: half.
        context_lease_s: Seconds after which a lookup is forgotten.
        commit_memory_bytes: Temporary bytes of preparing and committing steps, of all tables together: a step that
            would need more is summed and applied in parts. The sums of one row and the gradient of one pair, some
            hundred bytes and the width of a row in float32, are needed in any case.
        version_memory_bytes: Of ``memory_bytes``, where pages leave it, for versions that are read; None: an eighth.
        held_lease_s: Seconds of silence after which what a rank holds is dropped; one that lives is asked for it again.
        max_message_bytes: What a message may have; larger ones are refused before any work. None: there is no message.
        max_answer_bytes: What values, scores and rows for a client may have, likewise; None: as much as a message.
        on_fatal: Told, on the engine's thread, why the shard cannot go on (a broken CUDA context, say): it has ended.
        on_loaded: Told when kernels that a new table needs are loaded.
        stages: Where its work is timed, with that of the server before it; None: on its own.
        configured: Limits come from a config file; messages name its keys.
        clock: Seconds, monotonic: what leases, and deadlines of callers, are told by.
        runner: Gives it its thread.
        store: What it keeps on a disk; ``recover`` comes before anything else then. None: all is gone with it.
    """

    def __init__(
        self,
        info: ShardInfo,
        *,
        device: str = "cpu",
        peers: Callable[[ShardInfo], ShardHost] | None = None,
        pool: str = "local",
        memory_bytes: int | None = None,
        client_memory_bytes: int = 4096 * MIB,
        context_budget_bytes: int | None = None,
        context_lease_s: float = 600.0,
        commit_memory_bytes: int = 256 * MIB,
        version_memory_bytes: int | None = None,
        held_lease_s: float = TRAINER_LEASE_S,
        max_message_bytes: int | None = None,
        max_answer_bytes: int | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        on_loaded: Callable[[], None] = lambda: None,
        stages: Stages | None = None,
        configured: bool = True,
        clock: Clock = time.monotonic,
        runner: Runner = THREADS,
        store: "Store | None" = None,
    ) -> None:
        self.info = info
        self._store, self._on_loaded = store, on_loaded
        self._clock, self._started_s = clock, clock()
        self._stages = stages or Stages()
        self._budget = Budget(
            client_memory_bytes,
            context_bytes=context_budget_bytes,
            commit_bytes=commit_memory_bytes,
            version_bytes=version_memory_bytes,
            configured=configured,
        )
        contexts = Contexts(room=lambda: self._budget.context_room, lease_s=context_lease_s, clock=clock)
        self._tenancy = Tenancy(
            info,
            device=torch.device(device),
            budget=self._budget,
            contexts=contexts,
            page_bytes=memory_bytes,
            held_lease_s=held_lease_s,
            reply_bytes=max_message_bytes,
            clock=clock,
            runner=runner,
        )
        self._thread = EngineThread(
            name=f"shard {info.shard} of pool {pool!r}",
            stages=self._stages,
            budget=self._budget,
            upkeep=self._keep_up,
            upkeep_s=min(1.0, max(0.05, min(held_lease_s, context_lease_s) / 12)),
            probe=partial(probe, torch.device(device)),
            on_fatal=partial(self._end_for_good, on_fatal),
            clock=clock,
            runner=runner,
        )
        self.meet = Meetings(lease_s=held_lease_s, clock=clock, incarnation=info.incarnation).meet
        self._changes = Changes(self._tenancy)
        self._taking = None if store is None else self._snapshots(store, runner)
        self._answers = Answers(
            self._tenancy,
            contexts=contexts,
            stages=self._stages,
            reply_bytes=max_message_bytes if max_answer_bytes is None else max_answer_bytes,
            message_bytes=max_message_bytes,
            pace=self._thread.pace,
            reserve=self._thread.reserve,
            asked_s=self._thread.asked_s,
            beside=self._thread.beside,
        )
        self._committing = Committing(self._tenancy, stages=self._stages, asked_s=self._thread.asked_s)
        self.at_once = AtOnce(self._thread, self._answers, self._committing, store)
        jobs = partial(self._thread.run, caller=_TABLES)
        self._saving = Saving(
            info=info,
            tenancy=self._tenancy,
            control=self._control,
            jobs=jobs,
            clock=clock,
            busy_s=lambda: self._thread.busy_s,
            runner=runner,
        )
        self._pulling = Pulling(
            info,
            tenancy=self._tenancy,
            changes=self._changes,
            peers=peers,
            control=self._control,
            jobs=jobs,
            settled=self._settled,
        )
        self._restoring = Restoring(self._changes, jobs=jobs, settled=self._settled, runner=runner)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._resolver = Resolver(self._tenancy.decisions, run=self._control, peers=peers, adopt=self._adopt)
        self._tenancy.on_doubt = self._poke

    @property
    def doing(self) -> str:
        """What it is at just now, for messages; "" for nothing."""
        return self._thread.doing

    async def recover(self) -> None:
        """Make the shard again of what its store has, before it serves. Nothing happens without a store.

        Raises:
            DataLoss: Something of that is damaged or missing; it must not serve.
            StorageFailed: Nothing can be written there.
        """
        if self._store is not None:
            await self._control("recover", self._recover, self._store)

    def _snapshots(self, store: "Store", runner: Runner) -> "Taking":
        from mempool.shard.durable.taking import Taking

        return Taking(store, self._tenancy, on_thread=self._on_thread, runner=runner)

    def _recover(self, store: "Store") -> None:
        from mempool.shard.durable.replay import recover

        restored = recover(store, self._tenancy, self._budget, self._stages)
        if self._taking is not None:
            self._taking.restored(restored)
        store.add(Begun(self.info.incarnation))

    # Shard

    async def gather(self, request: GatherRequest) -> GatherReply:
        cost = cost_of(request.ids, request.weights, request.offsets, numbers=len(request.release))
        shared = self._answers.shared_gather(request, self._answered)
        reply: GatherReply = await self._ask("gather", self._answers.gather, request, cost, shared)
        return reply

    async def update(self, request: UpdateRequest) -> UpdateReply:
        answer = partial(self._answers.update, caller=current_caller().name)
        cost = cost_of(request.ids, request.weights, request.offsets, request.grads)
        reply: UpdateReply = await self._ask("update", answer, request, cost)
        return reply

    async def prepare(self, request: PrepareRequest) -> PrepareReply:
        answer, cost = partial(self._committing.prepare, caller=current_caller().name), cost_of_parts(request.parts)
        reply: PrepareReply = await self._ask("prepare", answer, request, cost)
        return reply

    async def commit(self, request: CommitRequest) -> CommitReply:
        reply: CommitReply = await self._ask("commit", self._committing.commit, request, cost_of_parts(request.parts))
        return reply

    async def discard(self, request: DiscardRequest) -> DiscardReply:
        cost = JOB_BYTES * (1 + len(request.parts))
        reply: DiscardReply = await self._ask("discard", self._committing.discard, request, cost)
        return reply

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply:
        """Raises StalePlacement for another incarnation: what the rank held was lost with that one."""
        self._tenancy.check_incarnation(request.incarnation)
        reply: HeartbeatReply = await self._control("heartbeat", self._tenancy.heartbeat, request)
        return reply

    async def score(self, request: ScoreRequest) -> ScoreReply:
        cost = cost_of(request.queries, request.groups, request.group_scores)
        return cast(ScoreReply, await self._ask("score", self._answers.score, request, cost))

    async def read_rows(self, request: ReadRowsRequest) -> ReadRowsReply:
        reply: ReadRowsReply = await self._ask("read_rows", self._answers.read_rows, request, cost_of(request.ids))
        return reply

    async def write_rows(self, request: WriteRowsRequest) -> WriteRowsReply:
        cost = cost_of(request.ids, request.rows, numbers=open_writes(request))
        reply: WriteRowsReply = await self._ask("write_rows", self._answers.write_rows, request, cost)
        return reply

    async def step_count(self, request: StepCountRequest) -> StepCountReply:
        cost = cost_of(numbers=open_writes(request))
        reply: StepCountReply = await self._ask("step_count", self._answers.step_count, request, cost)
        return reply

    async def usage(self, request: UsageRequest) -> UsageReply:
        reply: UsageReply = await self._ask("usage", self._answers.usage, request, cost_of())
        return reply

    async def pin(self, request: PinRequest) -> PinReply:
        reply: PinReply = await self._ask("pin", self._answers.pin, request, cost_of())
        return reply

    # PageHost

    async def attach_table(self, request: AttachTable) -> None:
        """Make a table known; large ones are filled piece by piece, so that other tables answer meanwhile.

        Kernels that it needs are made ready first, off the engine's thread: no call on the table waits for a compiler.

        Raises:
            InvalidRequest: The table is here already, with pages, at another epoch; or its pages do not fit.
            NotFound: It is to be confirmed, and is not here; or the checkpoint is not.
            DataLoss: What is to be restored is damaged.
        """
        if request.mode == "restore":
            check_source(request.source)
        fill = partial(self._thread.run, "fill", caller=_TABLES)
        while request.mode == "forked" and not await fill(self._changes.prepare_fork, request):
            pass  # what has come since it was attached
        table = await self._control("attach_table", self._changes.attach, request)
        if request.mode in ("confirm", "forked"):
            return
        await self._tenancy.prepare(table)
        self._on_loaded()
        if request.mode == "restore":
            await self._restoring.restore(table, request)
            return
        while not await fill(self._changes.fill, table):
            pass

    async def drop_table(self, table_id: int, *, unmade: bool = False) -> None:
        await self._control("drop_table", partial(self._changes.end, unmade=unmade), table_id)

    async def freeze(self, table_id: int, timeout_s: float, *, token: str, lease_s: float, renew: bool = False) -> int:
        bounds.check_freeze(timeout_s, token=token, lease_s=lease_s)
        try:
            async with asyncio.timeout(timeout_s):
                return int(await self._control("freeze", self._tenancy.freeze, (table_id, token, lease_s, renew)))
        except TimeoutError as error:
            if isinstance(error, MempoolError):
                raise
            give_up = partial(self._tenancy.give_up_freeze, timeout_s=timeout_s)
            return int(await self._control("freeze", give_up, (table_id, token)))

    async def thaw(self, table_id: int, *, token: str = "") -> None:
        bounds.check_token(token)
        await self._control("thaw", self._tenancy.thaw, (table_id, token))

    async def resolve(self, request: ResolveRequest) -> ResolveReply:
        if request.step_id is not None:
            bounds.check_step(request.step_id, ())
        reply: ResolveReply = await self._control("resolve", self._tenancy.decisions.answer, request)
        if request.after_version is not None:
            self._resolver.poke()  # a gate in doubt asks in its turn
        return reply

    async def export_pages(self, request: ExportPages) -> PageBatch:
        batch: PageBatch = await self._thread.run("export_pages", self._tenancy.export, request)
        return batch

    async def export_ledger(self, request: ExportLedger) -> LedgerPart:
        part: LedgerPart = await self._control("export_ledger", self._tenancy.export_ledger, request)
        return part

    async def pull_pages(self, request: PullPages) -> PullReport:
        """Read pages from their owner in batches and stage each between other requests.

        Raises:
            InvalidRequest: The pages do not exist, are here already, or do not fit.
            Internal: There is no way to reach another shard, or what came is not what the schema says.
            MempoolError: What the owner raised.
        """
        return await self._pulling.pull(request)

    async def set_view(self, view: TableView, *, token: str = "") -> None:
        bounds.check_token(token)
        await self._control("set_view", partial(self._set_view, token=token), view)

    async def mark_table(self, request: MarkTable) -> None:
        await self._saving.mark(request)

    async def write_part(self, request: WritePart) -> PartProgress:
        return await self._saving.write(request)

    async def release_mark(self, request: ReleaseMark) -> None:
        await self._saving.release(request)

    async def read_heat(self, table_id: int) -> PageHeat:
        return self._tenancy.table(table_id).storage.page_heat()

    async def views(self) -> tuple[TableView, ...]:
        self._thread.check_open()
        views = self._tenancy.views()
        await self._settled()
        return views

    async def status(self) -> ShardStatus:
        self._thread.check_open()
        return self._tenancy.status(
            stages=self._stages,
            uptime_s=self._clock() - self._started_s,
            queued_calls=self._thread.num_jobs,
            copied_bytes=self._saving.num_bytes,
            **({} if self._store is None else self._store.said),
        )

    async def close(self) -> None:
        """Answer what is waiting, then end the thread and free all memory. Repeatable."""
        await self._resolver.close()
        await self._saving.close()
        await self._restoring.close()
        if self._taking is not None:
            await self._taking.close()
        with suppress(ShardUnavailable):  # closed before
            await self._thread.run("close", lambda _: self._tenancy.drop_all())
        await self._thread.close()
        if self._store is not None:
            await self._store.close()

    def _keep_up(self) -> bool:
        busy = self._saving.expire() | self._tenancy.expire()
        if self._store is None:
            return busy
        self._store.try_again()
        return busy or self._store.fails

    def _end_for_good(self, on_fatal: Callable[[BaseException], None] | None, error: BaseException) -> None:
        if on_fatal is not None:
            on_fatal(error)
        with suppress(Exception):  # the device may refuse anything by now
            self._tenancy.drop_all()  # so that those who wait for a table find out

    # From a call to a job

    def _poke(self) -> None:
        """On the engine's thread: there is something to ask of other shards."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._resolver.poke)

    def _woken(self, result: object) -> Awaitable[None] | None:
        """What to wait for until the job is to be run again, from its start: everything may have changed meanwhile."""
        if not isinstance(result, Parked):
            return None
        if result.in_doubt:
            self._resolver.poke()
        return result.wait()

    async def _ask(
        self, stage: str, answer: Callable[[Any], Any], request: object, cost: int, shared: Shared | None = None
    ) -> Any:
        self._loop = asyncio.get_running_loop()
        try:
            reply = await self._thread.run(
                stage, partial(self._answered, answer), request, cost=cost, again=self._woken, shared=shared
            )
            await self._settled()
            return reply
        except StepConflict:  # the step is over here: nobody is told so before that is durable
            await self._settled()
            raise
        except Overloaded as error:
            error.shard, error.address = self.info.shard, self.info.address
            raise

    def _answered(self, answer: Callable[[Any], Any], request: object) -> Any:
        return answered(answer, request, asked_s=self._thread.asked_s)

    def _set_view(self, view: TableView, *, token: str) -> Answered:
        """Adopt a view: whoever waits for that does not wait for memory to be given back, too."""
        self._changes.set_view(view, token=token)
        return Answered(None, self._tenancy.table(view.schema.table_id).shrink)

    def _adopt(self, view: TableView) -> None:
        self._changes.set_view(view)
        self._tenancy.table(view.schema.table_id).shrink()

    async def _control(self, stage: str, do: Callable[[Any], Any], request: object) -> Any:
        """For what the controller asks: goes before what clients do."""
        self._loop = asyncio.get_running_loop()
        reply = await self._thread.run(stage, do, request, control=True, again=self._woken)
        await self._settled()
        return reply

    async def _settled(self) -> None:
        """All that an answer may tell of is durable: what a power cut takes back nobody was told."""
        if self._store is not None and self._taking is not None:
            await self._store.settled()
            self._taking.poke()

    async def _on_thread(self, stage: str, do: Callable[[Any], Any]) -> Any:
        return await self._thread.run(stage, do, control=True, caller=_TABLES)
