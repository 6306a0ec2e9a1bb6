"""``mempool.connect``: a ``Pool`` over gRPC. Composition only."""

import os
from pathlib import Path

from mempool.client.pool import Pool
from mempool.client.transport.pool import GrpcPool
from mempool.client.transport.shard import GrpcDialer
from mempool.config import TOKEN_VARIABLE
from mempool.errors import InvalidRequest
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.tls import ClientTls, client_tls


def connect(
    address: str, *, token: str | None = None, tls: ClientTls | Path | str | None = None, timeout_s: float = 30.0
) -> Pool:
    """Attach to a running pool.

    Args:
        address: "host:port" of the pool, or several with commas between: "a:7077,b:7077". Addresses of shards do too;
            they answer while the controller is away.
        token: The pool's token; None takes the environment variable MEMPOOL_TOKEN, if set.
        tls: For a pool with encryption (pool.tls): the file with the certificate of the authority that signed its
            servers'. None takes the environment variable MEMPOOL_TLS_AUTHORITY, if set; else nothing is encrypted.
        timeout_s: Deadline of each call, this one too, seconds, retries included.

    Raises:
        InvalidRequest: An address is not "host:port", or there is no certificate in that file.
        PoolUnreachable: No address answered within timeout_s.
        Unauthenticated: The token is missing or wrong.

    Example:
        >>> with mempool.connect("localhost:7077") as pool:
        ...     print(pool.tables())
    """
    addresses = [_checked(part.strip()) for part in address.split(",")]
    token = os.environ.get(TOKEN_VARIABLE) or None if token is None else token
    channels = GrpcChannels(token=token, tls=client_tls(tls))
    dialer = GrpcDialer(channels)
    front = GrpcPool(addresses, channels)
    pool = Pool(front, dialer.dial, name=address, timeout_s=timeout_s, on_close=dialer.close)
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
