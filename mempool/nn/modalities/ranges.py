"""Which slots of a shared table each modality sees: those reserved for it, and those that nobody reserved."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from mempool.client.keys.boxes import Range
from mempool.errors import InvalidRequest


def visible_ranges(
    modalities: Sequence[str], num_slots: int, reserved: Mapping[str, range] | None
) -> dict[str, tuple[Range, ...]]:
    """Of each modality the slots it may choose, ascending, ranges that touch each other as one.

    Args:
        modalities: All of them.
        num_slots: Slots of the table.
        reserved: Slots of one modality alone. None: none are.

    Raises:
        InvalidRequest: A reservation of an unknown modality, one that is no range of slots, is empty, leaves the table
            or overlaps another; or a modality is left without a slot.
    """
    if reserved is not None and not isinstance(reserved, Mapping):
        raise InvalidRequest(
            f"reserved = {reserved!r}: give a dict of modality to slots, as {{{modalities[0]!r}: range(0, 64)}}"
        )
    own = {name: _checked(name, slots, modalities, num_slots) for name, slots in (reserved or {}).items()}
    by_slot = sorted(own.items(), key=lambda item: item[1])
    for (name, before), (other, after) in pairwise(by_slot):
        if after[0] < before[1]:
            raise InvalidRequest(
                f"reserved slots overlap: {name!r} has {before[0]:_} to {before[1] - 1:_} and {other!r} {after[0]:_} to"
                f" {after[1] - 1:_}: a slot is of one modality, or of all that reserve none of it"
            )
    ends = [0, *(edge for _, slots in by_slot for edge in slots), num_slots]
    shared = list(zip(ends[::2], ends[1::2], strict=True))
    visible = {name: _merged(sorted([*shared, own[name]] if name in own else shared)) for name in modalities}
    if blind := [name for name, slots in visible.items() if not slots]:
        raise InvalidRequest(
            f"all {num_slots:_} slots are reserved, and none for modality {blind[0]!r}: reserve some for it, or leave"
            " some to all"
        )
    return visible


def count(ranges: Sequence[Range]) -> int:
    """Slots of ranges."""
    return sum(end - first for first, end in ranges)


def _checked(name: object, slots: object, modalities: Sequence[str], num_slots: int) -> Range:
    if name not in modalities:
        raise InvalidRequest(f"slots are reserved for modality {name!r}, and there are {', '.join(modalities)}")
    if not isinstance(slots, range) or slots.step != 1:
        raise InvalidRequest(f"reserved slots of {name!r} are {slots!r}: give a range(first, end) of slots")
    if not 0 <= slots.start < slots.stop <= num_slots:
        raise InvalidRequest(f"reserved slots of {name!r} are {slots!r}: give at least one, of 0 to {num_slots - 1:_}")
    return slots.start, slots.stop


def _merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    found: list[Range] = []
    for first, end in ranges:
        if first == end:
            continue
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], end)
        else:
            found.append((first, end))
    return tuple(found)
