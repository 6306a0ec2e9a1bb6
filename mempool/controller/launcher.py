"""What the controller asks of whoever starts shards: engines of this process, or Ray actors."""

from typing import Protocol

from mempool.types import ShardInfo


class Launcher(Protocol):
    """Starts and stops shards."""

    async def require_room(self, shards: int) -> None:
        """Raises ShardUnavailable, with numbers, where so many more shards could not be started, as far as is known."""

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:
        """Start a shard and answer once it is ready. fresh: with nothing, whatever one of that number has kept.

        Raises ShardUnavailable with the reason and what to do.
        """

    async def starting(self) -> str:
        """What starts that are under way wait for, for people; "" if there are none."""

    async def keep_wanted(self, shards: int) -> None:
        """Keep, with the pool, how many shards it is meant to have, for a controller that is started anew to find.

        Raises ShardUnavailable where nobody could keep it.
        """

    async def stop(self, info: ShardInfo) -> None:
        """Stop a shard that owns nothing any more."""
