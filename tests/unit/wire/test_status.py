"""Errors to gRPC and back, and gRPC's own failures in our words. Over a real connection: test_channel.py."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from mempool import errors
from mempool.errors import ErrorCode, MempoolError
from mempool.wire.status import DETAIL_KEY, from_rpc_error, to_status
from mempool.wire.v1 import error_pb2


def leaves(cls: type[MempoolError] = MempoolError) -> list[type[MempoolError]]:
    """All classes that have a code of their own."""
    found = [cls] if "code" in vars(cls) and cls is not MempoolError else []
    return found + [leaf for child in cls.__subclasses__() for leaf in leaves(child)]


def over_the_wire(error: BaseException) -> AioRpcError:
    code, message, trailing = to_status(error)
    return AioRpcError(code, Metadata(), Metadata(*trailing), message)


def foreign(code: grpc.StatusCode, details: str = "") -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), details)


def test_the_proto_has_the_same_codes() -> None:
    proto = {name.removeprefix("ERROR_CODE_"): number for name, number in error_pb2.ErrorCode.items() if number}
    assert proto == {code.name: code.value for code in ErrorCode}


def test_every_code_has_its_class() -> None:
    assert {leaf.code for leaf in leaves()} == set(ErrorCode)


@pytest.mark.parametrize("cls", leaves())
def test_errors_come_back_as_they_were(cls: type[MempoolError]) -> None:
    error = cls("what happened – with ü and 値", shard=0, address="10.0.0.3:7070")
    found = from_rpc_error(over_the_wire(error), shard=5, address="other:1")
    assert type(found) is cls
    assert (str(found), found.shard, found.address) == (str(error), 0, "10.0.0.3:7070")


def test_where_the_error_does_not_say_the_caller_does() -> None:
    found = from_rpc_error(over_the_wire(errors.DataLoss("gone")), shard=5, address="other:1")
    assert (found.shard, found.address) == (5, "other:1")


def test_when_to_try_again_travels_too() -> None:
    found = from_rpc_error(over_the_wire(errors.Overloaded("full", retry_after_s=0.25)), shard=5)
    assert isinstance(found, errors.Overloaded)
    assert (found.retry_after_s, found.retryable, found.shard) == (0.25, True, 5)
    assert over_the_wire(errors.Overloaded("full")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_long_messages_are_cut_to_fit_into_metadata() -> None:
    code, message, trailing = to_status(errors.InvalidRequest("値" * 5000))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(message.encode()) <= 512
    assert len(trailing[0][1]) <= 2100
    found = from_rpc_error(over_the_wire(errors.InvalidRequest("値" * 5000)))
    assert str(found).startswith("値" * 600)
    assert str(found).endswith("...")


def test_what_is_not_ours_is_internal_with_its_text() -> None:
    found = from_rpc_error(over_the_wire(KeyError("slot")))
    assert type(found) is errors.Internal
    assert "KeyError: 'slot'" in str(found)
    assert type(from_rpc_error(over_the_wire(TimeoutError()))) is errors.DeadlineExceeded


Sizes = "Received message larger than max (5242880 vs. 4194304)"


@pytest.mark.parametrize(
    ("code", "details", "shard", "cls", "message"),
    [
        (
            "UNAVAILABLE",
            "refused",
            3,
            errors.ShardUnavailable,
            r"shard 3 at h:1 does not answer \(UNAVAILABLE: refused\)",
        ),
        ("UNAVAILABLE", "refused", None, errors.PoolUnreachable, "the pool at h:1 does not answer"),
        (
            "UNAVAILABLE",
            "DNS resolution failed for h:1: C-ares status is not ARES_SUCCESS: Domain name not found",
            None,
            errors.PoolUnreachable,
            r"the pool at h:1 does not answer \(no host of that name is known\)",
        ),
        ("CANCELLED", "Channel closed", 3, errors.ShardUnavailable, "does not answer"),
        ("CANCELLED", "", 3, errors.ShardUnavailable, "ended the call before answering"),
        ("INTERNAL", "Received RST_STREAM with error code 2", 3, errors.ShardUnavailable, "RST_STREAM"),
        ("UNKNOWN", "Stream removed", 3, errors.ShardUnavailable, "Stream removed"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", 3, errors.DeadlineExceeded, "did not answer in time"),
        ("RESOURCE_EXHAUSTED", Sizes, 3, errors.RequestTooLarge, r"5,242,880 bytes; 4,194,304 are accepted"),
        ("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!", 3, errors.ShardUnavailable, "Concurrent"),
        ("UNAUTHENTICATED", "no token", 3, errors.Unauthenticated, "does not accept the token"),
        ("PERMISSION_DENIED", "", 3, errors.Unauthenticated, "does not accept the token"),
        ("UNIMPLEMENTED", "Method not found!", 3, errors.Internal, "another version of mempool, or is no mempool"),
        ("INVALID_ARGUMENT", "bad", 3, errors.InvalidRequest, "bad"),
        ("NOT_FOUND", "", 3, errors.NotFound, "NOT_FOUND"),
        ("DATA_LOSS", "", 3, errors.DataLoss, "DATA_LOSS"),
        ("UNKNOWN", "Unexpected <class 'ValueError'>", 3, errors.Internal, "ValueError"),
    ],
)
def test_grpcs_own_failures_are_told_in_our_words(
    code: str, details: str, shard: int | None, cls: type[MempoolError], message: str
) -> None:
    found = from_rpc_error(foreign(grpc.StatusCode[code], details), shard=shard, address="h:1")
    assert type(found) is cls
    assert (found.shard, found.address) == (shard, "h:1")
    if isinstance(found, errors.Unavailable):
        assert found.refused == ("Domain name" in details)
    with pytest.raises(cls, match=message):
        raise found


@pytest.mark.parametrize("detail", [b"\xff\xff", error_pb2.ErrorDetail(message="from tomorrow").SerializeToString()])
def test_a_detail_that_cannot_be_read_is_passed_over(detail: bytes) -> None:
    error = AioRpcError(grpc.StatusCode.NOT_FOUND, Metadata(), Metadata((DETAIL_KEY, detail)), "no table")
    assert type(from_rpc_error(error, shard=1, address="h:1")) is errors.NotFound
