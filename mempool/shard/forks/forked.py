"""Pages of a new table that are another table's: its memory is made ready to be shared first, then the moment is taken.

What is shared, and how, is ``sharing``'s; which moment, and what the table's history is then, ``forking``'s.
"""

from mempool.shard.pages.arena import Arena
from mempool.shard.pages.named_arrays import Blocks
from mempool.shard.pages.storage import Storage
from mempool.types import Placement

_PIECE_BYTES = 8 * 2**20
"""Moved at once to where it can be shared: whoever asks next waits for that."""


class ForkedPages:
    """The filling of a table: each ``next`` moves a piece of the other one's memory, and answers its bytes. It ends
    once the moment was taken.

    Attributes:
        ready: Nothing is left to be moved.
    """

    def __init__(self, storage: Storage, base: Storage, placement: Placement) -> None:
        self._storage = storage
        self._base = base
        self._placement = placement
        self._taken = False
        self.ready = False

    def __iter__(self) -> "ForkedPages":
        return self

    def __next__(self) -> int:
        if self._taken:
            raise StopIteration
        moved = share(self._base, _PIECE_BYTES)
        self.ready = not moved
        return moved

    def take(self) -> None:
        """From now on it holds what the other one holds now.

        Raises:
            InvalidRequest: There is not so much memory. Nothing was changed.
        """
        while share(self._base, _PIECE_BYTES):  # in replay: else the pieces before have left nothing, and none comes
            pass
        begin_as(self._storage, self._base, self._placement)
        self._taken = True


def share(storage: Storage, num_bytes: int) -> int:
    """Get a table ready to be forked, about so many bytes at a time: how many that were; 0: it is.

    Raises:
        InvalidRequest: The system has no memory that can be shared. What it holds stays.
    """
    return next((moved for arena in storage.arenas.values() if (moved := arena.share(num_bytes))), 0)


def begin_as(storage: Storage, base: Storage, placement: Placement) -> None:
    """A table of which nothing is here yet holds what that one does, all of whose memory is shared, and owns the same.

    Raises:
        InvalidRequest: There is not so much memory. Nothing was changed.
    """
    arrays, arenas = tuple(storage.arrays.values()), dict[Blocks, Arena]()
    try:
        for blocks, arena in base.arenas.items():
            arenas[blocks] = Arena(schema=storage.schema, blocks=blocks, arrays=arrays, device=storage.device, of=arena)
    except BaseException:
        for arena in arenas.values():
            arena.close()
        raise
    storage.arenas = arenas
    storage.set_head_keys(base.heads, base.head_keys)
    storage.shared_head_keys = base.shared_head_keys = True  # whoever writes to them copies them first
    if storage.schedule is not None and base.schedule is not None:
        storage.schedule.restore(base.schedule.first_step, base.schedule.steps, base.schedule.log_decays)
        for step in base.schedule.stops:
            storage.schedule.stop(step)
    storage.own(placement)
