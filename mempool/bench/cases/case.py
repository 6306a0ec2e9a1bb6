"""What a case is: one piece of work at one size, its contenders, what it cannot avoid to move, and its float64 gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mempool.bench.gate import Check
from mempool.bench.measuring import Contender

#: Name of mempool's own contender in every case.
OWN = "mempool"

FAMILIES = (
    "forward",
    "rows",
    "weight-gradient",
    "commit",
    "update",
    "experts",
    "experts-update",
    "product-topk",
    "product-gradient",
    "flat-topk",
)

#: Families whose limit is the speed of products; memory is the limit of the others.
KEY_FAMILIES = FAMILIES[7:]


@dataclass(frozen=True)
class Prepared:
    """A case with its tensors in memory.

    Attributes:
        contenders: mempool's own first.
        num_inputs: Sets of inputs that ``contenders`` run on.
        check: Runs every contender on the first set and compares it with float64.
        num_bytes: Bytes that the work cannot avoid to read and write.
        num_flops: Floating point operations of its products, 0 where memory is the limit.
        notes: What a reader of the result must know.
    """

    contenders: Sequence[Contender]
    num_inputs: int
    check: Callable[[], list[Check]]
    num_bytes: int
    num_flops: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One line of the report, before its tensors are made.

    Attributes:
        family: One of FAMILIES.
        what: Which work of the family ("adagrad", "bfloat16").
        num_slots: N, rows of the table; half-keys for product keys.
        value_dim: W, or the keys' dim.
        bag_size: Pairs in a bag, or K of a top-k; 0 for none.
        ids: "uniform" or "zipf".
        headline: Whether a stated goal is about it, and a quick run has it.
        prepare: Makes the tensors.
    """

    family: str
    what: str
    num_slots: int
    value_dim: int
    bag_size: int
    ids: str
    headline: bool
    prepare: Callable[[], Prepared] = field(repr=False)

    @property
    def of_keys(self) -> bool:
        """Whether keys are scored, so that products are the limit."""
        return self.family in KEY_FAMILIES

    @property
    def table_order(self) -> tuple[bool, int, int]:
        """Cases that compare equal by it can share a table."""
        return (self.of_keys, self.value_dim, self.num_slots)

    @property
    def name(self) -> str:
        parts = [self.family, self.what, f"{_power(self.num_slots)}x{self.value_dim}"]
        if self.bag_size:
            parts.append(f"top-{self.bag_size}" if self.of_keys else f"bags of {self.bag_size}")
        if self.ids != "uniform":
            parts.append(self.ids)
        return " ".join(parts)


def _power(number: int) -> str:
    power = number.bit_length() - 1
    return f"2^{power}" if number == 1 << power else str(number)
