"""Looks at every living node of Ray: what it has and has free, and which folders of a pool's shards its disk has."""

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mempool.rayhost.actors import node_id, process_environment
from mempool.rayhost.nodes.choice import Node
from mempool.rayhost.state.kept import KeptFolder, kept_folders

_LOG = logging.getLogger("mempool.rayhost")
_LOOK_TIMEOUT_S = 60.0
"""Ray may have to start a process on that node; a disk of the network may not answer."""

Folders = dict[int, KeptFolder]


async def look(path: str, pool: str) -> tuple[Node, ...]:
    """The living nodes. One that does not say in time what its disk has is ``silent``."""
    free = await asyncio.to_thread(_free_by_node)
    living = {entry["NodeID"]: entry for entry in await asyncio.to_thread(ray.nodes) if entry["Alive"]}
    here = node_id()
    folders = await asyncio.gather(*(_folders(node, path, pool, here=node == here) for node in living))
    return tuple(
        Node(
            node_id=node,
            host=entry["NodeManagerAddress"],
            has=entry["Resources"],
            free=free.get(node, {}),
            folders=found or {},
            silent=found is None,
        )
        for (node, entry), found in zip(living.items(), folders, strict=True)
    )


async def _folders(node: str, path: str, pool: str, *, here: bool) -> Folders | None:
    reference: Any = None
    try:
        async with asyncio.timeout(_LOOK_TIMEOUT_S):
            if here:
                return await asyncio.to_thread(kept_folders, path, pool)
            reference = await asyncio.to_thread(_ask, node, path, pool)
            found: Folders = await asyncio.wrap_future(reference.future())
            return found
    except (TimeoutError, RayError) as error:
        _LOG.warning("node %s does not say what it has of pool %r (%s)", node, pool, type(error).__name__)
        if reference is not None:
            await asyncio.to_thread(ray.cancel, reference, force=True)
        return None


def _ask(node: str, path: str, pool: str) -> Any:
    """A task on that node, which waits for nothing that others have taken. A reference to what it finds."""
    remote: Any = ray.remote
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0}
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    if environment := process_environment():
        options["runtime_env"] = {"env_vars": environment}
    return remote(**options)(kept_folders).remote(path, pool)


def _free_by_node() -> dict[str, dict[str, float]]:
    # Ray has no public name for it; what it calls `available_resources` is the sum of this.
    from ray._private.state import available_resources_per_node

    by_node: Any = available_resources_per_node
    return {node: dict(amounts) for node, amounts in by_node().items()}
