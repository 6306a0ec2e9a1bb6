"""Which pool a command means: an option, a cluster file, MEMPOOL_ADDRESS, or the only one that was started here.

Loads no Ray and no torch.
"""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mempool.cli.outcome import UsageError
from mempool.client.transport.addresses import addresses_of
from mempool.config import ClusterConfig, TlsConfig, load
from mempool.errors import InvalidRequest, NotFound, PoolUnreachable
from mempool.rayhost import PoolRecord, read_record, read_records
from mempool.types import PoolStatus

if TYPE_CHECKING:
    from mempool.client import Pool
    from mempool.wire.channels.tls import ClientTls

ADDRESS_VARIABLE = "MEMPOOL_ADDRESS"
DEFAULT_ADDRESS = "localhost:7077"

_ANYWHERE = ("0.0.0.0", "::")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ANSWER_TIMEOUT_S = 5.0
_KNOCK_TIMEOUT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A pool.

    Attributes:
        address: Where it is, or several with commas.
        token: Its token; None is that of MEMPOOL_TOKEN, if set.
        tls_files: How its connections are encrypted; None: as MEMPOOL_TLS_AUTHORITY says, if set.
        config: Of the file, where one was given.
        name: Its name where a file, an option or a record says it; None where only the address is known.
        guessed: Nothing named it: the address is where a pool would be by default.
    """

    address: str
    token: str | None = None
    tls_files: TlsConfig | None = None
    config: ClusterConfig | None = None
    name: str | None = None
    guessed: bool = False

    @property
    def tls(self) -> "ClientTls | None":
        """How its servers are known. Raises ConfigError where the authority's file cannot be read."""
        from mempool.rayhost.keys import client_tls_of

        return client_tls_of(self.tls_files)

    def status(self) -> PoolStatus:
        """Ask it. Raises PoolUnreachable, with what to do."""
        from mempool.client.opening.asking import pool_status  # gRPC: what is wrong with a file shows without it

        # Where only the default stands for the address, nobody there is the usual case, not one that passes.
        timeout_s = 0.0 if self.guessed else _ANSWER_TIMEOUT_S
        try:
            return pool_status(parts(self.address), token=self.token, tls=self.tls, timeout_s=timeout_s)
        except PoolUnreachable as error:
            raise PoolUnreachable(f"{error.message}. {self._advice()}", address=error.address) from None

    def _advice(self) -> str:
        if self.guessed:
            return "No pool was started on this machine: start one with `mempool up -f FILE`, or give its --address"
        if self.name is not None and read_record(self.name) is not None:
            return f"If pool {self.name!r} is gone: `mempool down --pool {self.name}`, then `mempool up -f FILE`"
        return "Is it up, and the address right? Start one: `mempool up -f FILE`"


def find_target(file: Path | None = None, pool: str | None = None, address: str | None = None) -> Target:
    """The pool that these options mean; where there are none, MEMPOOL_ADDRESS, or the only pool that runs.

    Args:
        file: A cluster file: the pool of its name.
        pool: The name of a pool that was started on this machine.
        address: "host:port", or several with commas; goes before all else, and the file then gives only the token.

    Raises:
        ConfigError: The file is wrong.
        UsageError: The options do not fit together, the address is none, or several pools run.
        NotFound: No pool of that name was started here.
        PoolUnreachable: Several were started here, and none answers.
    """
    config = None if file is None else load(file)
    if config is not None and pool not in (None, config.pool.name):
        raise UsageError(f"--pool {pool} is not the pool of {file}, which is {config.pool.name!r}; give one of them")
    if address is not None:
        if pool is not None:
            raise UsageError("--pool and --address both name a pool; give one of them")
        parts(address)
        if config is None:
            return Target(address=address)
        return Target(address=address, token=config.pool.token(), tls_files=config.pool.tls, config=config)
    if config is not None:
        return Target(
            address=_address_of(config),
            token=config.pool.token(),
            tls_files=config.pool.tls,
            config=config,
            name=config.pool.name,
        )
    if pool is not None:
        return _recorded(pool)
    if address := os.environ.get(ADDRESS_VARIABLE):
        parts(address)
        return Target(address=address)
    return _only(read_records())


def connected(target: Target, *, timeout_s: float) -> "Pool":
    """A client of a target's pool. Loads torch. Raises PoolUnreachable, in the command's own words, and soon."""
    target.status()
    from mempool.client import connect

    return connect(target.address, token=target.token, tls=target.tls, timeout_s=timeout_s)


def named(target: Target) -> str:
    """The name of a target's pool, asked of the pool where only its address is known. Raises PoolUnreachable."""
    if target.name is not None:
        return target.name
    here = [record.name for record in read_records() if _same_place(record.address, target.address)]
    if len(here) == 1:
        return here[0]
    if target.guessed:
        raise NotFound("no pool that `mempool up` started runs on this machine; name the one you mean with --pool NAME")
    return target.status().name


def parts(address: str) -> list[str]:
    """The addresses of a text with commas. Raises UsageError where one is not host:port."""
    try:
        return addresses_of(address)
    except InvalidRequest as error:
        raise UsageError(error.message) from None


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


def _recorded(pool: str) -> Target:
    record = read_record(pool)
    if record is None:
        known = ", ".join(record.name for record in read_records()) or "none"
        raise NotFound(f"no pool {pool!r} was started on this machine by `mempool up`; started here: {known}")
    return _of(record)


def _of(record: PoolRecord) -> Target:
    pool = record.config.pool
    return Target(address=record.address, token=pool.token(), tls_files=pool.tls, name=record.name)


def _only(records: list[PoolRecord]) -> Target:
    """The only pool that was started here, or the only one of them where somebody answers."""
    if not records:
        return Target(address=DEFAULT_ADDRESS, guessed=True)
    if len(records) == 1:
        return _of(records[0])
    with ThreadPoolExecutor(len(records)) as pool:
        running = [record for record, there in zip(records, pool.map(_knock, records), strict=True) if there]
    if len(running) == 1:
        return _of(running[0])
    listed = ", ".join(f"{record.name} ({record.address})" for record in running or records)
    if running:
        raise UsageError(f"several pools run on this machine; name one with --pool: {listed}")
    raise PoolUnreachable(
        f"several pools were started on this machine and none answers: {listed}. Name one with --pool"
    )


def _knock(record: PoolRecord) -> bool:
    """Whether anybody listens there; who it is shows when it is asked."""
    host, _, port = record.address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S):
            return True
    except OSError:
        return False


def _same_place(one: str, other: str) -> bool:
    hosts, ports = zip(*(address.strip().rpartition(":")[::2] for address in (one, other)), strict=True)
    return ports[0] == ports[1] and (hosts[0] == hosts[1] or all(host in _LOOPBACK for host in hosts))
