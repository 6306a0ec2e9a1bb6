"""What becomes of a pool's processes, disk and network in `make chaos`, one fault by one; the dice choose."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tests.integration.pools import RayPool, listener, parent, wait_for
from tests.integration.ray_nodes import RayNodes
from tests.integration.trainers import Trainers

BACK_S = 180.0
_LONGEST_S = 5.0
"""Of what lasts: more than the lease of trainers."""
_TMPFS_BYTES = 64 * 2**20

WEIGHTS = {
    "shard killed": 6,
    "controller killed": 1,
    "shard and controller killed": 1,
    "all killed": 1,
    "trainer killed": 3,
    "shard stopped": 1,
    "controller stopped": 1,
    "trainer stopped": 1,
    "connections cut": 1,
    "connections reset": 1,
    "disk full": 1,
    "bit flipped": 1,
    "node killed": 1,
}
"""How often each comes in as many faults as these are together."""
_BEGUN_BYTES = 120
"""Of a segment: its header and that of its first record, which says that a life has begun, and is synced."""


class SmallDisk:
    """A disk of some MiB, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self) -> bool:
        """Whether this process may."""
        command = ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES}", "tmpfs", str(self.folder)]
        with suppress(FileNotFoundError):
            return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
        return False

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, timeout=20, check=True)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Nothing more fits on it meanwhile."""
        filler = self.folder / "filler"
        try:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            yield
        finally:
            filler.unlink()


class WorkerNodes:
    """The nodes of a Ray on which a pool's shards may run."""

    def __init__(self, nodes: RayNodes, count: int) -> None:
        self._nodes = nodes
        self._raylets = [self._add() for _ in range(count)]

    def kill(self, shard: int) -> None:
        """End the node on which this process runs, at once; there is another one then."""
        raylet = parent(shard)
        if raylet in self._raylets:
            self._raylets.remove(raylet)
            self._nodes.remove(raylet)
            self._raylets.append(self._add())

    def _add(self) -> int:
        return self._nodes.add(worker=8)


