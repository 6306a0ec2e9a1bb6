"""A pool on a disk whose tables are forked while they are trained, and killed: as a program it says what was
acknowledged, and waits to be killed.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import mempool
from mempool.shard.durable.store import Store
from tests.support.durable_trainer import open_tables, train

NAMES = ("momentum", "dense")
FORKED_AT, LAST = 5, 10
FORKS = [f"{name}-trial" for name in NAMES]
JOURNAL_LIMIT_BYTES = 2**15
"""So small that snapshots are taken before the forks are made, and after."""


def keep_journals_small() -> None:
    """In this process."""
    Store.__init__.__kwdefaults__["journal_limit"] = JOURNAL_LIMIT_BYTES


def play(pool: mempool.Pool, said: Callable[[str], None] = lambda _: None, *, last: int = LAST) -> None:
    """Train tables, fork them after step ``FORKED_AT``, then train the forks beside the tables, the tables to step 2
    less than ``last``; a fork of one fork is left as it is."""
    tables = open_tables(pool, NAMES)
    for step in range(1, FORKED_AT + 1):
        train(tables, step)
    said("trained")
    forks = [table.fork(name) for table, name in zip(tables, FORKS, strict=True)]
    said("forked")
    for step in range(FORKED_AT + 1, last + 1):
        train(forks, step)
        if step == FORKED_AT + 2:
            forks[1].fork("left")
        if step <= last - 2:
            train(tables, step)
    said("done")


if __name__ == "__main__":
    keep_journals_small()
    play(mempool.local(Path(sys.argv[1]), shards=2), lambda word: print(word, flush=True))
    sys.stdin.read()  # until it is killed
