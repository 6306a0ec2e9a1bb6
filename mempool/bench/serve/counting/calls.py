"""System calls of a process and all its threads, as strace sees them from outside; and the bytes that they move."""

from __future__ import annotations

import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mempool.errors import MempoolError

_ATTACH_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 20.0
_LINE = re.compile(r"^\d+ +(?:<\.\.\. (\w+) resumed>|(\w+)\().*?(?:= (-?\d+|\?)[^=]*)?$")
#: Calls whose results are bytes that the system has copied.
_TAKEN = ("read", "readv", "recvfrom", "recvmsg", "pread64")
_GIVEN = ("write", "writev", "sendto", "sendmsg", "pwrite64")


class StraceError(MempoolError):
    """strace is not there, or may not look at the process."""


@dataclass
class Calls:
    """System calls of one process.

    Attributes:
        counts: By name.
        taken, given: Bytes that the system copied to the process and from it: sockets, pipes, event counters.
    """

    counts: Counter[str] = field(default_factory=Counter)
    taken: int = 0
    given: int = 0


def available() -> bool:
    """Whether there is an strace here."""
    return shutil.which("strace") is not None


@contextmanager
def traced(pid: int) -> Iterator[Calls]:
    """Count until the block ends; the figures are there after it.

    Raises:
        StraceError: There is no strace, or it may not look at that process.
    """
    found = Calls()
    if not available():
        raise StraceError("strace is not installed (apt-get install strace)")
    with tempfile.TemporaryDirectory(prefix="mempool-bench-") as folder:
        path = Path(folder) / "calls"
        process = subprocess.Popen(
            ["strace", "-f", "-s", "0", "-o", str(path), "-p", str(pid)],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        try:
            _wait_attached(process, pid)
            yield found
        finally:
            process.send_signal(signal.SIGINT)  # it lets go, and writes the rest
            try:
                process.wait(_END_TIMEOUT_S)
            finally:
                if process.returncode is None:
                    process.kill()
                    process.wait()
                assert process.stderr is not None
                process.stderr.close()
        with path.open(errors="replace") as lines:
            for line in lines:
                _count(line, found)


def _wait_attached(process: subprocess.Popen[bytes], pid: int) -> None:
    assert process.stderr is not None
    said, deadline_s = b"", time.monotonic() + _ATTACH_TIMEOUT_S
    while b" attached" not in said:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0.0 or not select.select([process.stderr], [], [], left_s)[0]:
            raise StraceError(f"strace did not attach to process {pid} within {_ATTACH_TIMEOUT_S:g} s")
        if not (read := process.stderr.read1(4096)):  # type: ignore[attr-defined]
            raise StraceError(f"strace cannot look at process {pid}: {said.decode(errors='replace').strip()}")
        said += read


def _count(line: str, found: Calls) -> None:
    """One line: a call that has ended is counted once, where its result is."""
    matched = _LINE.match(line.rstrip())
    if matched is None or line.rstrip().endswith("...>"):
        return
    name, result = matched[1] or matched[2], matched[3]
    found.counts[name] += 1
    moved = int(result) if result and result != "?" else 0
    if moved > 0 and name in _TAKEN:
        found.taken += moved
    elif moved > 0 and name in _GIVEN:
        found.given += moved
