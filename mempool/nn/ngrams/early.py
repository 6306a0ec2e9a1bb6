"""Look-ups that were started before the call that wants their rows, and how that call finds its own again.

Legend: B batch, T tokens, S rows of a token, R real tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mempool.nn.ngrams.ahead import Ahead
from mempool.nn.ngrams.packing import Places
from mempool.types.bags import Bags

_MOST = 255
"""Prefetched and not taken, besides the newest: their answers are bounded by the table's."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Attributes:
    bags: Of one id each: distinct ones; or of all R * S, where nearly all are.
    order: [R * S]: which of the rows each is; None: as they come.
    """

    bags: Bags
    order: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Attributes:
    tokens: [B, T] int64 on the CPU, checked, 0 for padding.
    plain: Nothing but tokens was given: each row is one sequence.
    """

    tokens: Tensor
    places: Places
    plain: bool

    @property
    def num_real(self) -> int:
        """R."""
        return self.tokens.numel() if self.places.real is None else int(self.places.real.sum())

    def is_plainly(self, tokens: Tensor) -> bool:
        """Whether it is what tokens ask for that nothing says more of; False also where that is not told at a glance.

        Tokens that equal checked ones need no check, and no copy."""
        if not self.plain or tokens.dtype != torch.int64 or tokens.device.type != "cpu":
            return False
        mine = self.tokens
        if tokens.shape == mine.shape:
            return torch.equal(mine, tokens)
        same_rows = tokens.shape[-1:] == mine.shape[-1:] and tokens.numel() == mine.numel()
        return same_rows and torch.equal(mine, tokens.reshape(mine.shape))

    def is_as(self, other: "Batch") -> bool:
        """Whether both ask for the same."""
        mine, others = self.places, other.places
        same_real = mine.real is others.real or (
            mine.real is not None and others.real is not None and torch.equal(mine.real, others.real)
        )
        return same_real and torch.equal(self.tokens, other.tokens) and torch.equal(mine.positions, others.positions)


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """Attributes:
    commits: Of this client's steps, when it was asked for.
    asked: What is asked for, or will be, of this batch and those that were started with it.
    number: Of this one among them.
    last: All others of them were taken.
    """

    batch: Batch
    commits: int
    asked: Ahead[Sequence[Asked]]
    number: int
    last: bool = False

    def taken(self) -> Asked | None:
        """What was asked for; None where nobody did. What was not begun is done for the others, if there are any."""
        asked = self.asked.result() if self.last else self.asked.begun()
        return None if asked is None else asked[self.number]


class Early:
    """Of one lookup, what was started and not taken."""

    def __init__(self) -> None:
        self.started: list[Started] = []

    def keep(self, commits: int) -> None:
        """No more than what counts after so many steps, and is not too much."""
        self.started[:] = [each for each in self.started if each.commits == commits][-_MOST:]

    def add(self, batches: Sequence[Batch], commits: int, asked: Ahead[Sequence[Asked]]) -> None:
        self.started += [Started(batch, commits, asked, number) for number, batch in enumerate(batches)]

    def take(self, is_it: Callable[[Batch], bool]) -> Started | None:
        """The first such, once. Others may take theirs meanwhile."""
        for started in tuple(self.started):
            if is_it(started.batch):
                with suppress(ValueError):  # it was taken by another thread
                    self.started.remove(started)
                    last = all(other.asked is not started.asked for other in self.started)
                    return replace(started, last=last)
        return None

    def drop(self) -> None:
        for each in self.started:
            each.asked.cancel()
        self.started.clear()
