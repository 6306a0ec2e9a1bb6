"""``mempool.connect``: a ``Pool`` over gRPC. Composition only."""

import os
from pathlib import Path

from mempool.client.opening.connection import checked_timeout
from mempool.client.pool import Pool
from mempool.client.routing.tries import Tries
from mempool.client.routing.whereabouts import Whereabouts
from mempool.client.transport.addresses import addresses_of
from mempool.client.transport.pool import GrpcPool
from mempool.client.transport.shard import GrpcDialer
from mempool.config import TCP_LINES_VARIABLE, TOKEN_VARIABLE
from mempool.wire.channels import loop
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.line_channel import LineChannels
from mempool.wire.channels.tls import ClientTls, client_tls

# A controller that is being started again listens within seconds; where nobody does for longer, the address is wrong.
_REFUSED_S = 5.0
NEAR_VARIABLE = "MEMPOOL_SHARED_MEMORY"
"""Environment variable: "0" has calls go to a shard on this host as to one elsewhere."""
# Deadlines are kept on the loop; this only ends a wait for a loop that is stuck.
_STUCK_S = 30.0


def connect(
    address: str, *, token: str | None = None, tls: ClientTls | Path | str | None = None, timeout_s: float = 30.0
) -> Pool:
    """Attach to a running pool.

    Args:
        address: "host:port" of the pool, or several with commas between: "a:7077,b:7077". Addresses of shards do too;
            they answer while the controller is away. IPv6 addresses stand in brackets: "[::1]:7077".
        token: The pool's token; None takes the environment variable MEMPOOL_TOKEN, if set.
        tls: For a pool with encryption (pool.tls): the file with the certificate of the authority that signed its
            servers'. None takes the environment variable MEMPOOL_TLS_AUTHORITY, if set; else nothing is encrypted.
            MEMPOOL_TLS_SERVER_NAME is the name their certificates are for, where it is not their addresses.
        timeout_s: Deadline of each call, this one too, seconds, retries included. Where nobody listens at any address
            this one ends after 5 s.

    Raises:
        InvalidRequest: An address is not "host:port", timeout_s is not above 0, or tls is no certificate.
        PoolUnreachable: No address answered within timeout_s.
        Unauthenticated: The token is missing or wrong.

    Example:
        >>> with mempool.connect("localhost:7077") as pool:
        ...     print(pool.tables())
    """
    addresses = addresses_of(address)
    timeout_s = checked_timeout(timeout_s)
    token = os.environ.get(TOKEN_VARIABLE) or None if token is None else token
    channels = GrpcChannels(token=token, tls=client_tls(tls))
    near, tcp = (os.environ.get(name, "1") != "0" for name in (NEAR_VARIABLE, TCP_LINES_VARIABLE))
    api, dialer = GrpcPool(addresses, channels), GrpcDialer(LineChannels(grpc=channels, near=near, tcp=tcp))
    name = loop.run(_name_of(api, timeout_s=timeout_s), timeout_s=timeout_s + _STUCK_S)
    return Pool(
        api,
        dialer.dial,
        name=name or address,
        timeout_s=timeout_s,
        on_close=dialer.close,
        dial_at_once=dialer.dial_at_once,
        address=address,
    )


async def _name_of(api: GrpcPool, *, timeout_s: float) -> str:
    try:
        status = await Tries(Whereabouts(), timeout_s=timeout_s).run("status", api.status, refused_s=_REFUSED_S)
    except BaseException:
        await api.close()
        raise
    return status.name
