"""Gathers that were started before anybody asked for their answers, for as long as those are what a shard would answer.

An answer counts while the table is, as far as this client knows, at the version that it was read at, and no step of its
own was acknowledged since: then it is bitwise what shards would answer now. Asking shards is the link's.

Legend: B bags, L pairs of all bags together, V value dim.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mempool.client.gathers.links import PendingAnswer
from mempool.client.gathers.window import Room
from mempool.client.routing.attempt import LookupRecord
from mempool.errors import MempoolError
from mempool.types.bags import Bags

_MAX_BYTES = 256 * 2**20
_SAMPLED = 16

_Sample = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class _Fetch:
    bags: Bags
    sample: _Sample
    num_bytes: int
    reply_dtype: str
    commits: int
    pending: PendingAnswer


class Prefetched:
    """The gathers of one table that were started ahead. All threads may use it.

    Args:
        max_bytes: Of ids, offsets and answers, of all that are kept.
    """

    def __init__(self, *, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._fetches: list[_Fetch] = []
        self._rooms: weakref.WeakSet[Room] = weakref.WeakSet()
        self._writers = 0
        self._writes = 0  # begun and ended, both

    @property
    def num_bytes(self) -> int:
        """Of all that are kept."""
        return sum(room.num_bytes for room in tuple(self._rooms)) + sum(each.num_bytes for each in tuple(self._fetches))

    def reserve(self, num_bytes: int, *, version: int | None) -> Room | None:
        """Keep room for a gather that is to be started by another thread, unless there is none; ``release`` it then."""
        with self._lock:
            self._sweep(version)
            if self._writers or self.num_bytes + num_bytes > self._max_bytes:
                return None
            self._rooms.add(room := Room(num_bytes))
            return room

    def release(self, room: Room) -> None:
        """What was reserved is not needed any more. Repeatable."""
        with self._lock:
            self._rooms.discard(room)

    def start(
        self,
        parts: Sequence[tuple[Bags, int]],
        *,
        version: int | None,
        commits: int,
        reply_dtype: str,
        ask: Callable[[], Sequence[PendingAnswer]],
    ) -> bool:
        """Start gathers, unless what is kept would become too much, or rows are being written.

        Args:
            parts: Bags of each, without weights, and bytes of them and their answer.
            version: The newest of the table that is known.
            commits: Steps of this client's that were acknowledged: the version that the last one made may not be known.
            reply_dtype: In which values are answered.
            ask: Starts them.
        """
        writes = self._writes  # of before: what is written from here on makes what is read old
        room = self.reserve(sum(num_bytes for _, num_bytes in parts), version=version)
        if room is None:
            return False
        try:
            answers = ask()
            with self._lock:
                self._rooms.discard(room)
                if writes == self._writes:
                    self._fetches += [
                        _Fetch(bags, _sample(bags), num_bytes, reply_dtype, commits, pending)
                        for (bags, num_bytes), pending in zip(parts, answers, strict=True)
                    ]
        finally:
            self.release(room)
        return True

    def take(
        self, bags: Bags, *, known_version: Callable[[], int | None], commits: int, reply_dtype: str
    ) -> tuple[Tensor, LookupRecord] | None:
        """The answer that was fetched for bags, once; None where there is none that still counts.

        Args:
            known_version: Tells the newest version of the table that is known.
            commits: As of ``start``.
        """
        if not self._fetches or bags.weights is not None:
            return None
        with self._lock:
            self._fetches = [fetch for fetch in self._fetches if fetch.commits == commits]
            self._sweep(known_version())
            fetch = self._found(bags, reply_dtype)
            if fetch is None:
                return None
            self._fetches.remove(fetch)
            writes = self._writes
        try:
            values, record = fetch.pending.result()
        except MempoolError:
            return None  # whoever asks now is told by the call of its own
        if writes != self._writes or not _counts(record, known_version()):
            return None
        fetch.pending.hand_over()
        return values, record

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While this client writes rows, which makes no version: what was read before counts no more."""
        self.drop(writers=1)
        try:
            yield
        finally:
            self.drop(writers=-1)

    def drop(self, *, writers: int = 0) -> None:
        """Keep nothing of what was read so far."""
        with self._lock:
            self._writers += writers
            self._writes += 1
            self._fetches.clear()

    def _sweep(self, version: int | None) -> None:
        """Drop what counts no more; what is not answered yet may count."""
        self._fetches = [fetch for fetch in self._fetches if not fetch.pending.done() or _may_count(fetch, version)]

    def _found(self, bags: Bags, reply_dtype: str) -> _Fetch | None:
        if self._writers:
            return None
        sample: _Sample | None = None
        for fetch in self._fetches:
            if fetch.reply_dtype != reply_dtype:
                continue
            if fetch.bags.ids is bags.ids and fetch.bags.offsets is bags.offsets:
                return fetch
            sample = _sample(bags) if sample is None else sample
            if fetch.sample == sample and _same(fetch.bags, bags):
                return fetch
        return None


def _may_count(fetch: _Fetch, version: int | None) -> bool:
    try:
        return _counts(fetch.pending.answered()[1], version)
    except MempoolError:
        return False


def _counts(record: LookupRecord, version: int | None) -> bool:
    return record.seen.oldest_version == record.seen.newest_version == (version or 0)


def _sample(bags: Bags) -> _Sample:
    """Tells most bags apart at no cost."""
    step = max(1, bags.num_pairs // _SAMPLED)
    return bags.num_pairs, bags.num_bags, tuple(bags.ids[::step].tolist())


def _same(first: Bags, second: Bags) -> bool:
    return torch.equal(first.ids, second.ids) and torch.equal(first.offsets, second.offsets)
