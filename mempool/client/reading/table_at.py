"""A table as it was at one version, for reading: a ``Table`` that nothing trains and nothing writes to."""

# ruff: noqa: ARG002  what is refused takes the arguments that a table's takes

import asyncio
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NoReturn, Self

from torch import Tensor

from mempool.client.gathers.prefetched import Prefetched
from mempool.client.gathers.untraced import untraced
from mempool.client.lookup import Lookup, PendingLookup
from mempool.client.opening.waiting import Begin, Run
from mempool.client.reading.pinning import keep
from mempool.client.reading.versions import LATEST
from mempool.client.routing.attempt import LookupRecord
from mempool.client.routing.router import Router
from mempool.client.table import Table
from mempool.client.training.begun import BegunGather
from mempool.client.training.commitment import Prepared
from mempool.client.training.link import TableLink
from mempool.client.training.session import Session
from mempool.errors import InvalidRequest, VersionGone
from mempool.types import TableSchema
from mempool.types.bags import Act, Bags
from mempool.wire.channels import loop


class TableAt(Table):
    """A table at one version: whatever is trained meanwhile, and however long it takes, all answers are of that one.

    Made by ``Table.at``; close it, or use it with ``with``: shards keep for it what training overwrites. All threads
    may use it.

    What reads a ``Table`` reads this: ``gather``, ``gather_async``, ``lookup``, ``rows``, ``read_keys``, and a
    ``mempool.nn.MemoryLayer`` (see ``mempool.nn.reading``). What trains or writes is refused; so is a backward pass of
    its look-ups. Optimizer state is not kept for it. Any of them raises VersionGone once the version is kept no more.

    Args:
        router, session: The table's.
        pin: What keeps the version; this lets it go.
        keys: The keys that it trains, at a version of theirs, closed with this; None: they cannot be read.

    Attributes:
        version: Which.
    """

    def __init__(
        self,
        schema: TableSchema,
        *,
        router: Router,
        session: Session,
        run: Run,
        begin: Begin,
        pin: str,
        version: int,
        keys: "TableAt | None" = None,
    ) -> None:
        reading = router.at(pin, keys=None if keys is None else keys._router)
        session = session.reading(reading)
        super().__init__(schema, router=reading, session=session, run=run, begin=begin)
        self.version = version
        self._keys = keys
        self._link = _LinkAt(schema, version, router=reading, session=session, run=run, begin=begin)
        self._anchor.requires_grad_(False)
        over = asyncio.Event()
        self._keeping = begin(keep(router, schema.table_id, pin, over))
        self._end = weakref.finalize(self, _say, over)
        self._end.atexit = False
        self._closing = threading.Lock()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, version={self.version})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let shards forget the version, if nobody else reads it. Repeatable; later reads raise VersionGone."""
        if isinstance(self._keys, TableAt):
            self._keys.close()
        with self._closing:
            self._end()
            with suppress(Exception):  # a shard that does not hear it lets it go by its lease
                self._keeping.result()

    @property
    def keys(self) -> Table:
        """As of the table, read at a version, too."""
        return super().keys if self._keeps_keys else self._no_keys()

    @untraced
    def lookup(self, queries: Tensor, topk: int) -> Lookup:
        """As of the table. Raises VersionGone, too, where nobody keeps its keys as they were then."""
        return super().lookup(queries, topk) if self._keeps_keys else self._no_keys()

    @untraced
    def lookup_async(self, queries: Tensor, topk: int) -> PendingLookup:
        """As of the table. Raises VersionGone, too, where nobody keeps its keys as they were then."""
        return super().lookup_async(queries, topk) if self._keeps_keys else self._no_keys()

    @property
    def _keeps_keys(self) -> bool:
        return self._keys is not None or not self.trains_keys

    def _no_keys(self) -> NoReturn:
        raise VersionGone(
            f"table {self.name!r} is read at version {self.version}, given as a number, and nobody keeps its keys "
            "as they were then: take table.at(), or a snapshot's name, or gather by ids"
        )

    def at(self, version: int | str = LATEST) -> NoReturn:
        """A version has no versions."""
        self._refuse("read at another version")

    def fork(self, name: str) -> NoReturn:
        """No optimizer state is kept for it."""
        self._refuse("forked")

    def reset(self, to: "Table | str") -> NoReturn:
        """Nothing writes to it."""
        self._refuse("written to")

    def requires_grad_(self, requires_grad: bool = True) -> "TableAt":
        """Only False: nothing trains it."""
        if requires_grad:
            self._refuse("trained")
        return self

    @property
    def cache_bytes(self) -> int:
        """0: no rows are kept here."""
        return 0

    @cache_bytes.setter
    def cache_bytes(self, cache_bytes: int) -> None:
        if cache_bytes:
            self._refuse("cached")

    def state(self, ids: Tensor | Sequence[int], names: Iterable[str] | None = None) -> NoReturn:
        """No optimizer state is kept for it."""
        self._refuse("asked for optimizer state")

    def usage(self, slots: object = None, *, older_than: int = 0) -> NoReturn:
        """Nor are counts of use."""
        self._refuse("asked for its usage")

    def reinit(self, slots: object = None, **_: object) -> NoReturn:
        """Nothing writes to it."""
        self._refuse("written to")

    def step_count(self) -> NoReturn:
        """Nor is the step count."""
        self._refuse("asked for its step count")

    def write_state(self, ids: Tensor | Sequence[int], state: Mapping[str, Tensor]) -> NoReturn:
        """Nothing writes to it."""
        self._refuse("written to")

    def set_step(self, step: int) -> NoReturn:
        """Nothing writes to it."""
        self._refuse("written to")

    def write(self, ids: Tensor | Sequence[int], values: Tensor) -> NoReturn:
        """Nothing writes to it."""
        self._refuse("written to")

    def write_keys(self, keys: Tensor, ids: Tensor | None = None) -> NoReturn:
        """Nothing writes to it."""
        self._refuse("written to")

    @property
    def step_links(self) -> list[TableLink]:
        """Nothing trains it."""
        return [self._link]

    def prepare(self, *, want_norm: bool = True, norm_order: float = 0.0) -> Prepared | None:
        """Nothing trains it: nothing is pending."""
        return None

    def commit(self, *, lr: float | None = None, grad_scale: float = 1.0, keys_lr: float | None = None) -> NoReturn:
        """Nothing trains it."""
        self._refuse("trained")

    def rebind(self, schema: TableSchema, session: Session) -> NoReturn:
        """It is of the one table for good."""
        self._refuse("another table's")

    def _refuse(self, what: str) -> NoReturn:
        raise InvalidRequest(_refusal(self.name, self.version, what))


class _LinkAt(TableLink):
    """A table's link on which look-ups are of one version: shards remember none of them, and no update follows.

    Args:
        version: Which, for messages.
    """

    def __init__(
        self, schema: TableSchema, version: int, *, router: Router, session: Session, run: Run, begin: Begin
    ) -> None:
        super().__init__(schema, router=router, session=session, run=run, begin=begin)
        self._version = version
        self.prefetched = Prefetched(max_bytes=0)  # nothing is started ahead

    def send_gather(self, bags: Bags, *, remember: bool) -> tuple[Tensor, LookupRecord]:
        return super().send_gather(bags, remember=False)

    def begin_gather(self, bags: Bags, *, remember: bool) -> BegunGather:
        return super().begin_gather(bags, remember=False)

    def begin_update(self, record: LookupRecord, grads: Tensor, *, hold: bool) -> NoReturn:
        self._refuse()

    def send_update(
        self,
        record: LookupRecord,
        grads: Tensor,
        *,
        hold: bool,
        want_weight_grad: bool,
    ) -> NoReturn:
        self._refuse()

    def send_experts(self, bags: Bags, inputs: Tensor, *, act: Act, remember: bool) -> NoReturn:
        raise InvalidRequest(_refusal(self.name, self._version, "asked as experts, which answer at the newest version"))

    def _refuse(self) -> NoReturn:
        raise InvalidRequest(_refusal(self.name, self._version, "trained, nor its weights"))


def _refusal(name: str, version: int, what: str) -> str:
    return (
        f"table {name!r} is read at version {version} here, and cannot be {what}: use pool.table({name!r}) for that, "
        "and this one for reading, under torch.no_grad(). Nothing was changed."
    )


def _say(over: asyncio.Event) -> None:
    """From any thread, at any moment."""
    with suppress(RuntimeError):  # the loop has ended
        loop.io_loop().call_soon_threadsafe(over.set)
