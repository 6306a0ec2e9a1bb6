"""Every crash point of a shard's folder on a real disk: kill -9, EIO, ENOSPC at the n-th call of the system, for all n.

    python -m tests.hostile.storage_crashes DIR [--stride 1]      # needs strace (Debian: apt install strace)

A process goes through lives of a journal with snapshots and says what was acknowledged; strace ends it, or fails one of
its calls. Then the folder is read: all that was acknowledged is there, in order, and nothing else; and it goes on.
"""

import argparse
import asyncio
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from mempool.errors import MempoolError, StorageFailed
from mempool.journal import DiskFiles, Journal, ShardFolder, Snapshots
from tests.support.byhand import ByHand

CALLS = ("pwritev2", "pwrite64", "fdatasync", "fsync", "rename", "unlink", "ftruncate")
INJECTIONS = {"kill": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
_ROOT = Path(__file__).parents[2]


def payload(name: int) -> bytes:
    """Of the record with an id."""
    return name.to_bytes(4, "little") + bytes((name * 31 + place) % 256 for place in range(name * 37 % 200))


def open_folder(path: str) -> ShardFolder:
    """The shard's."""
    return ShardFolder(DiskFiles(), path, pool="pool", pool_id="id", shard=0)


async def lives(path: str) -> None:
    """[ENDED BY STRACE] Two lives: records, a snapshot that has a page for each of them, old segments go."""
    name = 0
    for _ in range(2):
        with open_folder(path) as folder:
            snapshots = Snapshots(folder.files, folder.snapshots, owner=folder.owner)
            after = snapshots.newest.after if snapshots.newest is not None else 0
            hand = ByHand()  # on one thread: strace counts the calls of each by itself
            journal = Journal(
                folder.files, folder.journal, owner=folder.owner, runner=hand, segment_bytes=700, after=after
            )
            for count in (1, 3, 2, 4):
                numbers = []
                for _ in range(count):
                    numbers.append((name, journal.append(1, [payload(name)])))
                    name += 1
                hand.work()
                for known, number in numbers:
                    error = journal.when_synced(number).exception(timeout=0)
                    say(f"acknowledged {known}" if error is None else f"failed {known}")
            snapshot_of(snapshots, name, journal.last)
            removed = journal.remove_before(journal.last - 2)
            hand.work()
            removed.result(timeout=0)
            await journal.close()


def snapshot_of(snapshots: Snapshots, name: int, number: int) -> None:
    """A snapshot that says it has everything up to an id; it is said what counts."""
    with snapshots.begin(after=number) as snapshot:
        snapshot.write(b"page", [("values", [payload(name)])])
        snapshot.finish(name.to_bytes(4, "little"))
    say(f"snapshot {name} {number}")


def say(what: str) -> None:
    """To whoever started this process, who reads it also when it is killed."""
    os.write(1, f"{what}\n".encode())


def run(path: str, *, inject: str = "", count: str = "") -> tuple[list[str], int]:
    """A process under strace; what it said, and how it ended."""
    # Not with --seccomp-bpf: strace then injects no signals.
    command = ["strace", "-f", "-qq", "-e", f"trace={','.join(CALLS)}"]
    command += ["-e", f"inject={inject}"] if inject else []
    command += ["-o", count or "/dev/null", sys.executable, "-m", "tests.hostile.storage_crashes", "--lives", path]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, timeout=120, check=False)
    return done.stdout.decode().split("\n")[:-1], done.returncode


def calls_of_one_run(folder: Path) -> Counter[str]:
    """How often an undisturbed run makes each call."""
    log = folder / "calls"
    path = tempfile.mkdtemp(dir=folder)
    said, ended = run(path, count=str(log))
    assert ended == 0, f"an undisturbed run ended with {ended}"
    assert sum(line.startswith("acknowledged") for line in said) == 20
    return Counter(name for line in log.read_text().splitlines() for name in CALLS if f" {name}(" in line)


def problems(path: str, said: list[str]) -> list[str]:
    """What is wrong with the folder that a process left which said this."""
    acknowledged = [int(line.split()[1]) for line in said if line.startswith("acknowledged")]
    failed = [int(line.split()[1]) for line in said if line.startswith("failed")]
    finished = [line.split() for line in said if line.startswith("snapshot")]
    found = []
    try:
        with open_folder(path) as folder:
            snapshots = Snapshots(folder.files, folder.snapshots, owner=folder.owner)
            after = snapshots.newest.after if snapshots.newest is not None else 0
            covered = int.from_bytes(snapshots.newest.head, "little") if snapshots.newest is not None else 0
            if finished and covered < int(finished[-1][1]):
                found.append(f"snapshot {finished[-1]} was finished, and the newest has {covered}")
            for _, arrays in snapshots.pages():
                if bytes(arrays["values"]) != payload(covered):
                    found.append("a page is another one")
            journal = Journal(folder.files, folder.journal, owner=folder.owner, after=after)
            names = []
            for record in journal.records(after=after):
                names.append(int.from_bytes(record.payload[:4], "little"))
                if bytes(record.payload) != payload(names[-1]):
                    found.append(f"record {names[-1]} is another one")
            if names != sorted(set(names)):
                found.append(f"the order is {names}")
            if missing := [name for name in acknowledged if name >= covered and name not in names]:
                found.append(f"{missing} were acknowledged and are missing")
            if wrong := [name for name in failed if name in names and max(acknowledged, default=0) > name]:
                found.append(f"{wrong} failed before later ones, and are there")
            number = journal.append(1, [payload(10**6)])
            journal.when_synced(number).result(timeout=20)
            asyncio.run(journal.close())
    except MempoolError as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


def check(folder: Path, call: str, how: str, number: int) -> list[str]:
    """What goes wrong where the ``number``-th ``call`` is the last one, or fails."""
    path = tempfile.mkdtemp(dir=folder)
    said, ended = run(path, inject=f"{call}:{INJECTIONS[how]}:when={number}")
    if how == "kill" and ended not in (-9, 137):
        return [f"it was to be killed, and ended with {ended}"]
    found = problems(path, said)
    shutil.rmtree(path)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Every crash point of a shard's folder on a real disk.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stride", type=int, default=1, help="every so many-th point")
    parser.add_argument("--lives", action="store_true", help="be the process that is ended")
    given = parser.parse_args()
    if given.lives:
        try:
            asyncio.run(lives(str(given.folder)))
        except StorageFailed as error:
            say(f"ended: {error}")
            return errno.EIO
        return 0
    calls = calls_of_one_run(given.folder)
    points = [(call, how, n) for call in CALLS for how in INJECTIONS for n in range(1, calls[call] + 1)]
    points, bad = points[:: given.stride], 0
    for call, how, number in points:
        for problem in check(given.folder, call, how, number):
            bad += 1
            print(f"{how} at {call} {number}: {problem}", flush=True)
    print(f"{len(points)} crash points: {', '.join(INJECTIONS)} at each of {dict(calls)}; {bad} violations")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
