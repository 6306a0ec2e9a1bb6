"""Slots in groups, as hierarchical keys have them: sizes, defaults, and which row of a table of keys is whose. Pure."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_PROBES = 8

RowsT = TypeVar("RowsT", int, "Tensor")


@dataclass(frozen=True, slots=True)
class Grouping:
    """Slots ``g * size`` to ``(g + 1) * size`` are of group g; the last group may have fewer.

    In a table of keys the row of a group's key comes before those of its slots, so that wherever such a table is cut,
    the parts have groups and slots in the same ratio.
    """

    num_slots: int
    groups: int

    @property
    def size(self) -> int:
        """Slots of a group."""
        return -(-self.num_slots // self.groups)

    @property
    def pitch(self) -> int:
        """Rows from one group's to the next one's."""
        return self.size + 1

    @property
    def num_rows(self) -> int:
        return self.groups + self.num_slots

    def row_of(self, slot: RowsT) -> RowsT:
        """Of a slot, or of slots in a tensor."""
        return slot + slot // self.size + 1

    def fewest(self, probes: int) -> int:
        """Slots that so many groups have at least."""
        return (probes - 1) * self.size + self.num_slots - (self.groups - 1) * self.size


def group_count(num_slots: int, groups: int | None, probes: int | None) -> int:
    """Groups: those asked for, or where None about so many that scoring their keys takes as long as scoring the slots
    of ``probes`` groups, none of them empty."""
    if groups is not None:
        return groups
    wanted = max(1, round(math.sqrt((probes or _PROBES) * num_slots)))
    size = -(-num_slots // min(wanted, num_slots))
    return -(-num_slots // size)


def probe_count(groups: int, probes: int | None) -> int:
    """Groups that a query looks into: those asked for, or where None 8, or as many as there are."""
    return min(_PROBES, groups) if probes is None else probes


def groups_problem(num_slots: int, groups: int) -> str | None:
    """What is wrong with so many groups, to follow "groups = value "; None where nothing is."""
    size = -(-num_slots // min(groups, num_slots))
    fitting = -(-num_slots // size)
    if fitting == groups:
        return None
    fewer = f"{fitting:_} (of {size:_})"
    more = f" or {-(-num_slots // (size - 1)):_} (of {size - 1:_})" if size > 1 else ""
    return f"of equally many of {num_slots:_} slots leaves groups empty: give {fewer}{more}"


def topk_problem(grouping: Grouping, probes: int, topk: int) -> str | None:
    """What is wrong with so many slots of a query, to follow "topk = value, "; None where nothing is."""
    fewest = grouping.fewest(probes)
    if topk <= fewest:
        return None
    return (
        f"and the {probes} groups that a query picks (probes) may have no more than {fewest} slots: give more probes, "
        "fewer groups, or a smaller topk"
    )
