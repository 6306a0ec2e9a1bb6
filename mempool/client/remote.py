"""``mempool.connect``: a ``Pool`` over gRPC. Composition only."""

import os

from mempool.client.pool import Pool
from mempool.client.transport.pool import GrpcPool
from mempool.client.transport.shard import GrpcDialer
from mempool.config import TOKEN_VARIABLE
from mempool.errors import InvalidRequest


def connect(address: str, *, token: str | None = None, timeout_s: float = 30.0) -> Pool:
    """Attach to a running pool.

    Args:
        address: "host:port" of the pool, or several with commas between: "a:7077,b:7077". Addresses of shards do too;
            they answer while the controller is away.
        token: The pool's token; None takes the environment variable MEMPOOL_TOKEN, if set.
        timeout_s: Deadline of each call, this one too, seconds, retries included.

    Raises:
        InvalidRequest: An address is not "host:port".
        PoolUnreachable: No address answered within timeout_s.
        Unauthenticated: The token is missing or wrong.

    Example:
        >>> with mempool.connect("localhost:7077") as pool:
        ...     print(pool.tables())
    """
    addresses = [_checked(part.strip()) for part in address.split(",")]
    token = os.environ.get(TOKEN_VARIABLE) or None if token is None else token
    dialer = GrpcDialer(token=token)
    pool = Pool(GrpcPool(addresses, token=token), dialer.dial, name=address, timeout_s=timeout_s, on_close=dialer.close)
    try:
        pool.name = pool.router.pool = pool.status().name or address
    except BaseException:
        pool.close()
        raise
    return pool


def _checked(address: str) -> str:
    host, separator, port = address.rpartition(":")
    if not (separator and host and port.isdecimal() and 0 < int(port) < 65_536):
        raise InvalidRequest(f"address {address!r} is not host:port, as in 'localhost:7077'.")
    return address
