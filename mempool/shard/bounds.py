"""How large numbers, names and lists of a request may be, and how large its answer.

All is checked in one pass, before any work. Leaves tensors to ``validate``.
"""

import math
from collections.abc import Sequence

from mempool.errors import InvalidRequest, RequestTooLarge
from mempool.shard.steps.ledger import MAX_ENTRIES
from mempool.types import CommitRequest, Ledger, PrepareRequest, StepId

MAX_NAME_BYTES = 256
"""Of a group's name. Shards keep it with everything the group holds, and in every ledger."""
MAX_SEQUENCES = 65_536
"""Updates of one step."""
MAX_LOOKUPS = 4096
"""That an update may be of: of so many messages one gather is made."""
MAX_RELEASED = 65_536
"""Lookups that one gather releases."""
MAX_FREEZE_S = 3600.0
_MAX_RANK = 2**32 - 1
_MAX_NUMBER = 2**53 - 1  # steps, sequences: every client's language can hold them
_MAX_LOOKUP_ID = 2**64 - 1
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
    check_number("lookup_id", number, _MAX_LOOKUP_ID)


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


def check_step(step_id: StepId, sequences: Sequence[int]) -> None:
    """Raises InvalidRequest for a group without or with a long name, numbers out of range, a sequence named twice."""
    size = len(step_id.group.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= MAX_NAME_BYTES:
        raise InvalidRequest(
            f"the group's name {shown(step_id.group)} has {size:,} bytes; it must have 1 to {MAX_NAME_BYTES}. Nothing "
            "was changed."
        )
    check_number("rank", step_id.rank, _MAX_RANK)
    check_number("step", step_id.step)
    if len(sequences) > MAX_SEQUENCES:
        raise InvalidRequest(
            f"step {step_id.step} names {len(sequences):,} sequences; a step has at most {MAX_SEQUENCES:,} updates. "
            "Commit more often. Nothing was changed."
        )
    seen: set[int] = set()
    for sequence in sequences:
        check_number("sequence", sequence)
        if sequence in seen:
            raise InvalidRequest(f"sequence {sequence} is named twice in step {step_id.step}. Nothing was changed.")
        seen.add(sequence)


def check_prepare(request: PrepareRequest) -> None:
    """Raises InvalidRequest for wrong sequences and for an order that no norm has."""
    check_step(request.step_id, request.sequences)
    if not request.norm_order >= 0.0:
        raise InvalidRequest(
            f"norm_order = {request.norm_order} must be above 0 (infinity for the largest element), or 0 for none. "
            "Nothing was changed."
        )


def check_commit(request: CommitRequest) -> None:
    """Raises InvalidRequest for wrong sequences and for a learning rate or scale that no step can have."""
    check_step(request.step_id, request.sequences)
    if not math.isfinite(request.lr) or request.lr < 0:
        raise InvalidRequest(f"lr = {request.lr} must be a finite number, 0 or more. Nothing was changed.")
    if not math.isfinite(request.grad_scale):
        raise InvalidRequest(
            f"grad_scale = {request.grad_scale} must be finite; discard a step whose gradient overflowed. "
            "Nothing was changed."
        )


def check_freeze(timeout_s: float) -> None:
    """Raises InvalidRequest for a time that nobody can wait."""
    if not (math.isfinite(timeout_s) and 0.0 < timeout_s <= MAX_FREEZE_S):
        raise InvalidRequest(
            f"timeout_s = {timeout_s} must be above 0 and at most {MAX_FREEZE_S:g} seconds. Nothing was changed."
        )


def check_ledger(ledger: Ledger | None) -> None:
    """Raises InvalidRequest for a ledger that no shard of ours makes."""
    if ledger is None:
        return
    check_number("the ledger's version", ledger.version)
    check_number("the ledger's updates_applied", ledger.updates_applied)
    check_number("the ledger's step", ledger.version + ledger.step_offset)
    for (group, rank), step in ledger.entries.items():
        check_step(StepId(group=group, rank=rank, step=step), ())
    if len(ledger.entries) > MAX_ENTRIES:
        raise InvalidRequest(f"the ledger has {len(ledger.entries):,} entries; it may have {MAX_ENTRIES:,}")


def check_reply(num_bytes: int, limit_bytes: int | None, what: str) -> None:
    """Refuse what would be answered by more than a message may have, before it is made.

    Args:
        num_bytes: Of the answer's tensors.
        limit_bytes: What a message may have (max_message_bytes); None: answers stay in this process.
        what: What is asked, for the message.

    Raises:
        RequestTooLarge: It would be larger.
    """
    if limit_bytes is not None and num_bytes + _ENVELOPE_BYTES > limit_bytes:
        raise RequestTooLarge(
            f"{what} would be answered by {num_bytes:,} bytes; a message has at most {limit_bytes:,} "
            "(max_message_bytes). Ask for fewer bags or rows at a time. Nothing was changed."
        )


_ENVELOPE_BYTES = 1024  # of an answer besides its tensors
