"""How large numbers, names and lists of a request may be, and how large its answer.

All is checked in one pass, before any work. Leaves tensors to ``validate``.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from mempool.agreement.ledger import MAX_ENTRIES, generations
from mempool.agreement.writes import MAX_OPEN
from mempool.errors import InvalidRequest, RequestTooLarge
from mempool.shard.steps.budget import MIB
from mempool.types import (
    AttachTable,
    CommitPart,
    CommitRequest,
    DiscardRequest,
    Ledger,
    LedgerEntry,
    PreparePart,
    PrepareRequest,
    ShardInfo,
    StepId,
    WriteId,
)

MAX_NAME_BYTES = 256
"""Of a group's name. Shards keep it with everything the group holds, and in every ledger."""
MAX_SEQUENCES = 65_536
"""Updates of one step."""
MAX_PARTS = 1_000
"""Tables of one step: a message has no more than 1,024 fields."""
MAX_DISCARDED = 1_000
"""Steps that one Discard drops."""
MAX_TOKEN_BYTES = 64
MAX_LOOKUPS = 4096
"""That an update may be of: of so many messages one gather is made."""
MAX_RELEASED = 65_536
"""Lookups that one gather releases."""
MAX_FREEZE_S = 3600.0
_MOST_CONFIRMED = 8
"""Tables that are made by one word, beside the one that it is about."""
_MAX_RANK = 2**32 - 1
_MAX_NUMBER = 2**53 - 1  # steps, sequences: every client's language can hold them
MAX_LOOKUP_ID = _MAX_WRITER = 2**64 - 1
_SHOWN = 64


