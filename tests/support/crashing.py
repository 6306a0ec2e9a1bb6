"""A script of everything that a shard of an embedded pool keeps: as a process that crashes, recovered, and in memory.

Behind each part of it something is told to whoever waits, and the pool is known, bit for bit.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

import mempool
from mempool.checkpoint import looking
from mempool.checkpoint.stores import open_store
from mempool.errors import NotFound
from tests.support.durable_trainer import CONFIGS, contents, open_tables, train
from tests.support.memory_lives import NAMES

T = TypeVar("T")
Persist = Callable[[Callable[[], object]], object]
"""Makes a call, again where the disk refuses it."""

STEPS = 6
"""Of which the first half in a first life, the others in a second."""


class Script:
    """Two lives of a pool: tables, steps with writes between them, a checkpoint, a table dropped and made anew.

    Args:
        open_pool: Opens it, or opens it again.
        place: Of its checkpoints.
        persist: Makes every call.
        done: Told behind each part, with the pool.
    """

    def __init__(
        self,
        open_pool: Callable[[], mempool.Pool],
        *,
        place: Path,
        persist: Persist,
        done: Callable[[mempool.Pool], None],
    ) -> None:
        self._open_pool, self._place, self._persist, self._done = open_pool, place, persist, done

    def run(self) -> None:
        with self._opened() as pool:
            for config in CONFIGS:
                if config.name in NAMES:
                    self._persist(lambda config=config: pool.create_table(config, exist_ok=True))
                    self._done(pool)
            self._train(pool, range(1, STEPS // 2 + 1))
            self._persist(lambda: pool.checkpoint(self._place, keep=1))
            self._done(pool)
        with self._opened() as pool:
            self._train(pool, range(STEPS // 2 + 1, STEPS))
            self._persist(lambda: _drop(pool))
            self._done(pool)
            self._persist(lambda: open_tables(pool, NAMES))
            self._done(pool)
            self._train(pool, range(STEPS, STEPS + 1))
            self._persist(lambda: pool.checkpoint(self._place, keep=1))
            self._done(pool)

    @contextmanager
    def _opened(self) -> Iterator[mempool.Pool]:
        pool: mempool.Pool = self._persist(self._open_pool)  # type: ignore[assignment]
        try:
            yield pool
        finally:
            self._persist(pool.close)

    def _train(self, pool: mempool.Pool, steps: range) -> None:
        tables: list[mempool.Table] = self._persist(lambda: open_tables(pool, NAMES))  # type: ignore[assignment]
        self._persist(lambda: contents(tables))  # as behind every step
        for step in steps:
            train(tables, step, on_written=lambda: self._done(pool), persist=self._persist)
            self._done(pool)


def _drop(pool: mempool.Pool) -> None:
    try:
        pool.drop_table(NAMES[0])
    except NotFound:  # it was, when the disk refused to keep that
        return


def digest(pool: mempool.Pool) -> str:
    """Of all bits of all tables, their step counts and versions."""
    found = hashlib.sha256()
    tables = sorted(pool.tables(), key=lambda table: table.name)
    for name, rows in contents(tables).items():
        found.update(f"{name} {rows.dtype} {tuple(rows.shape)}".encode())
        found.update(rows.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    for shard in pool.status().shards:
        for table in sorted(shard.tables, key=lambda table: table.name):
            found.update(f"{table.name} {table.version}".encode())
    return found.hexdigest()


def state(pool: mempool.Pool, place: Path) -> str:
    """All that is to be there again: a pool's digest, and which checkpoint is the newest. Raises AssertionError where
    that is damaged."""
    store = open_store(place)
    if not looking.checkpoints(store):
        return f"{digest(pool)} none"
    damages = looking.verify(store).damages
    assert not damages, f"the newest checkpoint is damaged: {damages}"
    taken = looking.inspect(store)["tables"]
    return f"{digest(pool)} {sorted((table['name'], table['version']) for table in taken)}"


def states(place: Path) -> list[str]:
    """Of a pool in memory, before the script and behind each of its parts."""
    with mempool.local() as pool:
        found = [state(pool, place)]

        class Kept:
            """The same pool in both lives."""

            def __getattr__(self, name: str) -> object:
                return (lambda: None) if name == "close" else getattr(pool, name)

        kept: mempool.Pool = Kept()  # type: ignore[assignment]
        Script(
            lambda: kept, place=place, persist=lambda call: call(), done=lambda _: found.append(state(pool, place))
        ).run()
        return found
