"""Every error a user of mempool can meet, as one tree.

    MempoolError
    ├── ConfigError            a configuration is wrong (also a ValueError)
    ├── InvalidRequest         a call's arguments are wrong (also a ValueError); nothing was changed
    │   ├── RequestTooLarge    the message exceeds what the shard accepts
    │   └── StepConflict       a commit that contradicts what the shard knows of that step
    ├── NotFound               no such table, shard or pool (also a LookupError)
    ├── VersionGone            a version that is read is not kept any more (also a LookupError)
    ├── AlreadyExists          a table of that name is there already
    ├── Unauthenticated        a token is missing or wrong
    ├── Unavailable            nobody answers, for now (also a ConnectionError); retryable
    │   ├── ShardUnavailable
    │   ├── Overloaded         the shard has too much to do or to hold just now; it says when to try again
    │   └── PoolUnreachable
    ├── RankLost               a rank of the group is gone; the others go on when it is back
    ├── DeadlineExceeded       the call's time is over (also a TimeoutError)
    ├── DataLoss               pages are gone, or what was stored is damaged; the message says what to restore
    ├── StorageFailed          a disk is full, failing, read-only, or in use by another process; nothing was changed
    ├── Replan                 internal: the caller's view of the pool is old; the client follows and tries again
    │   ├── StalePlacement     the page's epoch, or the shard's incarnation, is another one
    │   └── ContextMissing     the shard no longer remembers the lookup; the client sends ids and weights again
    └── Internal               a bug in mempool

`code` is what travels on the wire (``mempool/wire/v1/error.proto``); ``mempool.wire.status`` maps both ways.
"""

from enum import IntEnum, unique


@unique
class ErrorCode(IntEnum):
    """The number an error has on the wire. Numbers are never reused."""

    INTERNAL = 1
    CONFIG = 2
    INVALID_REQUEST = 3
    REQUEST_TOO_LARGE = 4
    STEP_CONFLICT = 5
    NOT_FOUND = 6
    ALREADY_EXISTS = 7
    UNAUTHENTICATED = 8
    SHARD_UNAVAILABLE = 9
    POOL_UNREACHABLE = 10
    DEADLINE_EXCEEDED = 11
    DATA_LOSS = 12
    STALE_PLACEMENT = 13
    CONTEXT_MISSING = 14
    OVERLOADED = 15
    STORAGE_FAILED = 16
    RANK_LOST = 17
    VERSION_GONE = 18


class MempoolError(Exception):
    """Base of all errors that mempool raises on purpose.

    Args:
        message: What happened, the value, and what to do.
        shard: The shard that raised it, where one did.
        address: The address that was spoken to, where one was.
    """

    code: ErrorCode = ErrorCode.INTERNAL
    retryable: bool = False

    def __init__(self, message: str, *, shard: int | None = None, address: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.shard = shard
        self.address = address

    def __str__(self) -> str:
        return self.message


class ConfigError(MempoolError, ValueError):
    """A configuration is wrong: the message names the file, line and field where it can."""

    code = ErrorCode.CONFIG


class InvalidRequest(MempoolError, ValueError):
    """A call's arguments are wrong. Nothing was changed."""

    code = ErrorCode.INVALID_REQUEST


class RequestTooLarge(InvalidRequest):
    """The message exceeds the receiver's limit. Nothing was changed."""

    code = ErrorCode.REQUEST_TOO_LARGE


class StepConflict(InvalidRequest):
    """A Prepare or Commit contradicts what the shard knows of that step. Nothing was changed."""

    code = ErrorCode.STEP_CONFLICT


class NotFound(MempoolError, LookupError):
    """There is no such table, shard or pool."""

    code = ErrorCode.NOT_FOUND


class VersionGone(MempoolError, LookupError):
    """A version of a table is not kept (any more): the message says which, why, and what to do."""

    code = ErrorCode.VERSION_GONE


class AlreadyExists(MempoolError):
    """A table, or a snapshot, of that name exists already."""

    code = ErrorCode.ALREADY_EXISTS


class Unauthenticated(MempoolError):
    """The token is missing or wrong."""

    code = ErrorCode.UNAUTHENTICATED


class Unavailable(MempoolError, ConnectionError):
    """Nobody answers, for now. refused: no host of that name is known, or it says that nobody listens
    at that port."""

    retryable = True
    refused: bool = False


class ShardUnavailable(Unavailable):
    """A shard does not answer, or is not ready yet."""

    code = ErrorCode.SHARD_UNAVAILABLE


class Overloaded(Unavailable):
    """A shard has more to do, or holds more for its clients, than it can take just now. Nothing was changed.

    Args:
        retry_after_s: Seconds after which to try again.
    """

    code = ErrorCode.OVERLOADED

    def __init__(
        self, message: str, *, shard: int | None = None, address: str | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message, shard=shard, address=address)
        self.retry_after_s = retry_after_s


class PoolUnreachable(Unavailable):
    """None of the pool's addresses answers."""

    code = ErrorCode.POOL_UNREACHABLE


class DeadlineExceeded(MempoolError, TimeoutError):
    """The call's time is over; whether it took effect is not known, and repeating it is safe."""

    code = ErrorCode.DEADLINE_EXCEEDED
    retryable = True


class RankLost(MempoolError):
    """A rank of the group was not heard of for its lease, or has left. What is pending is kept: the same call goes on
    when the rank is back.

    Args:
        ranks: Which are gone.
    """

    code = ErrorCode.RANK_LOST

    def __init__(
        self, message: str, *, shard: int | None = None, address: str | None = None, ranks: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message, shard=shard, address=address)
        self.ranks = ranks


class DataLoss(MempoolError):
    """Pages are gone and are not replaced by initial values; the message says what to restore."""

    code = ErrorCode.DATA_LOSS


class StorageFailed(MempoolError):
    """A file cannot be read or written. What was to be stored is not; the shard goes on when the disk does.

    Args:
        errno: The operating system's number of it; 0 where it has none.
    """

    code = ErrorCode.STORAGE_FAILED

    def __init__(self, message: str, *, shard: int | None = None, address: str | None = None, errno: int = 0) -> None:
        super().__init__(message, shard=shard, address=address)
        self.errno = errno


class Replan(MempoolError):
    """The caller's view of the pool is old. The client refreshes it and tries again; users do not meet this."""

    retryable = True


class StalePlacement(Replan):
    """The placement's epoch or the shard's incarnation is not the one the request was planned for."""

    code = ErrorCode.STALE_PLACEMENT


class ContextMissing(Replan):
    """The shard does not remember the lookup (evicted, expired, restarted, page moved): send ids and weights again."""

    code = ErrorCode.CONTEXT_MISSING


class Internal(MempoolError):
    """A bug in mempool: please report it with the message."""

    code = ErrorCode.INTERNAL
