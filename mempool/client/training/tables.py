"""Preparing, committing and discarding on several tables, one message a shard for all of those of one pool.

What runs on the IO loop is ``coordinator``'s; this waits for it, and says to the user what it has to be told.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mempool.client.training.commitment import Commitment, Prepared
from mempool.client.training.coordinator import Coordinator
from mempool.client.training.link import TableLink


@dataclass(frozen=True, slots=True)
class TableCommit:
    """What one table's pending updates are committed with."""

    link: TableLink
    lr: float
    grad_scale: float = 1.0


def prepare_tables(
    links: Sequence[TableLink], *, want_norm: bool = True, norm_order: float = 0.0
) -> list[Prepared | None]:
    """Make everything pending on these tables ready to commit; None for those where nothing is."""
    prepared: dict[TableLink, Prepared | None] = {}
    for coordinator, mine in _by_pool(links):
        answers = mine[0].run(
            coordinator.prepare([link.session for link in mine], want_norm=want_norm, norm_order=norm_order)
        )
        _tell(coordinator)
        prepared.update(zip(mine, answers, strict=True))
    return [prepared[link] for link in links]


def commit_tables(commits: Sequence[TableCommit]) -> list[int]:
    """Apply everything pending on these tables, as one step of all of those of one pool; pools one after another.

    Returns:
        How many updates were committed, by table.
    """
    counts: dict[TableLink, int] = {}
    by_link = {
        commit.link: Commitment(commit.link.session, lr=commit.lr, grad_scale=commit.grad_scale) for commit in commits
    }
    for commitment in by_link.values():
        commitment.check()
    for coordinator, mine in _by_pool(by_link):
        answers = mine[0].run(coordinator.commit([by_link[link] for link in mine]))
        _tell(coordinator)
        counts.update(zip(mine, answers, strict=True))
    return [counts[commit.link] for commit in commits]


def discard_tables(links: Sequence[TableLink]) -> list[int]:
    """Drop what is pending on these tables; nothing is sent, and nobody waited for, where nothing is."""
    counts = dict.fromkeys(links, 0)
    for coordinator, mine in _by_pool([link for link in links if not link.session.nothing_to_drop]):
        answers = mine[0].run(coordinator.discard([link.session for link in mine]))
        counts.update(zip(mine, answers, strict=True))
    return [counts[link] for link in links]


def _by_pool(links: Iterable[TableLink]) -> list[tuple[Coordinator, list[TableLink]]]:
    pools: dict[int, tuple[Coordinator, list[TableLink]]] = {}
    for link in links:
        coordinator = link.session.coordinator
        pools.setdefault(id(coordinator), (coordinator, []))[1].append(link)
    return list(pools.values())


def _tell(coordinator: Coordinator) -> None:
    for notice in coordinator.notices():
        warnings.warn(notice, stacklevel=4)
