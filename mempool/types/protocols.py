"""The seams between hops: ``Shard`` (data), ``PageHost`` (tables and moves), ``PoolApi`` (the controller).

The engine, the gRPC proxy and test fakes implement them; one contract suite runs against all. Methods raise
``mempool.errors`` only. A caller bounds its wait with ``asyncio.timeout``; a cancelled call may still take effect.
"""

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from mempool.types.groups.meeting import MeetReply, MeetRequest
from mempool.types.messages import (
    CommitReply,
    CommitRequest,
    DiscardReply,
    DiscardRequest,
    GatherReply,
    GatherRequest,
    HeartbeatReply,
    HeartbeatRequest,
    PrepareReply,
    PrepareRequest,
    ReadRowsReply,
    ReadRowsRequest,
    ScoreReply,
    ScoreRequest,
    StepCountReply,
    StepCountRequest,
    UpdateReply,
    UpdateRequest,
    WriteRowsReply,
    WriteRowsRequest,
)
from mempool.types.pages import (
    AttachTable,
    ExportLedger,
    ExportPages,
    LedgerPart,
    MarkTable,
    PageBatch,
    PageHeat,
    PartProgress,
    PullPages,
    PullReport,
    ReleaseMark,
    ResolveReply,
    ResolveRequest,
    WritePart,
)
from mempool.types.pool import (
    CheckpointProgress,
    ForkTable,
    PoolStatus,
    RescaleProgress,
    RestoreTables,
    ShardStatus,
    TableView,
    TakeCheckpoint,
)
from mempool.types.reading.pins import PinReply, PinRequest
from mempool.types.schema import TableSchema
from mempool.types.usage import UsageReply, UsageRequest


class Shard(Protocol):
    """What the data path asks of one shard."""

    async def gather(self, request: GatherRequest) -> GatherReply: ...

    async def update(self, request: UpdateRequest) -> UpdateReply: ...

    async def prepare(self, request: PrepareRequest) -> PrepareReply: ...

    async def commit(self, request: CommitRequest) -> CommitReply: ...

    async def discard(self, request: DiscardRequest) -> DiscardReply: ...

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply: ...

    async def score(self, request: ScoreRequest) -> ScoreReply: ...

    async def read_rows(self, request: ReadRowsRequest) -> ReadRowsReply: ...

    async def write_rows(self, request: WriteRowsRequest) -> WriteRowsReply: ...

    async def step_count(self, request: StepCountRequest) -> StepCountReply: ...

    async def usage(self, request: UsageRequest) -> UsageReply: ...

    async def meet(self, request: MeetRequest) -> MeetReply:
        """A rank of a group whose home this shard is. Waits for the others for some seconds at most."""

    async def pin(self, request: PinRequest) -> PinReply: ...


