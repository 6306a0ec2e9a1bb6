"""The choice of a shard's node: where its folder is, else where the pool has fewest shards. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mempool.errors import ShardUnavailable
from mempool.rayhost.state.kept import KeptFolder

_LEAST = 1e-6  # Ray counts in ten-thousandths


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node of Ray.

    Attributes:
        node_id: Ray's.
        host: Its address, for people.
        has: What it has in all, by Ray's names of resources.
        free: What of it nobody has taken.
        shards: How many shards of this pool are there.
        folders: The folders of the pool's shards that it sees, by shard.
        silent: It did not say what it sees.
    """

    node_id: str
    host: str = ""
    has: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)
    shards: int = 0
    folders: Mapping[int, KeptFolder] = field(default_factory=dict)
    silent: bool = False


def choose(shard: int, nodes: Sequence[Node], asked: Mapping[str, float], *, fresh: bool = False) -> str | None:
    """The node that a shard is bound to.

    Args:
        shard: Its number.
        nodes: Those that live.
        asked: What the shard asks Ray for.
        fresh: It begins with nothing, whatever lies in a folder of its number.

    Returns:
        A node's id; None: any may do, as all that could run it share the path; or "": none that lives could run it.

    Raises:
        ShardUnavailable: Its folder is on nodes alone that could not run it; or it may be on one that does not say, as
            others have theirs.
    """
    able = [node for node in nodes if _covers(node.has, asked)]
    if are_shared(able):
        return None
    sees = [] if fresh else _newest(shard, nodes)
    if sees and not any(node in able for node in sees):
        where = ", ".join(node.host or node.node_id for node in sees)
        raise ShardUnavailable(
            f"shard {shard} has its folder on {where}, which cannot run it: it has less {_lacking(sees[0].has, asked)} "
            "than a shard asks Ray for. Nothing was lost. Give that node more, lower what shards ask for in the "
            "config, or move the folder to a node that has it",
            shard=shard,
        )
    silent = [node.host or node.node_id for node in able if node.silent]
    if silent and not sees and not fresh and any(node.folders for node in nodes):
        raise ShardUnavailable(
            f"no node of Ray is known to have the folder of shard {shard}, and {', '.join(silent)} did not say in time "
            "what it has. Nothing was lost. Try again, or end Ray on that node to go on without it",
            shard=shard,
        )
    among = [node for node in able if not sees or node in sees]
    roomy = [node for node in among if _covers(node.free, asked)]
    chosen = min(roomy or among, key=lambda node: (node.shards, node.node_id), default=None)
    return "" if chosen is None else chosen.node_id


def are_shared(nodes: Sequence[Node]) -> bool:
    """Whether several nodes have one path: there is a folder that all of them see."""
    marks = [{folder.mark for folder in node.folders.values()} for node in nodes]
    return len(marks) > 1 and bool(set.intersection(*marks))


def _newest(shard: int, nodes: Iterable[Node]) -> list[Node]:
    """The nodes that see the folder of a shard; where there are several folders, the one that was changed last."""
    see = [node for node in nodes if shard in node.folders]
    if not see:
        return []
    last = max((node.folders[shard] for node in see), key=lambda folder: (folder.changed_ns, folder.mark))
    return [node for node in see if node.folders[shard].mark == last.mark]


def _covers(amounts: Mapping[str, float], asked: Mapping[str, float]) -> bool:
    return all(amounts.get(name, 0.0) + _LEAST >= amount for name, amount in asked.items())


def _lacking(has: Mapping[str, float], asked: Mapping[str, float]) -> str:
    return ", ".join(name for name, amount in asked.items() if has.get(name, 0.0) + _LEAST < amount)
