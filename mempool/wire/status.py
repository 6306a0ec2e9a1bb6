"""Errors <-> gRPC: what a failed call carries, and the one place where gRPC's own failures become ours.

Leaves it to the caller when to try again: ``MempoolError.retryable`` says whether that may help.
"""

import re

import grpc
from google.protobuf.message import DecodeError

from mempool import errors
from mempool.errors import ErrorCode, MempoolError
from mempool.wire.v1 import error_pb2

DETAIL_KEY = "mempool-error-bin"
# gRPC drops metadata beyond 8 KiB in all; both texts must fit in it, percent- and base64-encoded.
MAX_DETAIL_BYTES = 2048
MAX_STATUS_BYTES = 512

Metadata = tuple[tuple[str, str | bytes], ...]

_STATUS: dict[ErrorCode, grpc.StatusCode] = {
    ErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
    ErrorCode.CONFIG: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.REQUEST_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.STEP_CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorCode.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorCode.SHARD_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.POOL_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorCode.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    ErrorCode.STALE_PLACEMENT: grpc.StatusCode.ABORTED,
    ErrorCode.CONTEXT_MISSING: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorCode.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.STORAGE_FAILED: grpc.StatusCode.INTERNAL,
    ErrorCode.RANK_LOST: grpc.StatusCode.ABORTED,
    ErrorCode.VERSION_GONE: grpc.StatusCode.NOT_FOUND,
}

_CLASSES: dict[int, type[MempoolError]] = {
    cls.code: cls
    for cls in (
        errors.Internal,
        errors.ConfigError,
        errors.InvalidRequest,
        errors.RequestTooLarge,
        errors.StepConflict,
        errors.NotFound,
        errors.AlreadyExists,
        errors.Unauthenticated,
        errors.ShardUnavailable,
        errors.PoolUnreachable,
        errors.DeadlineExceeded,
        errors.DataLoss,
        errors.StalePlacement,
        errors.ContextMissing,
        errors.Overloaded,
        errors.StorageFailed,
        errors.RankLost,
        errors.VersionGone,
    )
}

# What a status means that came without our detail, where it is not treated by itself below.
_FOREIGN: dict[grpc.StatusCode, type[MempoolError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.DATA_LOSS: errors.DataLoss,
}
_TOO_LARGE = re.compile(r"(sent|received) message larger than max \((\d+) vs\.? (\d+)\)", re.IGNORECASE)
# How a connection that breaks in the middle of a call shows, besides UNAVAILABLE.
_BROKEN_CODES = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)
# gRPC names the address again, and its own layers, around what the operating system said.
_REFUSED = re.compile(r"connection refused", re.IGNORECASE)
_UNKNOWN_HOST = re.compile(r"domain name not found|name or service not known|no such host", re.IGNORECASE)
_BROKEN = re.compile(r"RST_STREAM|GOAWAY|stream removed|connection reset|socket closed|channel closed", re.IGNORECASE)


def to_status(error: BaseException) -> tuple[grpc.StatusCode, str, Metadata]:
    """What a server ends a call with that failed by ``error``: status code, its message, trailing metadata.

    Errors that are not mempool's own are bugs: they are sent as Internal, with their type and text.
    """
    if not isinstance(error, MempoolError):
        if isinstance(error, TimeoutError):
            error = errors.DeadlineExceeded("the call's time is over on the server; repeating it is safe")
        else:
            error = errors.Internal(f"a bug in mempool, please report it: {type(error).__name__}: {error}")
    detail = error_pb2.ErrorDetail(
        code=error_pb2.ErrorCode.ValueType(error.code), message=_cut(error.message, MAX_DETAIL_BYTES)
    )
    if error.shard is not None:
        detail.shard = error.shard
    if error.address is not None:
        detail.address = error.address
    if isinstance(error, errors.Overloaded):
        detail.retry_after_s = error.retry_after_s
    return _STATUS[error.code], _cut(error.message, MAX_STATUS_BYTES), ((DETAIL_KEY, detail.SerializeToString()),)


def from_rpc_error(
    error: grpc.aio.AioRpcError, *, shard: int | None = None, address: str | None = None
) -> MempoolError:
    """The mempool error that a failed call means.

    Args:
        error: What grpc raised.
        shard: The shard that was asked; None where the pool was.
        address: The address that was asked.
    """
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_KEY:
            found = from_detail(value if isinstance(value, bytes) else value.encode(), shard=shard, address=address)
            if found is not None:
                return found
            break
    cls, message = _foreign(error.code(), error.details() or "", shard, address)
    failure = cls(message, shard=shard, address=address)
    if isinstance(failure, errors.Unavailable):
        failure.refused = any(pattern.search(error.details() or "") for pattern in (_REFUSED, _UNKNOWN_HOST))
    return failure


def from_detail(value: bytes, *, shard: int | None = None, address: str | None = None) -> MempoolError | None:
    """The error that a server described; None where this cannot be read."""
    try:
        detail = error_pb2.ErrorDetail.FromString(value)
    except DecodeError:
        return None
    known = _CLASSES.get(detail.code)
    if known is None:
        return None
    found = known(
        detail.message,
        shard=detail.shard if detail.HasField("shard") else shard,
        address=detail.address if detail.HasField("address") else address,
    )
    if isinstance(found, errors.Overloaded):
        found.retry_after_s = detail.retry_after_s
    return found


def _foreign(
    code: grpc.StatusCode, details: str, shard: int | None, address: str | None
) -> tuple[type[MempoolError], str]:
    """Class and message for a failure that mempool's server did not describe."""
    who = f"the pool at {address}" if shard is None else f"shard {shard} at {address}"
    unavailable = errors.PoolUnreachable if shard is None else errors.ShardUnavailable
    why = f"{code.name}: {details}" if details else code.name
    if sizes := _TOO_LARGE.search(details):
        return errors.RequestTooLarge, (
            f"a message {'to' if sizes[1].lower() == 'sent' else 'to or from'} {who} has {int(sizes[2]):,} bytes; "
            f"{int(sizes[3]):,} are accepted (max_message_bytes). Send fewer bags or rows at a time"
        )
    broken = code in _BROKEN_CODES and _BROKEN.search(details)
    if broken or code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        if _REFUSED.search(details):
            why = "connection refused: nobody listens at that port"
        elif _UNKNOWN_HOST.search(details):
            why = "no host of that name is known"
        advice = "" if shard is None else ". See which shards are up: mempool status"
        return unavailable, f"{who} does not answer ({why}){advice}"
    if code is grpc.StatusCode.CANCELLED:
        return unavailable, f"{who} ended the call before answering it ({why})"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded, f"{who} did not answer in time; whether the call took effect is not known"
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return errors.Unauthenticated, f"{who} does not accept the token, or needs one ({why})"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.Internal, (
            f"{who} does not know this call ({why}): it runs another version of mempool, or is no mempool server"
        )
    return _FOREIGN.get(code, errors.Internal), f"{who} failed the call ({why})"


def _cut(text: str, max_bytes: int) -> str:
    raw = text.encode("utf-8", "replace")
    if len(raw) <= max_bytes:
        return raw.decode()
    return raw[: max_bytes - 3].decode("utf-8", "ignore") + "..."
