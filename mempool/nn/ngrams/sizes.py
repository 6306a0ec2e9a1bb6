"""Which n-grams there are, and how many slots each head of each has: what a table is made for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mempool.config import Adam, TableConfig
from mempool.errors import InvalidRequest
from mempool.nn.sizes import checked_int

LR_FACTOR = 5.0
"""Of the model's learning rate, for the rows, as in the paper."""

_MAX_SLOTS = 2**48
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""Enough for Miller and Rabin to be sure of every number of 64 bits."""


@dataclass(frozen=True)
class Ngrams:
    """Orders and heads of hashed n-grams, and a prime number of slots for each head of each order.

    Args:
        orders: How many tokens an n-gram has, ascending: (2, 3) are the last two and the last three.
        heads: Hashes of one n-gram, each with slots of its own: what collides in one does not in the others.
        slots: Of a head, at least: one number, or one for each order. Each gets the next prime that no other has.

    Attributes:
        primes: By order and head.
        num_slots: Of a table: the sum of the primes, that is what one must have.
        columns: Rows that a token has: orders times heads.

    Raises:
        InvalidRequest: A number that makes no sense.
    """

    orders: Sequence[int] = (2, 3)
    heads: int = 8
    slots: int | Sequence[int] = 100_000

    def __post_init__(self) -> None:
        orders = tuple(checked_int("orders", order) for order in _several("orders", self.orders))
        if not orders or list(orders) != sorted(set(orders)) or orders[-1] > 64:
            raise InvalidRequest(f"orders = {self.orders!r}: give numbers of tokens, ascending, at most 64, as (2, 3)")
        slots = tuple(checked_int("slots", each) for each in _several("slots", self.slots, length=len(orders)))
        heads = checked_int("heads", self.heads)
        if sum(slots) * heads > _MAX_SLOTS:
            raise InvalidRequest(
                f"slots = {self.slots!r} for each of {heads} heads: at most {_MAX_SLOTS:_} slots in all; give fewer"
            )
        for name, value in (("orders", orders), ("heads", heads), ("slots", slots)):
            object.__setattr__(self, name, value)

    @cached_property
    def primes(self) -> tuple[tuple[int, ...], ...]:
        taken: set[int] = set()
        return tuple(
            tuple(_next_prime(slots, taken) for _ in range(self.heads))
            for slots in self.slots  # type: ignore[union-attr]
        )

    @property
    def num_slots(self) -> int:
        return sum(map(sum, self.primes))

    @property
    def columns(self) -> int:
        return len(self.orders) * self.heads

    def table_config(self, name: str, *, head_dim: int, lr: float, **options: Any) -> TableConfig:
        """A table for these: ``pool.create_table(ngrams.table_config("ngrams", head_dim=32, lr=1e-3))``.

        Args:
            head_dim: Width of a row.
            lr: Of the model. Rows train by Adam with 5 times that, and no weight decay, as in the paper.
            options: As of ``TableConfig``; an ``optimizer`` is taken as it is.
        """
        fixed = {"num_slots": self.num_slots, "value_dim": head_dim}
        return TableConfig(name=name, **{"optimizer": Adam(lr=LR_FACTOR * lr), **options, **fixed})


def _several(name: str, given: object, *, length: int | None = None) -> tuple[Any, ...]:
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        several = tuple(given)
    else:
        several = (given,) * (length or 1)
    if length is not None and len(several) != length:
        raise InvalidRequest(f"{name} = {given!r}: give one number, or one for each of the {length} orders")
    return several


def _next_prime(at_least: int, taken: set[int]) -> int:
    """The first one that was not taken; takes it."""
    number = max(at_least, 2)
    while number in taken or not _is_prime(number):
        number += 1
    taken.add(number)
    return number


def _is_prime(number: int) -> bool:
    for prime in _WITNESSES:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_is_no_witness(witness, number, odd, twos) for witness in _WITNESSES)


def _is_no_witness(witness: int, number: int, odd: int, twos: int) -> bool:
    power = pow(witness, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False
