"""Calls of shards, bounded: of one, of all side by side, and their status. Decides nothing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from mempool.errors import MempoolError, ShardUnavailable
from mempool.types import ShardHost, ShardInfo, ShardStatus

_LOG = logging.getLogger("mempool.controller")
_STATUS_TIMEOUT_S = 2.0
_CALL_TIMEOUT_S = 60.0

T = TypeVar("T")


class ShardCalls:
    """Calls the shards of one pool.

    Args:
        pool: The pool's name, for messages.
        dial: The ``ShardHost`` of a shard, at once; asked for every call, so it keeps its connections itself.
    """

    def __init__(self, pool: str, dial: Callable[[ShardInfo], ShardHost]) -> None:
        self._pool = pool
        self._dial = dial

    async def call(
        self, info: ShardInfo, call: Callable[[ShardHost], Awaitable[T]], *, timeout_s: float = _CALL_TIMEOUT_S
    ) -> T:
        """One bounded call of one shard. Raises ShardUnavailable where its time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call(self._dial(info))
        except TimeoutError as error:
            if isinstance(error, MempoolError):
                raise
            raise ShardUnavailable(
                f"shard {info.shard} of pool {self._pool!r} did not answer within {timeout_s:g} s; "
                "see which shards are up: mempool status",
                shard=info.shard,
                address=info.address,
            ) from None

    async def everywhere(
        self,
        infos: Sequence[ShardInfo],
        call: Callable[[ShardHost], Awaitable[None]],
        *,
        tolerant: bool = False,
        timeout_s: float = _CALL_TIMEOUT_S,
    ) -> None:
        """The same call of every shard, side by side; raises the first error once all have answered.

        tolerant: Errors are logged alone.
        """
        results = await asyncio.gather(
            *(self.call(info, call, timeout_s=timeout_s) for info in infos), return_exceptions=True
        )
        for info, result in zip(infos, results, strict=True):
            if isinstance(result, BaseException):
                if not tolerant:
                    raise result
                _LOG.warning("shard %d: %s", info.shard, result)

    async def statuses(self, infos: Sequence[ShardInfo]) -> tuple[ShardStatus, ...]:
        """Of every shard; "unreachable" where one does not answer soon."""
        return tuple(await asyncio.gather(*(self._status(info) for info in infos)))

    async def _status(self, info: ShardInfo) -> ShardStatus:
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                return await self._dial(info).status()
        except (MempoolError, TimeoutError):
            return ShardStatus(info=info, state="unreachable")
