"""A trainer that goes on where a pool on a disk stands, in processes that are killed; beside one that never dies.

What is trained at a step is ``durable_trainer``'s. Beside it checkpoints are taken and shards are added and taken away.
"""

import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

import mempool
from mempool.checkpoint import looking
from mempool.checkpoint.stores import open_store
from mempool.shard.durable.store import Store
from tests.support.durable_trainer import CONFIGS, contents, differences, open_tables, train

NAMES = ("sgd", "adagrad", "adam", "dense")
JOURNAL_LIMIT_BYTES = 2**16
"""So small that snapshots are taken all the time."""
START_S = 60.0
_TABLES = [config.name for config in CONFIGS if config.name in NAMES]


def keep_journals_small() -> None:
    """In this process."""
    Store.__init__.__kwdefaults__["journal_limit"] = JOURNAL_LIMIT_BYTES


def versions_after(step: int) -> dict[str, int]:
    """The tables' versions behind a step, by which a pool is known to be there."""
    counts = dict.fromkeys(_TABLES, 0)
    for done in range(1, step + 1):
        for name in [_TABLES[done % len(_TABLES)]] if done % 4 == 0 else _TABLES:
            counts[name] += 1
    return counts


def step_of(pool: mempool.Pool) -> int:
    """Behind which step a pool stands."""
    contents(open_tables(pool, [table.name for table in pool.tables()] or NAMES[:1]))  # what was in doubt is known then
    found: dict[str, int] = {}
    for shard in pool.status().shards:
        for table in shard.tables:
            found[table.name] = max(table.version, found.get(table.name, 0))
    return step_with(found)


def step_with(found: dict[str, int]) -> int:
    """The step behind which tables have these versions. Raises AssertionError where there is none."""
    if len(found) < len(_TABLES):
        assert not any(found.values()), f"tables are missing, and others were trained: {found}"
        return 0
    step = max(found.values())
    while versions_after(step) != found:
        step += 1
        assert step <= 2 * max(found.values()) + 1, f"no step ends with {found}"
    return step


@dataclass
class Undisturbed:
    """What a pool that never dies holds behind each step, made as far as it is asked for."""

    _pool: mempool.Pool = field(default_factory=lambda: mempool.local(shards=1))
    _behind: list[list[dict[str, Tensor]]] = field(default_factory=list)

    def differences(self, found: dict[str, Tensor], step: int) -> list[str]:
        """In what a pool differs that stands behind a step; rows of the next one may have been written."""
        tables = open_tables(self._pool, NAMES)
        if not self._behind:
            self._behind.append([contents(tables)])
        while len(self._behind) <= step + 1:
            behind = self._behind[-1]
            train(tables, len(self._behind), on_written=lambda: behind.append(contents(tables)))  # noqa: B023
            self._behind.append([contents(tables)])
        return min((differences(found, expected) for expected in self._behind[step]), key=len)

    def close(self) -> None:
        self._pool.close()


@dataclass(frozen=True)
class Life:
    """What became of one process.

    Attributes:
        said: The last step that it acknowledged.
        stood: Behind which step the pool was found then.
        opened: It had opened the pool.
    """

    said: int
    stood: int
    opened: bool


def live(folder: Path, *, oracle: Undisturbed, dice: random.Random, known: int, longest_s: float) -> Life:
    """A process trains, is killed at a random moment, and the pool is compared with one that never died.

    Args:
        folder: Of the pool and its checkpoints.
        known: The step up to which earlier processes have said that all is done.
        longest_s: It is killed within so many seconds from when it has loaded what it needs.

    Raises:
        AssertionError: Something that was acknowledged is not there, or anything differs in a bit.
    """
    command = [sys.executable, "-m", "tests.support.memory_lives", str(folder), str(dice.randrange(2**31))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    said = [known]
    loaded, opened = threading.Event(), threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            word = line.strip()
            if word.isdecimal():
                said.append(int(word))
            {"loaded": loaded, "opened": opened}.get(word, threading.Event()).set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert loaded.wait(START_S), "a process that does not begin"
        if dice.random() < 0.7:  # else it may die while it opens the pool
            assert opened.wait(START_S), "a pool that does not open"
        time.sleep(dice.uniform(0.0, longest_s))
        assert process.poll() is None, f"the trainer ended by itself with {process.returncode}"
    finally:
        process.kill()
        process.wait(START_S)
        listener.join(START_S)
        if process.stdout is not None:
            process.stdout.close()
    return Life(said=said[-1], stood=compare(folder, oracle, at_least=said[-1]), opened=opened.is_set())


def compare(folder: Path, oracle: Undisturbed, *, at_least: int) -> int:
    """Where the pool stands. Raises AssertionError where it is not what one that never died is there."""
    with mempool.local(folder / "memory") as pool:
        stands = step_of(pool)
        assert at_least <= stands <= at_least + 1, f"step {at_least} was acknowledged, and the pool stands at {stands}"
        found = oracle.differences(contents(open_tables(pool, NAMES)), stands)
        assert not found, f"behind step {stands} {found} are not what they are in a pool that never died"
    _compare_checkpoints(folder / "checkpoints", oracle)
    return stands


def _compare_checkpoints(place: Path, oracle: Undisturbed) -> None:
    store = open_store(place)
    for listed in looking.checkpoints(store)[-1:]:
        damages = looking.verify(store, listed["name"]).damages
        assert not damages, f"checkpoint {listed['name']} is damaged: {damages}"
        with mempool.local(shards=2) as pool:
            pool.restore(place)
            taken = step_of(pool)
            found = oracle.differences(contents(open_tables(pool, NAMES)), taken)
            assert not found, f"the checkpoint of step {taken} differs in {found}"


def main(folder: Path, seed: int) -> None:
    """[KILLED] Open the pool and train on; say what is acknowledged."""
    keep_journals_small()
    dice = random.Random(seed)
    print("loaded", flush=True)
    pool = mempool.local(folder / "memory")
    tables = open_tables(pool, NAMES)
    step = step_of(pool)
    contents(tables)  # as behind every step
    print("opened", flush=True)
    beside: threading.Thread | None = None
    while True:
        if dice.random() < 0.2 and (beside is None or not beside.is_alive()):
            beside = threading.Thread(target=_change, args=(pool, folder, dice.randrange(5)), daemon=True)
            beside.start()
        step += 1
        train(tables, step)
        print(step, flush=True)


def _change(pool: mempool.Pool, folder: Path, what: int) -> None:
    """Beside a step: another number of shards, or a checkpoint."""
    if what < 3:
        pool.rescale(what + 1)
    else:
        pool.checkpoint(folder / "checkpoints", keep=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