class PageHost(Protocol):
    """What the controller, and a peer that pulls pages, ask of one shard."""

    async def attach_table(self, request: AttachTable) -> None: ...

    async def drop_table(self, table_id: int, *, unmade: bool = False) -> None:
        """Forget a table and free its pages; unknown ids are no error.

        Raises:
            StalePlacement: It is to be dropped only where it is ``unmade``, and it was confirmed.
        """

    async def freeze(self, table_id: int, timeout_s: float, *, token: str, lease_s: float, renew: bool = False) -> int:
        """Hold off new Prepares and writes until set_view or thaw; wait for prepared steps to be decided.

        Lookups and updates go on. Answers the table's version, at which it stands still. ``token`` names the round: a
        repeat with the same one renews the lease, after which the freeze, and its round, are over by themselves.

        Args:
            renew: Only where it holds still: a shard that was started anew has let others write since.

        Raises:
            DeadlineExceeded: A prepared step was not decided in ``timeout_s``; the table is thawed again.
            StalePlacement: Another round's freeze holds; or none of this one does, and it is to be renewed.
        """

    async def thaw(self, table_id: int, *, token: str = "") -> None:
        """Undo a freeze, of this round or of whichever there is ("" ), and drop what was staged; no error where there
        is nothing to undo."""

    async def resolve(self, request: ResolveRequest) -> ResolveReply:
        """What became of steps, for a shard that is in doubt. Never waits for other calls."""

    async def export_pages(self, request: ExportPages) -> PageBatch: ...

    async def export_ledger(self, request: ExportLedger) -> LedgerPart: ...

    async def pull_pages(self, request: PullPages) -> PullReport: ...

    async def set_view(self, view: TableView, *, token: str = "") -> None:
        """Adopt a view; ``token`` names the round that it ends, "" for none.

        With a higher epoch: staged pages come alive, pages not owned any more are freed, held updates are dropped
        (Prepare tells their clients, who send them again), the freeze ends. With the same epoch: addresses are taken
        over. A lower epoch is ignored.

        Raises:
            Internal: The view gives this shard pages it neither has nor has staged; nothing was changed.
            StalePlacement: The round is over; nothing was changed.
        """

    async def mark_table(self, request: MarkTable) -> None:
        """Keep a frozen table's pages as they are now, for a checkpoint; training goes on when it is thawed.

        Raises:
            StalePlacement: That round does not hold the table, or it stands at another version.
        """

    async def write_part(self, request: WritePart) -> PartProgress:
        """Write what was marked, beside all other work; answers how far it is, and at the end what was written.

        Raises:
            NotFound: There is no such mark, or it is over.
            StorageFailed: The place does not take it. The mark is of no use then.
        """

    async def release_mark(self, request: ReleaseMark) -> None:
        """Forget a mark and what was kept for it."""

    async def read_heat(self, table_id: int) -> PageHeat:
        """How much the table's pages were read and written here lately. Waits for no other call. Raises NotFound."""

    async def views(self) -> tuple[TableView, ...]:
        """The newest view of every table that is made: what bootstrapping clients and a new controller ask for."""

    async def status(self) -> ShardStatus: ...


class ShardHost(Shard, PageHost, Protocol):
    """A whole shard."""

    async def close(self) -> None:
        """Give back what this object holds (threads and memory, or a connection)."""


class AtOnceShard(Protocol):
    """What the data path asks of a shard on the caller's own thread: no event loop has to do with it."""

    def begin_gather(
        self, request: GatherRequest, *, timeout_s: float, narrow_ids: bool, alone: bool
    ) -> Callable[[], GatherReply | None] | None:
        """Ask; what is answered is called once, to wait for the reply.

        narrow_ids: They fit uint32, where there are any. alone: No other shard is asked meanwhile.

        None, of either: it cannot be had at once, for whatever reason, and nothing of it is known. Whoever asks takes
        ``Shard.gather`` then, which is the same call, and says what is wrong.
        """

    def begin_update(
        self, request: UpdateRequest, *, timeout_s: float, narrow_ids: bool, alone: bool
    ) -> Callable[[], UpdateReply | None] | None:
        """As ``begin_gather``, of an update with want_weight_grad."""


class PoolApi(Protocol):
    """The controller, seen from a client."""

    async def create_table(self, schema: TableSchema) -> TableView:
        """Make a table; ``schema.table_id`` is ignored and given by the pool. Raises AlreadyExists."""

    async def drop_table(self, name: str, *, table_id: int = 0) -> None:
        """Drop a table, also one that is being made. Raises NotFound; also where ``table_id`` is given and another
        table has that name by now."""

    async def table(self, name: str) -> TableView: ...

    async def tables(self) -> tuple[TableView, ...]: ...

    def rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        """Change the number of shards, live. One at a time: a second is answered InvalidRequest."""

    def rebalance(self, *, dry_run: bool = False) -> AsyncIterator[RescaleProgress]:
        """Even the load of the shards that there are, live; ``dry_run``: only say what would move. As ``rescale``."""

    def checkpoint(self, request: TakeCheckpoint) -> AsyncIterator[CheckpointProgress]:
        """Take a checkpoint while clients go on. One at a time: a second is answered InvalidRequest."""

    async def restore(self, request: RestoreTables) -> tuple[TableView, ...]:
        """Make tables of a checkpoint's. Raises AlreadyExists, and as reading a checkpoint does."""

    async def fork(self, request: ForkTable) -> TableView:
        """Make a table that is another one as it is now. Raises AlreadyExists, NotFound."""

    async def status(self) -> PoolStatus: ...

    async def close(self) -> None: ...
