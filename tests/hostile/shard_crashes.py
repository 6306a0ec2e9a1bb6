"""Every crash point of a whole shard: kill -9, EIO and ENOSPC at the n-th call of the system on each of its files.

    python -m tests.hostile.shard_crashes DIR [--every 1] [--first 1] [--last N]     # needs strace (apt install strace)

A process with a pool on a disk goes through the script of ``tests.support.crashing`` and says what was acknowledged.
strace ends it, or fails one of its calls; where it fails, the call is made again and all must succeed then. Another
process recovers the pool, which is bit for bit what was acknowledged makes of one in memory, or that and the part of
the script that was in flight; and it goes on. Exit 1 where anything else is found.
"""

import argparse
import logging
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mempool
from mempool.errors import StorageFailed
from tests.support.crashing import Script, digest, state, states
from tests.support.durable_trainer import open_tables, train
from tests.support.forks import forked, prepare
from tests.support.memory_lives import NAMES, keep_journals_small

CALLS = ("write", "pwritev2", "pwrite64", "fdatasync", "fsync", "rename", "unlink", "ftruncate")
INJECTIONS = {"kill": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
_CALL = re.compile(r"^\d+ +(\w+)\((?:\d+<([^>]*)>|\"([^\"]*)\")")
_MOST_S = 120.0
_AGAIN_S = 0.02
_GO = b"go\n"


@dataclass(frozen=True)
class Point:
    """The ``number``-th ``call`` on a file, and how it ends."""

    call: str
    file: str
    how: str
    number: int

    def __str__(self) -> str:
        return f"{self.how} at {self.call} {self.number} of {self.file}"


@dataclass
class Life:
    """What a process said, and how it ended."""

    done: int = 0
    refused: list[str] = field(default_factory=list)
    status: int = 0

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


def live(place: Path, *options: str) -> Life:
    """A process that goes through the script, under strace with these options."""
    told, said = os.pipe(), os.pipe()
    pid = forked(lambda: _script(place, told[0], said[1]))
    os.close(told[0])
    os.close(said[1])
    command = ["strace", "-f", "-y", "-p", str(pid), "-e", f"trace={','.join(CALLS)}", *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    life = Life()
    try:
        _wait_until_attached(tracer)
        os.write(told[1], _GO)
        for line in _lines_of(said[0]):
            if line != "done" and life.refused == []:  # strace counts by thread: others would be refused, too
                tracer.terminate()
                tracer.wait(_MOST_S)
                os.write(told[1], _GO)
            if line == "done":
                life.done += 1
            else:
                life.refused.append(line)
        _, life.status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for end in (told[1], said[0]):
            os.close(end)
        tracer.terminate()
        tracer.communicate(timeout=_MOST_S)
    return life


def _script(place: Path, told: int, said: int) -> None:
    """[ENDED BY STRACE]"""
    os.read(told, len(_GO))
    first = [True]
    keep_journals_small()
    count = iter(range(10**9))
    secrets.token_hex = lambda _=None: f"{next(count):08x}"  # files of checkpoints have the same names in each run

    def persist(call: Callable[[], object]) -> object:
        ends_s = time.monotonic() + _MOST_S / 2
        while True:
            try:
                return call()
            except StorageFailed as error:
                os.write(said, f"refused: {error.message}\n".encode())
                if first:
                    first.pop()
                    os.read(told, len(_GO))
                if time.monotonic() > ends_s:
                    raise
                time.sleep(_AGAIN_S)

    Script(
        lambda: mempool.local(place / "memory"),
        place=place / "checkpoints",
        persist=persist,
        done=lambda _: os.write(said, b"done\n") and None,
    ).run()


def _wait_until_attached(tracer: "subprocess.Popen[bytes]") -> None:
    assert tracer.stderr is not None
    ready, _, _ = select.select([tracer.stderr], [], [], _MOST_S)
    line = tracer.stderr.readline().decode() if ready else "nothing"
    assert "attached" in line, f"strace said {line}"


def _lines_of(pipe: int) -> Iterator[str]:
    """The lines that come out of it until nobody can write any more."""
    left, ends_s = b"", time.monotonic() + _MOST_S
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, ends_s - time.monotonic()))
        assert ready, f"a process that does not end; it said {left!r} at last"
        part = os.read(pipe, 2**16)
        if not part:
            return
        *lines, left = (left + part).split(b"\n")
        yield from (line.decode() for line in lines)


