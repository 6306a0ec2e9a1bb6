"""Times of several contenders for one piece of work: interleaved rounds, on the CPU's clock or CUDA events."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

#: However long a case takes, so many rounds are made.
MIN_ROUNDS = 5
_WARM_UP_ROUNDS = 2
#: Where the fastest contender takes less, all run once untimed before each timed run: what the one before left in the
#: caches (a copy: written lines that must first go to memory) would else be a part of its time.
_SHORT_MS = 50.0
#: GPU clock cycles that the stream is kept busy for, so that the host has queued all of a contender's launches before
#: the first of them runs: what is timed is the device's work.
_LEAD_CYCLES = 2_000_000

Inputs = int
_Taken = TypeVar("_Taken")


def _nothing(_: Inputs) -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Attributes:
        name: "mempool", or the peer's.
        run: Does the work once on one of the case's sets of inputs, given by number; this is timed.
        before: What must be done before each run and is not timed (the forward pass of a backward).
    """

    name: str
    run: Callable[[Inputs], object]
    before: Callable[[Inputs], object] = field(default=_nothing)


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender, a round each."""

    rounds_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)

    def over(self, other: Times) -> float:
        """How many times longer this took than another: the median of the rounds' quotients.

        Both ran in the same rounds, so that a machine which is slow for a while is slow for both.
        """
        return statistics.median(mine / its for mine, its in zip(self.rounds_ms, other.rounds_ms, strict=True))

    def beyond(self, other: Times) -> float:
        """How many milliseconds longer this took than another: the median of the rounds' differences."""
        return statistics.median(mine - its for mine, its in zip(self.rounds_ms, other.rounds_ms, strict=True))

    def quantile_ms(self, share: float) -> float:
        """What so great a share of the rounds took at most: one of the times that were measured."""
        return quantile(self.rounds_ms, share)

    def figures(self) -> dict[str, float]:
        """As they stand in result files."""
        return {
            "median_ms": self.median_ms,
            "p95_ms": self.quantile_ms(0.95),
            "p99_ms": self.quantile_ms(0.99),
            "min_ms": self.min_ms,
            "max_ms": self.max_ms,
        }

    @property
    def min_ms(self) -> float:
        return min(self.rounds_ms)

    @property
    def max_ms(self) -> float:
        return max(self.rounds_ms)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least so great a share of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def interleaved(
    contenders: Sequence[Contender],
    *,
    num_inputs: int,
    rounds: int,
    budget_s: float = math.inf,
    device: torch.device | str = "cpu",
) -> dict[str, Times]:
    """Time contenders in rounds in which each is timed once, in an order that moves on by one every round.

    Where one of them is short, each runs once untimed before it is timed.

    Inputs are drawn anew for each run, never those of the run before: nobody finds his rows in a cache because his
    neighbour has just read them.

    Args:
        contenders: With different names.
        num_inputs: Sets of inputs there are.
        rounds: Rounds to time, after two that are not counted.
        budget_s: When this is spent, no round beyond MIN_ROUNDS is begun.
        device: Whose clock is read.

    Returns:
        Times by name.
    """
    clock = _cuda_ms if torch.device(device).type == "cuda" else _cpu_ms
    ways = {contender.name: contender for contender in contenders}
    warmed_ms: dict[str, float] = {}
    inputs, draw = 0, random.Random(0)

    def take(name: str, round_: int) -> float:
        nonlocal inputs
        contender, spent_ms = ways[name], 0.0
        for _ in range(2 if round_ < 0 or min(warmed_ms.values()) <= _SHORT_MS else 1):
            inputs = draw.choice([other for other in range(num_inputs) if other != inputs] or [0])
            contender.before(inputs)
            spent_ms = clock(contender, inputs)
        if round_ < 0:
            warmed_ms[name] = spent_ms
        return spent_ms

    with no_collection():
        found = in_rounds(list(ways), take, rounds=rounds, budget_s=budget_s)
    return {name: Times(tuple(rounds_ms)) for name, rounds_ms in found.items()}


def in_rounds(
    names: Sequence[str], take: Callable[[str, int], _Taken], *, rounds: int, budget_s: float = math.inf
) -> dict[str, list[_Taken]]:
    """Have each take a turn in each round, in an order that moves on by one every round.

    Args:
        names: Different ones.
        take: A turn of one, by name and round; rounds below 0 are not counted.
        rounds: As for ``interleaved``.
        budget_s: Likewise.

    Returns:
        What was taken in the rounds that count, by name.
    """
    found: dict[str, list[_Taken]] = {name: [] for name in names}
    begun = time.perf_counter()
    for round_ in range(-_WARM_UP_ROUNDS, rounds):
        if round_ >= MIN_ROUNDS and time.perf_counter() - begun > budget_s:
            break
        for turn in range(len(names)):
            name = names[(turn + round_) % len(names)]
            taken = take(name, round_)
            if round_ >= 0:
                found[name].append(taken)
    return found


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing that is timed is interrupted by Python's collection of cycles."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _cpu_ms(contender: Contender, inputs: Inputs) -> float:
    begun = time.perf_counter()
    contender.run(inputs)
    return (time.perf_counter() - begun) * 1e3


def _cuda_ms(contender: Contender, inputs: Inputs) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda._sleep(_LEAD_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    contender.run(inputs)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class Copy:
    """The machine's copy bandwidth: one tensor to another, both several times the last cache."""

    NAME = "copy"

    def __init__(self, num_bytes: int, device: torch.device | str) -> None:
        self._source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._target = torch.ones_like(self._source)
        #: Bytes that one copy reads and writes.
        self.num_bytes = 2 * num_bytes
        self.contender = Contender(self.NAME, lambda _: self._target.copy_(self._source))


class Product:
    """The machine's speed in float32 products: a square one of torch, without TF32."""

    NAME = "matmul"

    def __init__(self, size: int, device: torch.device | str) -> None:
        self._left = torch.randn(size, size, device=device)
        self._out = torch.empty_like(self._left)
        self.num_flops = 2 * size**3
        self.contender = Contender(self.NAME, lambda _: torch.mm(self._left, self._left, out=self._out))
