"""Pages that a shard pulls from their owners for a move: staged between other requests, durable before it says so."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from mempool.errors import Internal
from mempool.shard.durable.changes import Changes
from mempool.shard.pages.transfer import pull
from mempool.shard.tenancy import Tenancy
from mempool.shard.work.jobs import JOB_BYTES
from mempool.types import Ledger, PageBatch, PullPages, PullReport, ShardHost, ShardInfo


class Jobs(Protocol):
    """Runs a job on the engine's thread, in line with what clients ask; cost: bytes that it holds meanwhile."""

    def __call__(
        self, stage: str, do: Callable[[Any], Any], request: Any, /, *, cost: int = JOB_BYTES
    ) -> Awaitable[Any]: ...


class Pulling:
    """The pulls of a shard.

    Args:
        info: Which shard it is.
        tenancy, changes: Its tables, and what changes them.
        peers: Reaches another shard; None where pages are never pulled.
        control: Runs a job before what clients ask.
        jobs: Runs one in line with that.
        settled: Waits until what was taken in is durable.
    """

    def __init__(
        self,
        info: ShardInfo,
        *,
        tenancy: Tenancy,
        changes: Changes,
        peers: Callable[[ShardInfo], ShardHost] | None,
        control: Callable[[str, Callable[[Any], Any], Any], Awaitable[Any]],
        jobs: Jobs,
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._info = info
        self._tenancy = tenancy
        self._changes = changes
        self._peers = peers
        self._control = control
        self._jobs = jobs
        self._settled = settled

    async def pull(self, request: PullPages) -> PullReport:
        """As ``PageHost.pull_pages``."""
        if self._peers is None:
            raise Internal(
                f"shard {self._info.shard} was made without peers, to pull pages from", shard=self._info.shard
            )
        table = await self._control("pull_pages", self._tenancy.begin_pull, request)

        async def stage(batch: PageBatch) -> int:
            do = partial(self._changes.stage, table, token=request.token)
            num_bytes: int = await self._jobs("stage", do, batch, cost=JOB_BYTES + batch.num_bytes)
            await self._settled()  # so that no more than a batch waits for the disk
            return num_bytes

        async def lacks_ledger() -> bool:
            lacks: bool = await self._control("stage", self._tenancy.lacks_ledger, table)
            return lacks

        async def stage_ledger(ledger: Ledger) -> None:
            await self._control("stage", partial(self._changes.stage_ledger, table, request), ledger)

        return await pull(
            request,
            source=self._peers(request.source),
            page_bytes=table.storage.page_bytes(request.blocks),
            stage=stage,
            lacks_ledger=lacks_ledger,
            stage_ledger=stage_ledger,
        )
