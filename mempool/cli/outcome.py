"""How a command ends: exit codes, and errors as one message without a traceback."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from mempool.errors import MempoolError, PoolUnreachable

FAILED, USAGE, UNREACHABLE = 1, 2, 3


class UsageError(MempoolError):
    """The options do not fit together."""


@contextmanager
def reported() -> Iterator[None]:
    """Run a command's body; an error of mempool ends the command with its message on stderr and its exit code."""
    try:
        yield
    except MempoolError as error:
        _fail(error.message, _code(error))
    except ModuleNotFoundError as error:
        package = (error.name or "mempool").partition(".")[0]
        if package == "mempool":
            raise
        _fail(
            f"this command needs the package {package!r}, which is not installed: pip install 'mempool[server]'", FAILED
        )
    except BrokenPipeError:  # `mempool status | head`
        sys.stderr.close()
        raise typer.Exit(FAILED) from None
    except OSError as error:  # a full disk, a right that is missing: the system's own words
        where = "" if error.filename is None else f": {error.filename}"
        _fail(f"{error.strerror or error}{where}", FAILED)


@contextmanager
def undone_by_signals() -> Iterator[None]:
    """Run what has to be undone if it does not end well: SIGTERM and SIGHUP then end it as Ctrl-C does.

    By themselves they end a process where it stands, and what it has started stays.
    """

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}  # as nohup asks
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code(error: MempoolError) -> int:
    if isinstance(error, UsageError):
        return USAGE
    return UNREACHABLE if isinstance(error, PoolUnreachable) else FAILED


def _fail(message: str, code: int) -> None:
    print(f"mempool: {message}", file=sys.stderr)
    raise typer.Exit(code) from None