class Faults:
    """Faults of a pool with storage.

    Args:
        pool: It is up.
        trainers: Step on it.
        storage: Where its shards keep what they have.
        dice: Choose.
        kinds: Those that may come, of ``WEIGHTS``.
        disk: What it lies on, where that may be full.
        nodes: Where its shards run, where nodes may end.

    Attributes:
        kinds: Those that may come here.
        counts: How often each came.
    """

    def __init__(
        self,
        pool: RayPool,
        trainers: Trainers,
        *,
        storage: Path,
        dice: random.Random,
        kinds: Collection[str] = tuple(WEIGHTS),
        disk: SmallDisk | None = None,
        nodes: WorkerNodes | None = None,
    ) -> None:
        self._pool, self._trainers, self._folder, self._dice = pool, trainers, storage / pool.name, dice
        self._disk, self._nodes = disk, nodes
        self._sudden: dict[str, Callable[[], None]] = {
            "shard killed": lambda: _kill(self._shard()),
            "controller killed": lambda: _kill(self._controller()),
            "shard and controller killed": lambda: _kill(self._shard(), self._controller()),
            "all killed": lambda: _kill(*self._shards(), self._controller()),
            "trainer killed": self._replace_trainer,
            "connections reset": lambda: self._trainers.tell("reset"),
            "bit flipped": self._flip_a_bit,
            "node killed": self._kill_node,
        }
        self._lasting: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "shard stopped": lambda: _stopped(self._shard()),
            "controller stopped": lambda: _stopped(self._controller()),
            "trainer stopped": lambda: _stopped(self._trainers.process.pid),
            "connections cut": self._cut,
            "disk full": self._full,
        }
        without = {"disk full"} if disk is None else set()
        without |= {"node killed"} if nodes is None else set()
        self.kinds = [kind for kind in WEIGHTS if kind in kinds and kind not in without]
        self.counts: Counter[str] = Counter()
        self._deck: list[str] = []

    def happen(self) -> str:
        """One that the dice choose; while it lasts a process may be killed, too. What it was."""
        if not self._deck:  # drawn without being put back: each comes within so many
            self._deck = [kind for kind in self.kinds for _ in range(WEIGHTS[kind])]
            self._dice.shuffle(self._deck)
        kind = self._deck.pop()
        self.counts[kind] += 1
        if kind in self._sudden:
            self._sudden[kind]()
            return kind
        with self._lasting[kind]():
            if (kills := [other for other in self.kinds if other.endswith("killed")]) and self._dice.random() < 0.4:
                other = self._dice.choices(kills, [WEIGHTS[kill] for kill in kills])[0]
                self.counts[other] += 1
                kind = f"{kind}, then {other}"
                self._sudden[other]()
            time.sleep(self._dice.uniform(0.0, _LONGEST_S))
        return kind

    def _shards(self) -> list[int]:
        """The processes of the shards: those that have locked their folders. Who else could be asked may be away."""
        return list(_users(self._folder).values())

    def _shard(self) -> int:
        return self._dice.choice(wait_for("a shard", self._shards))

    def _controller(self) -> int:
        return wait_for("the controller", lambda: listener(self._pool.port))

    def _replace_trainer(self) -> None:
        self._trainers.kill()
        self._trainers.begin()

    def _kill_node(self) -> None:
        assert self._nodes is not None
        self._nodes.kill(self._shard())

    @contextmanager
    def _cut(self) -> Iterator[None]:
        self._trainers.tell(f"cut {self._dice.uniform(0.0, _LONGEST_S)}")
        yield

    @contextmanager
    def _full(self) -> Iterator[None]:
        assert self._disk is not None
        with self._disk.full():
            waited = self._trainers.waited
            with suppress(AssertionError):  # what else goes on may keep the trainer from stepping
                wait_for("the trainer to be refused", lambda: self._trainers.waited > waited, within_s=20.0)
                self.counts["disk full, and a step was refused"] += 1
            yield

    def _flip_a_bit(self) -> None:
        """In a file of a shard that is down: it must not come back with that, and it is said which file it is."""
        number, pid = self._dice.choice(sorted(wait_for("a shard", lambda: _users(self._folder)).items()))
        _kill(pid)
        wait_for("it to end", lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))
        file, at, bit = self._place(self._folder / f"shard-{number}")
        _flip(file, at, bit)
        try:
            wait_for("the status to name the damaged file", lambda: self._is_named(number, file), within_s=BACK_S)
        finally:
            _flip(file, at, bit)

    def _place(self, folder: Path) -> tuple[Path, int, int]:
        """A file that is read at a start, and in it a byte that counts, and one of its bits."""
        manifests, segments = sorted(folder.glob("snapshots/*.manifest")), sorted(folder.glob("journal/*.segment"))
        file = self._dice.choice([*manifests[-1:], *segments[-1:]])
        end = file.stat().st_size if file.suffix == ".manifest" else _BEGUN_BYTES
        return file, self._dice.randrange(end), self._dice.randrange(8)

    def _is_named(self, shard: int, file: Path) -> bool:
        with self._pool.connect(timeout_s=BACK_S) as client:
            said = [each.storage_refuses for each in client.status().shards if each.info.shard == shard]
        return any(str(file) in text and "damaged" in text for text in said)


def _kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _users(folder: Path) -> dict[int, int]:
    """The processes that have locked a shard's folder, by shard."""
    found = {}
    for lock in folder.glob("shard-*/LOCK"):
        with suppress(OSError, IndexError):  # it goes just now, or has not been written to
            pid = lock.read_text().split()[1]
            if b"ShardProcess" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[int(lock.parent.name.removeprefix("shard-"))] = int(pid)
    return found


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _flip(file: Path, at: int, bit: int) -> None:
    with file.open("r+b", buffering=0) as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << bit]))
