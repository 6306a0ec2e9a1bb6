"""``mempool.connect``: a ``Pool`` over gRPC. Composition only."""

import os

from mempool.client.pool import Pool
from mempool.client.routing.tries import Tries
from mempool.client.routing.whereabouts import Whereabouts
from mempool.client.transport.pool import GrpcPool
from mempool.client.transport.shard import GrpcDialer
from mempool.config import TOKEN_VARIABLE
from mempool.errors import InvalidRequest
from mempool.wire.channels import loop

# A controller that is being started again listens within seconds; where nobody does for longer, the address is wrong.
_REFUSED_S = 5.0
# Deadlines are kept on the loop; this only ends a wait for a loop that is stuck.
_STUCK_S = 30.0


def connect(address: str, *, token: str | None = None, timeout_s: float = 30.0) -> Pool:
    """Attach to a running pool.

    Args:
        address: "host:port" of the pool, or several with commas between: "a:7077,b:7077". Addresses of shards do too;
            they answer while the controller is away. IPv6 addresses stand in brackets: "[::1]:7077".
        token: The pool's token; None takes the environment variable MEMPOOL_TOKEN, if set.
        timeout_s: Deadline of each call, this one too, seconds, retries included. Where nobody listens at any address
            this one ends after 5 s.

    Raises:
        InvalidRequest: An address is not "host:port", or timeout_s is not above 0.
        PoolUnreachable: No address answered within timeout_s.
        Unauthenticated: The token is missing or wrong.

    Example:
        >>> with mempool.connect("localhost:7077") as pool:
        ...     print(pool.tables())
    """
    addresses = addresses_of(address)
    if not timeout_s > 0.0:
        raise InvalidRequest(f"timeout_s = {timeout_s}: must be above 0 seconds.")
    token = os.environ.get(TOKEN_VARIABLE) or None if token is None else token
    api, dialer = GrpcPool(addresses, token=token), GrpcDialer(token=token)
    name = loop.run(_name_of(api, timeout_s=timeout_s), timeout_s=timeout_s + _STUCK_S)
    return Pool(api, dialer.dial, name=name or address, timeout_s=timeout_s, on_close=dialer.close)


async def _name_of(api: GrpcPool, *, timeout_s: float) -> str:
    try:
        status = await Tries(Whereabouts(), timeout_s=timeout_s).run("status", api.status, refused_s=_REFUSED_S)
    except BaseException:
        await api.close()
        raise
    return status.name


def addresses_of(text: str) -> list[str]:
    """The addresses of "a:7077,b:7077".

    Raises:
        InvalidRequest: One is not "host:port"; the message says what it should be.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"address = {text!r} must be text, as in 'localhost:7077'.")
    return [_checked(part.strip()) for part in text.split(",")]


def _checked(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if separator:
        raise _wrong(address, f"there is no {scheme}:// before it; give {rest.strip('/')!r}")
    host, separator, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise _wrong(address, f"an IPv6 address stands in brackets; give '[{host}]:{port}'")
    if "/" in address or any(character.isspace() for character in address):
        raise _wrong(address, "a host and a port are all of it")
    if not separator or not port:
        known = host or port or "localhost"
        raise _wrong(address, f"the port is missing; a pool's is 7077 unless its file says otherwise: '{known}:7077'")
    if not host or host == "[]":
        raise _wrong(address, f"the host is missing; this machine is 'localhost:{port}'")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise _wrong(address, f"the port is {port!r}, must be a number from 1 to 65535")
    return address


def _wrong(address: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"address {address!r} is not host:port, as in 'localhost:7077': {why}.")
