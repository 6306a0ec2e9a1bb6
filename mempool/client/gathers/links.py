"""What a gather asks of the table behind it, and links by number: compiled code can carry a number, not an object."""

import itertools
import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mempool.client.opening.waiting import Pending
from mempool.client.routing.attempt import LookupRecord
from mempool.errors import InvalidRequest
from mempool.types.bags import Bags


class PendingAnswer(Protocol):
    """A gather that was begun.

    Attributes:
        lease: While somebody holds it, shards are to remember the lookup, if they were asked to.
    """

    @property
    def lease(self) -> object: ...

    def done(self) -> bool: ...

    def result(self) -> tuple[Tensor, LookupRecord]:
        """Pooled values [B, V] float32 on the CPU, not to be written to; for any thread, as often as it is asked."""

    def answered(self) -> tuple[Tensor, LookupRecord]:
        """The same, for whoever does not take it: no look-up was answered by it yet."""

    def hand_over(self) -> None:
        """Who took the result lets shards forget the lookup; the lease means nothing more."""


class Link(Protocol):
    """What ``autograd`` and ``compiled`` ask of a table.

    Attributes:
        number: From ``LINKS.add``.
    """

    number: int

    @property
    def name(self) -> str: ...

    @property
    def num_slots(self) -> int: ...

    @property
    def value_dim(self) -> int: ...

    def send_gather(self, bags: Bags, *, remember: bool) -> tuple[Tensor, LookupRecord]: ...

    def begin_gather(self, bags: Bags, *, remember: bool) -> PendingAnswer: ...

    def send_update(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, want_weight_grad: bool
    ) -> Tensor | None: ...

    def begin_update(self, record: LookupRecord, grads: Tensor, *, hold: bool) -> Pending[Tensor | None]:
        """The gradient of the weights comes later."""

    def release(self, record: LookupRecord) -> Callable[[], None]: ...

    def wire_weights(self, weights: Tensor | None, *, kept: bool = True) -> Tensor | None: ...


class Links:
    """Links by number, for as long as somebody else holds them."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._links: weakref.WeakValueDictionary[int, Link] = weakref.WeakValueDictionary()

    def add(self, link: Link) -> int:
        """The link's number in this process, never given twice."""
        number = next(self._numbers)
        self._links[number] = link
        return number

    def get(self, number: int) -> Link:
        """Raises InvalidRequest for a number whose link is gone, or was another process's."""
        link = self._links.get(number)
        if link is None:
            raise InvalidRequest(
                "the table of this compiled or saved graph is not open in this process. A graph holds a connection,"
                " not a table: build the model again with a table of this process and compile it here"
            )
        return link


# One for the process, as torch's registry of operators is, which finds links here.
LINKS = Links()