def shown(text: str) -> str:
    """A name from outside, as messages show it."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def shown_numbers(numbers: Sequence[int]) -> str:
    """A list of numbers from outside, as messages show it."""
    return f"({', '.join(map(str, numbers[:8]))}{', ...' if len(numbers) > 8 else ''})"


def check_number(what: str, number: int, most: int = _MAX_NUMBER) -> None:
    """Raises InvalidRequest for one that is negative or larger than ``most``."""
    if not 0 <= number <= most:
        raise InvalidRequest(
            f"{what} = {number} must not be negative, nor above {most}: it is out of range. Nothing was changed."
        )


def check_lookup_id(number: int) -> None:
    """Raises InvalidRequest for one that is no 64-bit number."""
    if not 0 <= number <= MAX_LOOKUP_ID:
        check_number("lookup_id", number, MAX_LOOKUP_ID)


def check_lookups(count: int) -> None:
    """Raises InvalidRequest for an update of more lookups than one gather is cut into."""
    check_number("lookups", count, MAX_LOOKUPS)


def check_released(lookup_ids: Sequence[int]) -> None:
    """Raises InvalidRequest where one gather releases too many lookups."""
    if len(lookup_ids) > MAX_RELEASED:
        raise InvalidRequest(
            f"release names {len(lookup_ids):,} lookups; one gather releases at most {MAX_RELEASED:,}. Send the others "
            "with the next. Nothing was changed."
        )


def check_rank(group: str, rank: int) -> None:
    """Raises InvalidRequest for a group without or with a long name, or a number out of range."""
    size = len(group.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= MAX_NAME_BYTES:
        raise InvalidRequest(
            f"the group's name {shown(group)} has {size:,} bytes; it must have 1 to {MAX_NAME_BYTES}. Nothing was "
            "changed."
        )
    check_number("rank", rank, _MAX_RANK)


def check_step(step_id: StepId, sequences: Sequence[int]) -> None:
    """Raises InvalidRequest as ``check_rank``, for a step or sequence out of range, and a sequence named twice."""
    check_rank(step_id.group, step_id.rank)
    if not (0 < step_id.step <= _MAX_NUMBER and 0 <= step_id.generation <= _MAX_NUMBER):  # each request passes this
        check_number("step", step_id.step)
        check_number("generation", step_id.generation)
        raise InvalidRequest("step = 0: steps are counted from 1, as 0 is none in a ledger. Nothing was changed.")
    if len(sequences) > MAX_SEQUENCES:
        raise InvalidRequest(
            f"step {step_id.step} names {len(sequences):,} sequences; a step has at most {MAX_SEQUENCES:,} updates. "
            "Commit more often. Nothing was changed."
        )
    if len(sequences) == 1 and 0 <= sequences[0] <= _MAX_NUMBER:
        return
    seen: set[int] = set()
    for sequence in sequences:
        check_number("sequence", sequence)
        if sequence in seen:
            raise InvalidRequest(f"sequence {sequence} is named twice in step {step_id.step}. Nothing was changed.")
        seen.add(sequence)


def check_write(write_id: WriteId | None) -> None:
    """Raises InvalidRequest for numbers out of range, and for open ones that do not ascend to its own, or are many."""
    if write_id is None:
        return
    check_number("writer", write_id.writer, _MAX_WRITER)
    check_number("a write's number", write_id.number)
    if write_id.writer == 0 or write_id.number == 0:
        raise InvalidRequest("writers, and the writes of each, are numbered from 1. Nothing was changed.")
    if len(write_id.open) > MAX_OPEN:
        raise InvalidRequest(
            f"write {write_id.number} names {len(write_id.open):,} open ones before it; a client has at most "
            f"{MAX_OPEN:,} under way. Nothing was changed."
        )
    if any(later <= earlier for earlier, later in pairwise((0, *write_id.open, write_id.number))):
        raise InvalidRequest(
            f"the open writes {shown_numbers(write_id.open)} before write {write_id.number} must ascend, from 1 to "
            "below it. Nothing was changed."
        )


def check_prepare(request: PrepareRequest) -> None:
    """Raises InvalidRequest for wrong parts or sequences, and for an order that no norm has."""
    _check_parts(request.parts)
    for part in request.parts:
        check_step(part.step_id, part.sequences)
    check_number("decider_table", request.decider_table, MAX_LOOKUP_ID)
    check_number("decider_step", request.decider_step)
    check_number("attempt", request.attempt)
    named = {part.envelope.table_id: part.step_id.step for part in request.parts}.get(request.decider_table)
    if request.decider_step == 0 or named not in (None, request.decider_step):
        raise InvalidRequest(
            f"decider_step = {request.decider_step} of table {request.decider_table} must be the step as that table "
            f"counts it{'' if named is None else f': {named}'}, 1 or more. Nothing was changed."
        )
    if not request.norm_order >= 0.0:
        raise InvalidRequest(
            f"norm_order = {request.norm_order} must be above 0 (infinity for the largest element), or 0 for none. "
            "Nothing was changed."
        )


def check_commit(request: CommitRequest) -> None:
    """Raises InvalidRequest for wrong parts or sequences, and for a learning rate or scale that no step can have."""
    _check_parts(request.parts)
    for part in request.parts:
        check_step(part.step_id, part.sequences)
        check_number("version", part.version)
        if not math.isfinite(part.lr) or part.lr < 0:
            raise InvalidRequest(f"lr = {part.lr} must be a finite number, 0 or more. Nothing was changed.")
        if not math.isfinite(part.grad_scale):
            raise InvalidRequest(
                f"grad_scale = {part.grad_scale} must be finite; discard a step whose gradient overflowed. "
                "Nothing was changed."
            )


def check_discard(request: DiscardRequest) -> None:
    """Raises InvalidRequest for wrong steps."""
    if len(request.parts) > MAX_DISCARDED:
        raise InvalidRequest(
            f"Discard has {len(request.parts):,} parts; at most {MAX_DISCARDED:,} are taken. Nothing was changed."
        )
    check_number("attempt", request.attempt)
    for part in request.parts:
        check_step(part.step_id, ())


def _check_parts(parts: Sequence[PreparePart | CommitPart]) -> None:
    if not 1 <= len(parts) <= MAX_PARTS:
        raise InvalidRequest(f"a step has 1 to {MAX_PARTS:,} tables; {len(parts):,} were named. Nothing was changed.")
    tables = [part.envelope.table_id for part in parts]
    if len(set(tables)) < len(tables):
        raise InvalidRequest(f"a table is named twice in one step: {shown_numbers(tables)}. Nothing was changed.")
    sequences = sum(len(part.sequences) for part in parts)
    if sequences > MAX_SEQUENCES:
        raise InvalidRequest(
            f"a step names {sequences:,} sequences; its tables together have at most {MAX_SEQUENCES:,} updates. Commit "
            "more often. Nothing was changed."
        )


def check_freeze(timeout_s: float, *, token: str, lease_s: float) -> None:
    """Raises InvalidRequest for a time that nobody can wait, or a long token."""
    check_token(token)
    if not (math.isfinite(lease_s) and 0.0 <= lease_s <= MAX_FREEZE_S):
        raise InvalidRequest(
            f"lease_s = {lease_s} must be at least 0 (no end) and at most {MAX_FREEZE_S:g} s. Nothing was changed."
        )
    if not (math.isfinite(timeout_s) and 0.0 < timeout_s <= MAX_FREEZE_S):
        raise InvalidRequest(
            f"timeout_s = {timeout_s} must be above 0 and at most {MAX_FREEZE_S:g} seconds. Nothing was changed."
        )


def check_token(token: str) -> None:
    """Raises InvalidRequest for a long one."""
    if len(token.encode("utf-8", "surrogatepass")) > MAX_TOKEN_BYTES:
        raise InvalidRequest(f"the token {shown(token)} has more than {MAX_TOKEN_BYTES} bytes. Nothing was changed.")


def check_also(request: AttachTable) -> None:
    """Raises InvalidRequest where tables are named that are not to be confirmed, or too many."""
    if request.also and (request.mode != "confirm" or len(request.also) > _MOST_CONFIRMED):
        raise InvalidRequest(
            f"{len(request.also)} tables are named beside table {request.view.schema.name!r}, which is to be attached "
            f'("{request.mode}"): only "confirm" names others, at most {_MOST_CONFIRMED}. Nothing was changed.'
        )


def check_ledger(ledger: Ledger | None) -> None:
    """Raises InvalidRequest for a ledger that no shard of ours makes."""
    if ledger is None:
        return
    check_number("the ledger's version", ledger.version)
    check_number("the ledger's updates_applied", ledger.updates_applied)
    check_number("the ledger's step", ledger.version + ledger.step_offset)
    for (group, rank), newest in ledger.entries.items():
        check_rank(group, rank)
        for entry in generations(newest):
            _check_entry(entry)
    if len(ledger.entries) > MAX_ENTRIES:
        raise InvalidRequest(f"the ledger has {len(ledger.entries):,} entries; it may have {MAX_ENTRIES:,}")


def _check_entry(entry: LedgerEntry) -> None:
    check_number("a ledger entry's step", entry.step)
    check_number("a ledger entry's generation", entry.generation)
    check_number("a ledger entry's version", entry.version)
    check_number("a ledger entry's dropped", entry.dropped)
    if len(entry.others) > MAX_PARTS:
        raise InvalidRequest(f"a ledger entry names {len(entry.others):,} tables; a step has at most {MAX_PARTS:,}")


def fits_reply(num_bytes: int, limit_bytes: int | None) -> bool:
    """Whether ``check_reply`` accepts it."""
    return limit_bytes is None or num_bytes + _ENVELOPE_BYTES <= limit_bytes


def check_reply(num_bytes: int, limit_bytes: int | None, what: str | Callable[[], str]) -> None:
    """Refuse what would be answered by more than a message may have, before it is made.

    Args:
        num_bytes: Of the answer's tensors.
        limit_bytes: What a message may have (max_message_bytes); None: answers stay in this process.
        what: What is asked, for the message; a function is called where there is one.

    Raises:
        RequestTooLarge: It would be larger.
    """
    if limit_bytes is not None and not fits_reply(num_bytes, limit_bytes):
        raise RequestTooLarge(
            f"{what if isinstance(what, str) else what()} would be answered by {num_bytes:,} bytes; a message has at "
            f"most {limit_bytes:,} "
            "(max_message_bytes). Ask for fewer bags or rows at a time. Nothing was changed."
        )


_ENVELOPE_BYTES = 1024  # of an answer besides its tensors


def no_memory(info: ShardInfo, table: str, num_bytes: int, *, limit: int, taken: int) -> InvalidRequest:
    """The refusal of so many more bytes of pages of a table, where so many are taken of those that a shard may hold."""
    return InvalidRequest(
        f"{num_bytes / MIB:,.1f} MiB of pages of table {table!r} do not fit on shard {info.shard}: it may hold "
        f"{limit / MIB:,.1f} MiB and holds {taken / MIB:,.1f} MiB already. Give shards more memory (shard.memory in "
        "the config), use more shards (mempool scale), make the table smaller (num_slots, value_dim, "
        "dtype='bfloat16' or 'int8', an optimizer with less state), or drop a table. Nothing was changed.",
        shard=info.shard,
        address=info.address,
    )
