"""Which pool a command means: an option, a cluster file, MEMPOOL_ADDRESS, or localhost:7077."""

import os
from dataclasses import dataclass
from pathlib import Path

from mempool.cli.outcome import UsageError
from mempool.config import ClusterConfig, load
from mempool.rayhost import read_record

ADDRESS_VARIABLE = "MEMPOOL_ADDRESS"
DEFAULT_ADDRESS = "localhost:7077"

_ANYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A pool. token None: that of MEMPOOL_TOKEN, if set. config: of the file, where one was given."""

    address: str
    token: str | None
    config: ClusterConfig | None


def find_target(file: Path | None, address: str | None) -> Target:
    """The pool that these options mean; the first that says so of: address, file, environment, default.

    Raises:
        ConfigError: The file is wrong.
        UsageError: The address is none, or the file says no port and the pool was not started on this machine.
    """
    config = None if file is None else load(file)
    if address is None:
        address = os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS if config is None else _address_of(config)
    for part in address.split(","):
        host, _, port = part.strip().rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise UsageError(f"address {part.strip()!r} is not host:port, as in {DEFAULT_ADDRESS!r}")
    return Target(address=address, token=None if config is None else config.pool.token(), config=config)


def _address_of(config: ClusterConfig) -> str:
    """Where `up` of this machine put the pool; else where the file puts it."""
    record = read_record(config.pool.name)
    if record is not None:
        return record.address
    pool = config.pool
    if not pool.port:
        raise UsageError(
            f"pool.port of {pool.name!r} is 0 and the pool was not started on this machine: give its --address"
        )
    host = pool.advertise or ("localhost" if pool.bind in _ANYWHERE else pool.bind)
    return f"[{host}]:{pool.port}" if ":" in host else f"{host}:{pool.port}"
