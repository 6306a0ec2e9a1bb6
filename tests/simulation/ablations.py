"""Safeguards switched off, one at a time, to see that the simulation would miss them. For tests only.

``python -m tests.simulation.ablations --seeds 200`` prints a table: how many seeds it took to see each one missing.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any
from unittest import mock

from mempool.agreement.attempts import Attempts
from mempool.agreement.ledger import AppliedLedger
from mempool.agreement.order import Order
from mempool.agreement.readers.pins import Moment, Pins
from mempool.agreement.rounds_here import RoundsHere
from mempool.agreement.writes import SeenWrites
from mempool.client.reading import pinning
from mempool.journal import reading, records, snapshots
from mempool.journal.snapshots import Snapshot
from mempool.shard.durable.records import Decided, Held
from mempool.shard.durable.store import Store
from mempool.shard.durable.taking import Taking
from mempool.shard.hosted import HostedTable
from mempool.shard.reading.kept import KeptRows
from mempool.shard.steps.held import HeldUpdates
from mempool.shard.tenancy import Tenancy
from mempool.wire import methods
from mempool.wire.methods import Method
from tests.simulation.faults import Faults
from tests.simulation.run import Outcome, Run, prepare_worker
from tests.simulation.traps import Effect, Scene, Trap

Patch = tuple[Any, str, Any]


def _any_epoch(check: Callable[..., None]) -> Callable[..., None]:
    return lambda table, envelope, **more: check(table, replace(envelope, epoch=table.epoch), **more)


def _any_generation(applied: Callable[..., int]) -> Callable[..., int]:
    return lambda ledger, step_id: applied(ledger, replace(step_id, generation=ledger.entry(step_id).generation))


def _in_order_of_arrival(order: Order, step: Any) -> None:
    """A step that is told is the next one, whatever its version."""
    if step.version > order.applied and step.version not in order._waiting:
        order._waiting[order.numbered + 1] = replace(step, version=order.numbered + 1)


async def _at_once(_: Store) -> None:
    """Nobody waits for the disk."""


def _pack_unsynced(finish: Callable[..., Any]) -> Callable[..., Any]:
    """The manifest counts before its pack is durable."""

    def early(snapshot: Snapshot, head: bytes) -> Any:
        pack = snapshot._file
        with nullcontext() if pack is None else mock.patch.object(pack, "sync"):
            return finish(snapshot, head)

    return early


def _segments_first(cut: Callable[..., Any]) -> Callable[..., Any]:
    """Segments go as a snapshot begins, and not when it is whole."""

    def early(taking: Taking) -> Any:
        begun, journal = cut(taking), taking._store.journal
        if begun is not None:
            journal.remove_before(journal.last + 1)
        return begun

    return early


def _where_it_was_armed(pins: Pins, token: str, _: int, **__: Any) -> Moment:
    """Each shard settles at the version that it was asked at."""
    first = pins._find(token).first
    pins._pins[token] = replace(pins._find(token), moment=first)
    return first


async def _as_they_were(_: Any, __: Any, versions: dict[int, int]) -> dict[int, int]:
    """Nobody looks at tables a second time."""
    return versions


class _Right(int):
    """A checksum that is any other."""

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = int.__hash__


def _but_for(add: Callable[..., None], kind: type) -> Callable[..., None]:
    return lambda store, record: None if isinstance(record, kind) else add(store, record)


ABLATIONS: dict[str, list[Patch]] = {
    "incarnation fence": [(Tenancy, "check_incarnation", lambda *_: None)],
    "epoch fence": [(HostedTable, "check", _any_epoch(HostedTable.check))],
    "version wait": [(HostedTable, "lacks", lambda *_, **__: None)],
    "wait for decided steps": [(HostedTable, "in_doubt", lambda *_, **__: None)],
    "generation": [(AppliedLedger, "applied", _any_generation(AppliedLedger.applied))],
    "ledger": [(AppliedLedger, "applied", lambda *_: 0)],
    "token of a round": [(RoundsHere, "check", lambda *_: None)],
    "order": [(Order, "add", _in_order_of_arrival), (Order, "may_take", lambda *_: True)],
    "lease of a trainer": [
        (HeldUpdates, "lives", lambda *_: True),
        (HeldUpdates, "silent", lambda *_: ()),
        (HeldUpdates, "expire", lambda *_: None),
    ],
    "lease of a freeze": [(RoundsHere, "lapsed", property(lambda _: False))],
    "attempt": [(Attempts, "end", lambda *_: True), (Attempts, "late", lambda *_: "")],
    "numbers of writes": [(SeenWrites, "is_due", lambda *_: True)],
    "sync before an answer": [(Store, "settled", _at_once)],
    "record of a decision": [(Store, "add", _but_for(Store.add, Decided))],
    "record of an update": [(Store, "add", _but_for(Store.add, Held))],
    "checksum": [
        (records, "_same_sum", lambda *_: None),
        (reading, "sum_of", lambda _: _Right()),
        (snapshots, "xxhash", SimpleNamespace(xxh3_64_intdigest=lambda _: _Right())),
    ],
    "pack before its manifest": [(Snapshot, "finish", _pack_unsynced(Snapshot.finish))],
    "snapshot before segments go": [(Taking, "_cut", _segments_first(Taking._cut))],
    "copy before a write": [(KeptRows, "save", lambda *_: None)],
    "versions kept until a pin is settled": [(Pins, "settle", _where_it_was_armed)],
    "second look at pinned tables": [(pinning, "_standing_still", _as_they_were)],
}


def _trap(method: Method[Any, Any], effect: Effect, for_s: float, **more: Any) -> Trap:
    return Trap(path=method.path, effect=effect, for_s=for_s, **more)


FAULTS: dict[str, Faults] = {
    "incarnation fence": Faults(shards_die=True, trainers_die=True),
    "lease of a trainer": Faults(trainers_die=True),
    "lease of a freeze": Faults(
        scene=Scene(
            traps=(_trap(methods.FREEZE, "its sender dies", 1e4, only="not first of its round"),),
            rescales=True,
            tables=False,
        )
    ),
    "generation": Faults(trainers_die=True),
    "attempt": Faults(
        scene=Scene(
            traps=(
                _trap(methods.FREEZE, "its sender dies", 0.5, only="first of its round", times=20),
                _trap(methods.DISCARD, "comes again with a Commit", 0.0, times=1000),
                _trap(methods.COMMIT, "its sender dies", 1.0, skip=4, times=1000),
            ),
            rescales=True,
            tables=False,
        )
    ),
    "token of a round": Faults(
        scene=Scene(
            traps=(
                _trap(
                    methods.SET_VIEW, "comes late, of a sender that dies", 5.0, only="first of its round", times=1000
                ),
            ),
            rescales=True,
            tables=False,
        )
    ),
    "numbers of writes": Faults(
        scene=Scene(
            traps=(_trap(methods.WRITE_ROWS, "comes again", 2.0, times=1000),),
            rescales=False,
            tables=False,
            writes=True,
        )
    ),
    "version wait": Faults(
        scene=Scene(
            traps=(
                _trap(methods.FREEZE, "its sender dies", 0.5, only="first of its round", times=20),
                _trap(methods.DISCARD, "comes again", 3.0, times=1000),
                _trap(methods.COMMIT, "comes late", 1.5, times=1000),
            ),
            rescales=True,
            tables=False,
        )
    ),
}
"""Faults in which a safeguard is likely to be needed; without, they are drawn by the seed."""
WITH_STORAGE = (
    "sync before an answer",
    "record of a decision",
    "record of an update",
    "checksum",
    "pack before its manifest",
    "snapshot before segments go",
)
"""What guards what is on disks."""
FAULTS |= dict.fromkeys(WITH_STORAGE, Faults(restarts=True)) | {
    "checksum": Faults(flips=True),
    "record of a decision": Faults(
        scene=Scene(
            traps=(_trap(methods.COMMIT, "its server is killed", 0.5, skip=2, times=4),), rescales=False, tables=False
        )
    ),
}
WITH_PINS = ("copy before a write", "versions kept until a pin is settled", "second look at pinned tables")
"""What guards who reads a version."""
FAULTS |= dict.fromkeys(WITH_PINS, Faults(scene=Scene(rescales=False, tables=False)))
GUARDED_BESIDE = {"version wait": "attempt"}
"""What another one guards as well since it is there: the first is looked at without the second."""
SEEN_AT: dict[str, int] = {
    "incarnation fence": 1,
    "epoch fence": 8,
    "wait for decided steps": 48,
    "generation": 1,
    "ledger": 17,
    "version wait": 19,
    "token of a round": 8,
    "order": 14,
    "lease of a trainer": 6,
    "lease of a freeze": 3,
    "attempt": 8,
    "numbers of writes": 1,
    "sync before an answer": 34,
    "record of a decision": 2,
    "record of an update": 1,
    "checksum": 10,
    "pack before its manifest": 22,
    "snapshot before segments go": 31,
    "copy before a write": 1,
    "versions kept until a pin is settled": 15,
    "second look at pinned tables": 36,
}
"""The first seed that shows each one missing: how many were needed."""


@contextmanager
def without(*safeguards: str) -> Iterator[None]:
    """The safeguards are off in this process."""
    patches = [
        mock.patch.object(owner, name, fake) for safeguard in safeguards for owner, name, fake in ABLATIONS[safeguard]
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def play_without(asked: tuple[str, int]) -> Outcome:
    """One run without a safeguard. The oracle is another matter: it has nobody to be guarded from."""
    safeguard, seed = asked
    run = _run_of(safeguard, seed)
    run.around = without(safeguard, *_beside(safeguard))
    return run.play()


def play_with(asked: tuple[str, int]) -> Outcome:
    """The same run with the safeguard."""
    safeguard, seed = asked
    run = _run_of(safeguard, seed)
    run.around = without(*_beside(safeguard))
    return run.play()


def _beside(safeguard: str) -> tuple[str, ...]:
    return (GUARDED_BESIDE[safeguard],) if safeguard in GUARDED_BESIDE else ()


def _run_of(safeguard: str, seed: int) -> Run:
    """A run in which it is likely to be needed."""
    pins = safeguard in WITH_PINS
    return Run(seed, faults=FAULTS.get(safeguard), storage=safeguard in WITH_STORAGE, pins=pins)


def kind_of(violation: str) -> str:
    """A violation's kind: its words without names and numbers."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*|'[^']*'|\([^()]*\)|\[[^\[\]]*\]", "", violation)).strip()[:100]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    unseen = []
    print(f"{'safeguard':24} {'seeds needed':>12}  kind of the first violation", flush=True)
    with get_context("spawn").Pool(options.processes, prepare_worker) as pool:
        for safeguard in ABLATIONS:
            if options.only and options.only != safeguard:
                continue
            asked = [(safeguard, seed) for seed in range(1, options.seeds + 1)]
            some = 2 * options.processes  # at a time: none is played in vain once one was found
            outcomes = itertools.chain.from_iterable(
                pool.map(play_without, asked[first : first + some], chunksize=1) for first in range(0, len(asked), some)
            )
            found = next((outcome for outcome in outcomes if outcome.violations), None)
            if found is None:
                unseen.append(safeguard)
            needed = f"> {options.seeds}" if found is None else str(found.seed)
            print(f"{safeguard:24} {needed:>12}  {kind_of(found.violations[0]) if found else '-'}", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
