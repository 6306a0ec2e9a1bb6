"""What a gather asks of the table behind it, and links by number: compiled code can carry a number, not an object."""

import itertools
import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mempool.client.routing.attempt import LookupRecord
from mempool.errors import InvalidRequest
from mempool.types.bags import Bags


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

    def send_update(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, want_weight_grad: bool
    ) -> Tensor | None: ...

    def release(self, record: LookupRecord) -> Callable[[], None]: ...

    def wire_weights(self, weights: Tensor | None) -> Tensor | None: ...


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