def asked(work: Callable[[], str]) -> str:
    """What a process of its own answers."""
    answer, end = os.pipe()
    pid = forked(lambda: os.write(end, f"{work()}\n".encode()) and None)
    os.close(end)
    try:
        lines = list(_lines_of(answer))
    finally:
        os.close(answer)
        _, status = os.waitpid(pid, 0)
    assert status == 0, f"it failed: {lines}"
    return "\n".join(lines)


def calls_of_one_run(folder: Path) -> Counter[tuple[str, str]]:
    """How often an undisturbed run makes each call on each file, whose name is within its place."""
    place = Path(tempfile.mkdtemp(dir=folder))
    log = folder / "calls"
    life = live(place, "-o", str(log))
    assert life.status == 0, f"an undisturbed run ended with {life.status}"
    found: Counter[tuple[str, str]] = Counter()
    for match in filter(None, map(_CALL.match, log.read_text().splitlines())):
        path = match[2] or match[3]
        if path.startswith(f"{place}/"):
            found[match[1], path.removeprefix(f"{place}/")] += 1
    shutil.rmtree(place)
    return found


def check(folder: Path, point: Point, expected: list[str]) -> tuple[bool, list[str]]:
    """Whether it was reached, and what goes wrong there."""
    place = Path(tempfile.mkdtemp(dir=folder))
    inject = f"inject={point.call}:{INJECTIONS[point.how]}:when={point.number}"
    log = place / "log"
    life = live(place, "-P", str(place / point.file), "-e", inject, "-o", str(log))
    reached = life.killed or "INJECTED" in log.read_text()
    found = []
    if not life.killed and life.status:
        found.append(f"it ended with {life.status}, and said {life.refused[-3:]}")
    elif not life.killed and life.done != len(expected) - 1:
        found.append(f"{life.done} parts were acknowledged, of {len(expected) - 1}")
    try:
        recovered = asked(lambda: _recovered(place))
        if recovered not in expected[life.done : life.done + 2]:
            at = [number for number, one in enumerate(expected) if one == recovered]
            found.append(f"{life.done} parts were acknowledged, and it is as behind {at or 'none of them'}")
    except AssertionError as error:
        found.append(str(error))
    if not found:
        shutil.rmtree(place)
    return reached, found


def _recovered(place: Path) -> str:
    """The state of the pool that lies there, which goes on after that."""
    with mempool.local(place / "memory") as pool:
        found = state(pool, place / "checkpoints")
        train(open_tables(pool, NAMES), 101)
        after = digest(pool)
    with mempool.local(place / "memory") as pool:
        assert digest(pool) == after, "what was done after the recovery is lost"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=1, help="the first point that is tried, from 1")
    parser.add_argument("--last", type=int, help="the last one; all by default")
    parser.add_argument("--every", type=int, default=1, help="every so many-th")
    parser.add_argument("--how", nargs="+", choices=list(INJECTIONS), default=list(INJECTIONS), help="these alone")
    parser.add_argument("--parallel", type=int, default=2, help="so many at once")
    parser.add_argument("--show", action="store_true", help="list them, with their numbers")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    logging.getLogger("mempool").setLevel(logging.CRITICAL)  # of what is done to it on purpose
    prepare()
    began_s = time.monotonic()
    expected = states(options.folder / "in-memory")
    calls = calls_of_one_run(options.folder)
    points = [
        Point(call, file, how, number)
        for (call, file), count in sorted(calls.items())
        for number in range(1, count + 1)
        for how in options.how
    ]
    if options.show:
        print(*(f"{number}: {point}" for number, point in enumerate(points, 1)), sep="\n")
    chosen = points[options.first - 1 : options.last : options.every]
    workers = [
        forked(lambda share=chosen[place :: options.parallel]: _check_all(options.folder, share, expected))
        for place in range(min(options.parallel, len(chosen)))
    ]
    bad = sum(os.waitpid(worker, 0)[1] != 0 for worker in workers)
    kinds = Counter[str]()
    for (call, _), count in calls.items():
        kinds[call] += count
    print(
        f"{len(chosen)} of {len(points)} crash points: {', '.join(options.how)} at each of {dict(kinds)}; "
        f"{'violations' if bad else 'no violation'}; {time.monotonic() - began_s:.0f} s"
    )
    return 1 if bad else 0


def _check_all(folder: Path, points: list[Point], expected: list[str]) -> None:
    missed, bad = 0, 0
    for tried, point in enumerate(points):
        if tried and tried % 100 == 0:
            print(f"{tried} of {len(points)} tried", flush=True)
        reached, problems = check(folder, point, expected)
        missed += not reached
        for problem in problems:
            bad += 1
            print(f"{point}: {problem}", flush=True)
    print(f"{len(points)} tried, {missed} of them never came", flush=True)
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
