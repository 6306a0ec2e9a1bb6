"""What shards apply, told to the history of a run from inside of them; and moments in them that others may see."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mempool.agreement.order import Order
from mempool.shard.durable.store import Store
from mempool.shard.work.doing import Doing
from mempool.shard.work.jobs import Answered
from mempool.types import DecidedStep
from tests.simulation.history import History
from tests.simulation.loop import InlineWorker
from tests.simulation.oracle import ORACLE_TABLE


@contextmanager
def observed(history: History, store_of: Callable[[], Store | None] = lambda: None) -> Iterator[None]:
    """Every step that a shard applies meanwhile is told to the history; of a shard with a disk, once it is durable:
    nobody was told before.

    store_of: Of the shard whose code runs now.
    """
    keep, told, go_on = Order._keep, Store._told, Doing._go_on
    ahead: dict[Store, list[tuple[int, DecidedStep]]] = defaultdict(list)

    def observe(order: Order, step: DecidedStep) -> None:
        keep(order, step)
        if step.table_id == ORACLE_TABLE:
            return
        store = store_of()
        if store is None:
            history.note_applied(step)
        else:
            ahead[store].append((store._position, step))

    def synced(store: Store, *how: Any) -> None:
        told(store, *how)
        durable = [step for position, step in ahead[store] if position <= store._synced]
        ahead[store] = ahead[store][len(durable) :]
        for step in durable:
            history.note_applied(step)

    def promised(doing: Doing, answered: Answered) -> None:
        """Between an answer and what it has promised others run, as on other threads, or the process dies."""
        worker = doing._ended.__self__._worker  # type: ignore[attr-defined]  # of the thread that does it
        if isinstance(worker, InlineWorker):
            worker.rest_of_turn(lambda: go_on(doing, answered))
        else:
            go_on(doing, answered)

    Order._keep = observe  # type: ignore[method-assign]
    Doing._go_on = promised  # type: ignore[method-assign]
    Store._told = synced  # type: ignore[method-assign]
    try:
        yield
    finally:
        Order._keep = keep  # type: ignore[method-assign]
        Doing._go_on = go_on  # type: ignore[method-assign]
        Store._told = told  # type: ignore[method-assign]
