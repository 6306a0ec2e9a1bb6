"""What a pool says of itself, asked of its address: for commands that only look. Loads no torch, unlike ``connect``."""

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mempool.config import TOKEN_VARIABLE
from mempool.errors import DeadlineExceeded, MempoolError, PoolUnreachable, Unavailable
from mempool.types import PoolStatus
from mempool.wire import methods
from mempool.wire.channels import loop
from mempool.wire.channels.channel import Channels
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.tls import ClientTls, client_tls

# How long one address may take; the controller itself gives its shards two seconds.
_ANSWER_S = 5.0
_PAUSE_S = 0.25
# The loop keeps the deadlines; this only ends a wait for a loop that is stuck.
_STUCK_S = 30.0

# gRPC's way of saying that there is no connection: the last part is the system's own word.
_NO_CONNECTION = re.compile(
    r"(failed to connect|lookup failed|DNS resolution failed).*: (?P<why>[^:()\[\]]+)[\])]", re.DOTALL
)

_REFUSED = re.compile(r"\((?P<why>[^()]+)\)$")


def pool_status(
    addresses: Sequence[str],
    *,
    token: str | None = None,
    tls: ClientTls | Path | str | None = None,
    timeout_s: float = 5.0,
) -> PoolStatus:
    """The status of a pool, from the first address that answers.

    Args:
        addresses: "host:port" of the pool or of its shards, at least one.
        token: The pool's token; None takes the environment variable MEMPOOL_TOKEN, if set.
        tls: As for ``connect``.
        timeout_s: How long to ask again where nobody answers: a controller that comes back takes seconds. 0 asks once.

    Raises:
        PoolUnreachable: Nobody answered; the message names each address once.
        Unauthenticated: The token is missing or wrong.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None if token is None else token
    asked = _asked(addresses, GrpcChannels(token=token, tls=client_tls(tls)), timeout_s=timeout_s)
    return loop.run(asked, timeout_s=timeout_s + _ANSWER_S * len(addresses) + _STUCK_S)


async def _asked(addresses: Sequence[str], make: Channels, *, timeout_s: float) -> PoolStatus:
    clock = asyncio.get_running_loop()
    deadline_s = clock.time() + timeout_s
    channels = {address: make(address) for address in addresses}
    try:
        while True:
            problems: dict[str, MempoolError] = {}
            for address, channel in channels.items():
                try:
                    return await channel.call(methods.GET_STATUS, None, timeout_s=_ANSWER_S)
                except (Unavailable, DeadlineExceeded) as error:
                    problems[address] = error
            if clock.time() + _PAUSE_S > deadline_s:
                said = ", ".join(f"{address} ({_reason(error)})" for address, error in problems.items())
                raise PoolUnreachable(f"no pool answers at {said}", address=addresses[0])
            await asyncio.sleep(_PAUSE_S)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels.values()))


def _reason(error: MempoolError) -> str:
    if isinstance(error, DeadlineExceeded):
        return f"nothing came within {_ANSWER_S:g} s"
    refused = isinstance(error, Unavailable) and error.refused
    found = (_REFUSED if refused else _NO_CONNECTION).search(error.message)
    return found["why"].strip() if found else error.message
