"""Dead slots that begin anew from used ones: which, from which, and the writes that do it.

All is drawn from a seed, so that whoever was cut off, and says the same again, writes the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mempool.client.counts import as_count, as_number
from mempool.client.rows import Rows
from mempool.errors import InvalidRequest, StepConflict
from mempool.types.usage import Usage

USES = "values.uses"
_SLOTS_AT_ONCE = 2**20
"""Whose counts are here together."""
_ROWS_BYTES = 16 * 2**20
"""Of rows that are on their way together."""
_MOST_NOISE = 1e37


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reinitialised:
    """Slots that began anew. slots, from_: [M] int64, the slots, and whose rows they have taken."""

    slots: Tensor
    from_: Tensor


def drawn(
    rows: Rows, usage: Usage, *, table: str, slots: Tensor | None, from_: Tensor | None, generator: torch.Generator
) -> Reinitialised:
    """The slots that are to begin anew, all dead ones where None, and slots to take rows from, drawn by their counts
    where None: any that is used and does not begin anew.

    Args:
        rows: Reads counts.
        usage: Of the table, asked just now.

    Raises:
        InvalidRequest: No slot was used.
        StepConflict: Slots were used meanwhile.
    """
    own = torch.empty(0, dtype=torch.int64, device="cpu") if slots is None else slots
    weight = usage.uses - int(rows.read(USES, own).sum())
    count = usage.dead if slots is None else own.shape[0]
    if from_ is None and count and weight <= 0:
        raise InvalidRequest(
            f"table {table!r}: no slot was used yet but those that are to begin anew: there is none to take rows from. "
            "Train first, or name some: from_=[...]. Nothing was changed."
        )
    draws = torch.empty(0, dtype=torch.int64, device="cpu")
    if from_ is None and count:
        numbers = torch.rand(count, dtype=torch.float64, device="cpu", generator=generator) * weight
        draws = numbers.to(torch.int64).clamp_(max=weight - 1).sort().values
    dead: list[Tensor] = []
    found: list[Tensor] = []
    passed = 0
    for ids, uses in _counts(rows, usage.num_slots) if slots is None or draws.numel() else ():
        if slots is None:
            dead.append(ids[uses == 0])
        else:
            uses = torch.where(torch.isin(ids, own), 0, uses)
        ends = uses.cumsum(0) + passed
        here = draws[(draws >= passed) & (draws < int(ends[-1]))]
        found.append(ids[torch.searchsorted(ends, here, right=True)])
        passed = int(ends[-1])
    wanted = torch.cat(dead) if slots is None else own
    given = (torch.cat(found) if found else draws) if from_ is None else from_
    if wanted.shape[0] != count or (from_ is None and (given.shape[0] != count or (count and passed != weight))):
        raise StepConflict(
            f"table {table!r}: slots were used while their counts were read: {usage.dead:,} were dead, and then "
            f"{wanted.shape[0]:,}. Do it again while nobody trains. Nothing was changed."
        )
    if from_ is None:  # they ascend, as draws do, and are to be anybody's
        given = given[torch.randperm(count, dtype=torch.int64, device="cpu", generator=generator)]
    return Reinitialised(slots=wanted, from_=given)


def _counts(rows: Rows, num_slots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All slots and how often each was used, ascending, some at a time."""
    for first in range(0, num_slots, _SLOTS_AT_ONCE):
        ids = torch.arange(first, min(first + _SLOTS_AT_ONCE, num_slots), dtype=torch.int64, device="cpu")
        yield ids, rows.read(USES, ids)[:, 0]


def require_free(rows: Rows, width: int) -> None:
    """Ask all owners whether slots may begin anew. Raises StepConflict where a step is undecided."""
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    rows.write("values", nothing, torch.empty(0, width, dtype=torch.float32, device="cpu"), fresh=True)


def copied(
    rows: Rows, array: str, width: int, chosen: Reinitialised, *, noise: float, generator: torch.Generator
) -> None:
    """Give slots the rows of an array that others have, with noise of that standard deviation. Of values all that
    training has left beside them begins anew, too."""
    size = max(1, _ROWS_BYTES // (4 * width))
    for slots, from_ in zip(torch.split(chosen.slots, size), torch.split(chosen.from_, size), strict=True):
        taken = rows.read(array, from_).float()
        if noise:
            taken += noise * torch.randn(taken.shape, dtype=torch.float32, device="cpu", generator=generator)
        rows.write(array, slots, taken, fresh=array == "values")


def checked_pairs(slots: Tensor | None, from_: Tensor | None, *, table: str) -> None:
    """Raises InvalidRequest where slots and those that they take rows from do not go together."""
    if from_ is None:
        return
    if slots is None:
        raise InvalidRequest(
            f"table {table!r}: from_ names {from_.shape[0]:,} slots, and slots does not say which take their rows; "
            "give both, or neither. Nothing was changed."
        )
    if slots.shape != from_.shape:
        raise InvalidRequest(
            f"table {table!r}: from_ names {from_.shape[0]:,} slots for {slots.shape[0]:,} in slots; give one for "
            "each. Nothing was changed."
        )
    both = slots[torch.isin(slots, from_)]
    if both.numel():
        raise InvalidRequest(
            f"table {table!r}: slot {int(both[0])} is in slots and in from_: it cannot begin anew and be what another "
            "one begins with. Nothing was changed."
        )


def require_dead(rows: Rows, slots: Tensor, *, table: str) -> None:
    """Raises InvalidRequest for the first slot that was used."""
    uses = rows.read(USES, slots)[:, 0]
    used = torch.nonzero(uses)
    if used.numel():
        first = int(used[0])
        raise InvalidRequest(
            f"table {table!r}: slot {int(slots[first])} was used {int(uses[first]):,} times, and {used.shape[0]:,} of "
            f"{slots.shape[0]:,} slots were; what they have learned would be lost. Leave them out, or say force=True. "
            "Nothing was changed."
        )


def checked_noise(noise: float, *, table: str) -> float:
    """A standard deviation. Raises InvalidRequest for what is none."""
    number = as_number(noise)
    if not 0.0 <= number <= _MOST_NOISE:
        raise InvalidRequest(
            f"table {table!r}: noise = {noise!r} must be the standard deviation of what is added, a number of at least "
            f"0, and at most {_MOST_NOISE:g}, which float32 can hold some times over. Nothing was changed."
        )
    return number


def checked_seed(seed: int, *, table: str) -> int:
    """A seed. Raises InvalidRequest for what is none."""
    number = as_count(seed)
    if number is None or not 0 <= number < 2**63:
        raise InvalidRequest(
            f"table {table!r}: seed = {seed!r} must be a whole number, 0 to 2^63 - 1. Nothing was changed."
        )
    return number
