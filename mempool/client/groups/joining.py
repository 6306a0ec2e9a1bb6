"""What a process joins as: checked where a user says it, found where a launcher has set it. Asks nobody."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from mempool.agreement.groups.bounds import MAX_RANKS
from mempool.client.counts import as_count, as_number
from mempool.errors import InvalidRequest
from mempool.types.groups.meeting import Terms

JOIN_VARIABLE = "MEMPOOL_JOIN"
"""Environment variable: "0" has each process that a launcher has started train by itself."""
PATIENCE_S = 1800.0
"""How long ranks that live are waited for, as torch.distributed does."""
_MAX_NAME_BYTES = 256
_MAX_STEP = 2**53 - 1
_CONSISTENCIES = ("sync", "async", "bounded")
_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """A rank of a group.

    Attributes:
        step: At which its model is, as its user says; None: not said.
        restart: How often its launcher has restarted it.
        patience_s: How long ranks that live are waited for.
        found: Nobody said so: a launcher has set it.
    """

    group: str
    rank: int
    terms: Terms
    step: int | None = None
    restart: int = 0
    patience_s: float = PATIENCE_S
    found: bool = False

    @property
    def host(self) -> str:
        """Where this process runs, for people."""
        return f"{socket.gethostname()[:200]}, pid {os.getpid()}"

    @property
    def launcher(self) -> str:
        """The process that has started this one: two jobs of one name have two."""
        return f"{socket.gethostname()[:200]}, pid {os.getppid()}"


def asked(
    group: object,
    rank: object,
    world_size: object,
    *,
    consistency: object,
    staleness: object,
    reduction: object,
    elastic: object,
    step: object,
    timeout_s: object,
) -> Joining:
    """What a user says, checked.

    Raises:
        InvalidRequest: Something of it is none; the message says what, and what it may be.
    """
    if not isinstance(group, str) or not 1 <= len(group.encode("utf-8", "surrogatepass")) <= _MAX_NAME_BYTES:
        raise InvalidRequest(f"group = {group!r:.80}: must be a name of 1 to {_MAX_NAME_BYTES} bytes.")
    world = as_count(world_size)
    if world is None or not 1 <= world <= MAX_RANKS:
        raise InvalidRequest(f"world_size = {world_size!r}: must be the number of ranks, 1 to {MAX_RANKS}.")
    number = as_count(rank)
    if number is None or not 0 <= number < world:
        raise InvalidRequest(f"rank = {rank!r}: must be 0 to {world - 1}, as world_size is {world}.")
    if consistency not in _CONSISTENCIES:
        raise InvalidRequest(f"consistency = {consistency!r}: must be one of {', '.join(map(repr, _CONSISTENCIES))}.")
    if reduction not in _REDUCTIONS:
        raise InvalidRequest(f"reduction = {reduction!r}: must be 'mean' or 'sum'.")
    bound = as_count(staleness)
    if bound is None or not 0 <= bound < 2**31:
        raise InvalidRequest(f"staleness = {staleness!r}: must be a number of steps, 0 or more.")
    if bound and consistency != "bounded":
        raise InvalidRequest(f"staleness = {bound} goes with consistency='bounded', not with {consistency!r}.")
    at = None if step is None else as_count(step)
    if step is not None and (at is None or not 0 <= at <= _MAX_STEP):
        raise InvalidRequest(f"step = {step!r}: must be the number of steps that the model has done, or None.")
    patience_s = as_number(timeout_s)
    if not 0.0 < patience_s <= 1e9:
        raise InvalidRequest(f"timeout_s = {timeout_s!r}: must be above 0 seconds, and at most 1e+09.")
    terms = Terms(
        world_size=world,
        consistency=consistency,  # type: ignore[arg-type]
        staleness=bound,
        reduction=reduction,  # type: ignore[arg-type]
        elastic=bool(elastic),
    )
    restart = _count(os.environ, "TORCHELASTIC_RESTART_COUNT") or 0
    return Joining(group=group, rank=number, terms=terms, step=at, patience_s=patience_s, restart=restart)


def found(environment: Mapping[str, str] | None = None) -> Joining | None:
    """What a launcher (torchrun, or one that sets what it sets) has made of this process; None: a process by itself."""
    environment = os.environ if environment is None else environment
    world, rank = _count(environment, "WORLD_SIZE"), _count(environment, "RANK")
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if environment.get(JOIN_VARIABLE) == "0" or not world or world == 1 or rank is None or not (address and port):
        return None
    if not rank < world <= MAX_RANKS:
        return None
    run = environment.get("TORCHELASTIC_RUN_ID", "none")
    place = f"{address}:{port}"
    if address == "localhost" or address.startswith("127.") or address == "::1":
        place = f"{socket.gethostname()[:200]}, {place}"  # each host's jobs have that one
    name = place if run in ("", "none") else run
    elastic = environment.get("TORCHELASTIC_MAX_RESTARTS") is not None and run not in ("", "none")
    return Joining(
        group=name[:_MAX_NAME_BYTES],
        rank=rank,
        terms=Terms(world_size=world, elastic=elastic),
        restart=_count(environment, "TORCHELASTIC_RESTART_COUNT") or 0,
        found=True,
    )


def _count(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else None
