"""`apply`: bring a running pool to what a file says, over the pool's own address. Never drops data; needs no Ray."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mempool.config import Changes, ClusterConfig, TableConfig, diff, resolve
from mempool.controller.moves.fitting import require_fit
from mempool.controller.moves.wanted import unfinished as as_wanted
from mempool.errors import InvalidRequest
from mempool.rayhost.state.records import read_record, write_record
from mempool.types import PoolStatus, RescaleProgress
from mempool.types.keys import is_key_table, key_table

if TYPE_CHECKING:
    from mempool.wire.channels.tls import ClientTls

_ANSWER_TIMEOUT_S = 15.0
_NAMED = 20
"""How many of a pool's tables are named."""
_TABLE_TIMEOUT_S = 3600.0  # initial values of a table of a hundred GiB take their time


def planned(config: ClusterConfig, status: PoolStatus) -> Changes:
    """What ``apply`` would do to a pool of this status.

    Settings of processes (``shard``, ``ray``, ports) are compared with what `up` was given, where it ran on this
    machine; shards and tables with what there is.
    """
    record = read_record(status.name)
    if record is None:
        old = config.model_copy(update={"pool": config.pool.model_copy(update={"name": status.name})})
    else:
        old = record.config
    return diff(
        old,
        config,
        live_tables=[view.schema for view in status.tables],
        live_shards=len(status.shards),
        unfinished=unfinished(status),
    )


def unfinished(status: PoolStatus) -> str:
    """What of a pool is not as it was asked to be, for people: a rescale stopped there. "" if nothing."""
    if status.unfinished:
        return status.unfinished
    shards = [shard.info.shard for shard in status.shards]
    return as_wanted(status.tables, shards, 0 if status.rescaling else status.wanted_shards)


def apply(
    config: ClusterConfig,
    *,
    address: str,
    token: str | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[RescaleProgress], None] | None = None,
) -> Changes:
    """Rescale and create tables as a file says; training and lookups go on meanwhile.

    Args:
        config: What the pool shall be.
        address: "host:port" of the pool.
        token: The pool's token.
        say: Told each step.
        progress: Called with each report of the rescale.

    Returns:
        What was done (``create``, shards) and what was left aside (``restart``, ``kept``).

    Raises:
        ConfigError: The file asks for what no living pool can follow; nothing was changed.
        InvalidRequest: A rescale is going on, or it does not fit; nothing was changed.
        DataLoss: A table has lost pages and the number of shards should change.
        PoolUnreachable: The pool does not answer.
    """
    from mempool.client import connect  # here, because it loads torch, and what only looks at plans needs none
    from mempool.rayhost.keys import client_tls_of

    tls = client_tls_of(config.pool.tls)
    with connect(address, token=token, tls=tls, timeout_s=_ANSWER_TIMEOUT_S) as pool:
        status = pool.status()
        changes = planned(config, status)
        changes.check()
        if changes.nothing:
            return changes
        if status.rescaling:
            raise InvalidRequest(
                f"pool {status.name!r} is on its way to {status.wanted_shards} shards; wait for it (see mempool "
                "status), then apply again"
            )
        schemas = [resolve(table) for table in changes.create]
        keys = (key_table(schema) for schema in schemas)
        require_fit(status, changes.shards_after, [*schemas, *(each for each in keys if each is not None)])
        if changes.rescale:
            before, after = changes.shards_before, changes.shards_after
            say(
                f"asking for {after} shards; there are {before}"
                if before != after
                else f"there are {after} shards, and pages are still to be moved to where they have them"
            )
            pool.rescale(changes.shards_after, progress=progress)
            _write_shards(status.name, changes.shards_after)
    create_tables(changes.create, address=address, token=token, tls=tls, say=say)
    return changes


def still_to_create(
    config: ClusterConfig,
    *,
    address: str,
    token: str | None,
    tls: "ClientTls | None",
    say: Callable[[str], None],
) -> tuple[TableConfig, ...]:
    """The tables of the file that a pool does not have which has come back from its storage; what it has is said."""
    from mempool.client.opening.asking import pool_status

    status = pool_status([address], token=token, tls=tls, timeout_s=_ANSWER_TIMEOUT_S)
    if not status.tables:
        return config.tables
    storage = config.shard.storage
    there = sorted(view.schema.name for view in status.tables if not is_key_table(view.schema))
    names = ", ".join(there[:_NAMED])
    more = f", and {len(there) - _NAMED:,} more" if len(there) > _NAMED else ""
    say(f"brought back from {'' if storage is None else storage.path}: {names}{more}")
    if lost := _lost_shards(status):
        say(
            f"shard {', '.join(map(str, lost))} lacks pages of tables that are there: no node that is up has a folder "
            "with them. `mempool status` names the tables, and what to restore"
        )
    changes = planned(config, status)
    if changes.rescale:
        say(
            f"it has {changes.shards_before} shards, as it had, and the file says {changes.shards_after}: `mempool "
            "apply -f FILE` rescales it"
        )
    for change in changes.refused:
        say(f"not as the file says: {change}; it stays as it was")
    return changes.create


def _lost_shards(status: PoolStatus) -> list[int]:
    """The shards that have lost pages of some table."""
    return [shard.info.shard for shard in status.shards if any(table.lost_pages for table in shard.tables)]


def create_tables(
    tables: tuple[TableConfig, ...],
    *,
    address: str,
    token: str | None,
    tls: "ClientTls | None",
    say: Callable[[str], None],
) -> None:
    """Create tables one after another. Raises MempoolError; those made before it stay."""
    if not tables:
        return
    from mempool.client import connect

    with connect(address, token=token, tls=tls, timeout_s=_TABLE_TIMEOUT_S) as pool:
        for table in tables:
            say(f"creating table {table.name!r}: {table.num_slots:,} x {table.value_dim} {table.dtype}")
            pool.create_table(table)


def _write_shards(name: str, shards: int) -> None:
    record = read_record(name)
    if record is not None:
        pool = record.config.pool.model_copy(update={"shards": shards})
        write_record(replace(record, config=record.config.model_copy(update={"pool": pool})))
