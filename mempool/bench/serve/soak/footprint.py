"""What a process takes of the system, as Linux tells in /proc; and how fast a figure grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import sub
from pathlib import Path
from typing import Any

_MIB = 2**20
_SHARED = "/memfd:mempool"


@dataclass(frozen=True)
class Footprint:
    """Of one process.

    Attributes:
        resident_mib: Memory that is there now, of all kinds.
        own_mib: The same less files and what is shared with clients.
        descriptors: Open files and sockets.
        threads: How many.
        mappings: Ranges of its address space.
        shared_mappings: Of these, memory that it has together with a client.
    """

    resident_mib: float
    own_mib: float
    descriptors: int
    threads: int
    mappings: int
    shared_mappings: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Now. Raises OSError where there is no such process, or no /proc."""
        process = Path(f"/proc/{pid}")
        status = (process / "status").read_text()
        maps = (process / "maps").read_text().splitlines()
        return cls(
            resident_mib=_number(status, "VmRSS") * 1024 / _MIB,
            own_mib=_number(status, "RssAnon") * 1024 / _MIB,
            descriptors=len(list((process / "fd").iterdir())),
            threads=_number(status, "Threads"),
            mappings=len(maps),
            shared_mappings=sum(_SHARED in line for line in maps),
        )

    def most(self, other: Footprint) -> Footprint:
        """The larger of each figure."""
        return self._with(other, max)

    def less(self, other: Footprint) -> Footprint:
        """The difference of each figure."""
        return self._with(other, sub)

    def _with(self, other: Footprint, both: Callable[[Any, Any], Any]) -> Footprint:
        return Footprint(**{one.name: both(getattr(self, one.name), getattr(other, one.name)) for one in fields(self)})

    def __str__(self) -> str:
        return (
            f"{self.resident_mib:.1f} MiB ({self.own_mib:.1f} of its own), {self.descriptors} descriptors, "
            f"{self.threads} threads, {self.mappings} mappings ({self.shared_mappings} shared with clients)"
        )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line that is closest to points (x, y), by least squares; 0 of fewer than two different x."""
    if not points:
        return 0.0
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0


def _number(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0
