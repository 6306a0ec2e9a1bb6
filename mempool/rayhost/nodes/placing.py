"""Which node each shard of a pool is bound to, and where those are that run.

What nodes have is ``looking``'s to say.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace

from mempool.config import ClusterConfig
from mempool.rayhost.nodes.choice import Node, choose
from mempool.rayhost.nodes.looking import look
from mempool.rayhost.resources import asked
from mempool.rayhost.state.kept import Wanted


@dataclass(slots=True)
class _Look:
    """What nodes had at one look, and how many shards were given to each since."""

    nodes: tuple[Node, ...]
    given: Counter[str] = field(default_factory=Counter)


class Placing:
    """The nodes of one pool's shards.

    Attributes:
        wanted: How many shards the pool is meant to have, as folders say that were seen at the last look; None: none
            says it.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._asked = asked(config.shard)
        self._at: dict[int, str] = {}
        self._looking: asyncio.Task[_Look] | None = None
        self.wanted: Wanted | None = None

    async def place(self, shard: int, *, fresh: bool = False) -> str | None:
        """The node that a shard which is to be started is bound to; None: any may do; "": none could run it yet.

        fresh: Whatever lies in a folder of its number.

        Raises:
            ShardUnavailable: Its folder is on a node that cannot run it.
        """
        if self._config.shard.storage is None:
            return None
        seen = await self._look()
        chosen = choose(shard, [self._now(node, seen) for node in seen.nodes], self._asked, fresh=fresh)
        if chosen:
            seen.given[chosen] += 1
            self.found(shard, chosen)
        return chosen

    def found(self, shard: int, node: str) -> None:
        """A shard runs on this node of Ray's."""
        self._at[shard] = node

    def forget(self, shard: int) -> None:
        """A shard was stopped."""
        self._at.pop(shard, None)

    async def _look(self) -> _Look:
        """One look for all shards that are started together."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._looked())
        return await asyncio.shield(self._looking)

    async def _looked(self) -> _Look:
        storage = self._config.shard.storage
        assert storage is not None, "else there is nothing to look for"
        nodes = await look(storage.path, self._config.pool.name)
        kept = [folder.wanted for node in nodes for folder in node.folders.values() if folder.wanted is not None]
        self.wanted = max(kept, default=None)
        return _Look(nodes)

    def _now(self, node: Node, seen: _Look) -> Node:
        """A node with the shards that it has got since the look, of which Ray may not have heard yet."""
        given = seen.given[node.node_id]
        free = {name: amount - given * self._asked.get(name, 0.0) for name, amount in node.free.items()}
        return replace(node, free=free, shards=list(self._at.values()).count(node.node_id))
