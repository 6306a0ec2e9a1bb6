"""A process of a benchmark and its parent: JSON lines both ways, and every wait bounded.

A child lives as long as its parent holds the pipe: it ends when its input does, also where the parent was killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from mempool.bench.processes import standing
from mempool.errors import MempoolError

START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 10.0
_MODULE = "mempool.bench.processes"
_READ_BYTES = 1 << 16


class ChildError(MempoolError):
    """A process of the benchmark does not start, does not answer, or has ended."""


class Child:
    """[PARENT] a process that runs one function of one module. Use it with ``with``, or close it.

    It has a session of its own: a Ctrl-C at the terminal is the parent's, who ends it.

    Args:
        what: "package.module:function"; called with a ``Parent`` and the arguments.
        arguments: For JSON.
        name: What it is called in errors, behind ``what``.
        variables: Of its environment, in the place of the parent's.
        without: Variables of the parent's that it does not get.
        end_timeout_s: In which it shall end by itself; as such processes usually do if not given.
    """

    def __init__(
        self,
        what: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        variables: Mapping[str, str] | None = None,
        without: tuple[str, ...] = (),
        end_timeout_s: float | None = None,
    ) -> None:
        self._end_timeout_s = _END_TIMEOUT_S if end_timeout_s is None else end_timeout_s
        self.what = f"{what}, {name}" if name else what
        environment = {name: value for name, value in os.environ.items() if name not in without}
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, what, json.dumps(arguments or {})],
            env=environment | dict(variables or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._heard = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, message: object) -> None:
        """Raises ChildError if it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise ChildError(self._ended()) from None

    def hear(self, timeout_s: float = START_TIMEOUT_S) -> Any:
        """Its next message. Raises ChildError if it has ended, or the time is over."""
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0.0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise ChildError(f"process {self.pid} ({self.what}) did not answer within {timeout_s:g} s")
            read = os.read(self._process.stdout.fileno(), _READ_BYTES)
            if not read:
                raise ChildError(self._ended())
            self._heard += read
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End it: by the end of its input, or else at once, with what it has started. Repeatable.

        One that stands still goes on first: else it would not learn of its end.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # it has ended, and did not take what was written last
            process.stdin.close()
        if process.returncode is None:
            standing.go_on([process.pid])
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(self._end_timeout_s)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ended(self) -> str:
        try:
            code: int | None = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        return f"process {self.pid} ({self.what}) ended with {code}; what it said is above"


class Parent:
    """[CHILD] the other end. What libraries print goes to stderr; stdout is for messages alone."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(self, message: object) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def hear(self) -> Any:
        """The next message; None: the parent wants no more of this process."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def wait(self) -> None:
        """Until the parent wants no more."""
        while self.hear() is not None:
            pass
