"""What a contender is: something that answers look-ups, or moves as many bytes, and the processes that do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from mempool.bench.gate import Check
from mempool.bench.serve.shapes import Pairs, TableSize, checked_sums


class Contender(Protocol):
    """One way to do a look-up.

    Attributes:
        name: In reports.
        pids: Of the processes that answer; none where this one does.
    """

    @property
    def name(self) -> str: ...

    @property
    def pids(self) -> Sequence[int]: ...

    def run(self, pairs: Pairs) -> object:
        """One look-up, from tensors to tensor; this is timed."""

    def check(self, pairs: Pairs) -> Check:
        """How far one look-up is from what it should be."""


@dataclass(frozen=True)
class LookUp:
    """A contender that answers sums.

    Attributes:
        table: What it holds.
        run: From pairs to sums [B, W] float32.
    """

    name: str
    table: TableSize
    run: Callable[[Pairs], Tensor]
    pids: Sequence[int] = field(default=())

    def named(self, name: str) -> LookUp:
        """The same by another name."""
        return replace(self, name=name)

    def check(self, pairs: Pairs) -> Check:
        return checked_sums(self.name, self.table, pairs, self.run(pairs))
