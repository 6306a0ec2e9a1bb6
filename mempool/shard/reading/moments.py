"""The moments of one table that are kept on one shard, and what a table reads at them: carries out what ``Pins`` says.

Runs on the engine's thread. What a reader is answered is ``pinned``'s.
"""

from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor

from mempool.agreement.readers.pins import Moment, Pin, Pins
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.named_arrays import Blocks
from mempool.shard.reading.keeper import Keeper
from mempool.shard.reading.kept import KeptRows
from mempool.types import PinStatus

if TYPE_CHECKING:
    from mempool.shard.pages.storage import Storage

Heads = tuple[tuple[int, ...], Tensor]


class Moments:
    """Of one table.

    Args:
        storage: The table's.
        keeper: Of the shard; None: one of its own.

    Attributes:
        pins: Who reads what. Changed here alone.
    """

    def __init__(self, storage: "Storage", keeper: Keeper | None) -> None:
        self._storage = storage
        self.keeper = Keeper() if keeper is None else keeper
        self.pins = Pins(storage.schema.name, storage.shard)
        self._kept: dict[Blocks, KeptRows] = {}
        self._heads: dict[int, Heads] = {}
        self._last_steps: dict[int, int] = {}  # of a dense optimizer
        self.keeper.add(self)

    @property
    def num_bytes(self) -> int:
        """Bytes that they take; any thread may ask."""
        heads = {id(keys): keys.nbytes for _, keys in list(self._heads.values()) if keys is not self._storage.head_keys}
        return sum(kept.num_bytes for kept in list(self._kept.values())) + sum(heads.values())

    @property
    def oldest(self) -> Pin | None:
        """The pin that was taken first."""
        return self.pins.oldest

    def let_go(self, token: str, why: str) -> None:
        """As of ``Pinned``."""
        self.pins.end(token, why)
        self._follow()

    def status(self) -> tuple[PinStatus, ...]:
        """The versions that are pinned, ascending, and for whom; any thread may ask."""
        found = Counter(((pin.moment or pin.first).version, pin.name) for pin in self.pins)
        return tuple(
            PinStatus(version=version, name=name, pins=found[version, name]) for version, name in sorted(found)
        )

    # What pins ask. Each raises as the same of ``Pins``

    def arm(self, token: str, *, version: int, name: str, ends_s: float) -> Moment:
        """See ``Pins.arm``; ``version``: the table's."""
        serial, mark = self.keeper.next_serial(), self._mark()
        moment = self.pins.arm(token, serial=serial, version=version, mark=mark, name=name, ends_s=ends_s)
        self._follow()
        return moment

    def attach(self, token: str, *, version: int, name: str, ends_s: float, beside: int | None) -> Moment:
        """See ``Pins.attach``."""
        serial = self.keeper.next_serial()
        return self.pins.attach(token, serial=serial, version=version, name=name, ends_s=ends_s, beside=beside)

    def settle(self, token: str, version: int, *, ends_s: float, beside: int | None) -> Moment:
        """See ``Pins.settle``."""
        moment = self.pins.settle(token, version, ends_s=ends_s, beside=beside)
        self._follow()
        return moment

    def release(self, token: str = "", *, name: str = "") -> None:
        """See ``Pins.release``."""
        self.pins.release(token, name=name)
        self._follow()

    def expire(self, now_s: float) -> None:
        """See ``Pins.expire``."""
        if len(self.pins):
            self.pins.expire(now_s)
            self._follow()

    # What happens to the table

    def stepped(self, version: int) -> None:
        """A step was applied: the table is at that version, and nothing was written since."""
        if len(self.pins):
            self.pins.stepped(version, self._mark())
            self._follow()

    def keep_heads(self) -> None:
        """Product keys are about to be copied, and written to then. Where there is no room for both pins are let go."""
        keys = self._storage.head_keys
        while any(kept is keys for _, kept in self._heads.values()) and not self.keeper.makes_room(keys.nbytes):
            pass

    def end(self, why: str) -> None:
        """No moment is kept any more; readers are told why."""
        self.pins.end_all(why)
        self._follow()

    def _mark(self) -> tuple[int, ...]:
        storage = self._storage
        return storage.head_key_writes, *(arena.writes for _, arena in sorted(storage.arenas.items()))

    def _follow(self) -> None:
        """Keep what is to be kept, and no more."""
        wanted = {moment.number for moment in self.pins.moments}
        for number in sorted(self._heads.keys() - wanted):
            del self._heads[number]
            self._last_steps.pop(number, None)
            for kept in self._kept.values():
                kept.forget(number)
        if not wanted:
            self._kept = {}
            return
        storage = self._storage
        for number in sorted(wanted - self._heads.keys()):
            if not self._kept:
                self._kept = {
                    blocks: KeptRows(
                        arena, whole=storage.schedule is not None, keeper=self.keeper, on_failure=self._no_memory
                    )
                    for blocks, arena in storage.arenas.items()
                }
            for kept in self._kept.values():
                kept.open(number)
            self._heads[number] = storage.heads, storage.head_keys
            storage.shared_head_keys = True
            if storage.schedule is not None:
                self._last_steps[number] = storage.schedule.last_step

    def _no_memory(self, error: Exception) -> None:
        self.end(f"there was no memory to keep it as it was ({error})")

    # What is read at one

    def kept(self, arena: Arena) -> KeptRows:
        """The kept rows of an arena that has pages."""
        return self._kept[arena.blocks]

    def heads(self, moment: Moment) -> Heads:
        """The heads whose product keys are here, and those keys then."""
        return self._heads[moment.number]

    def last_step(self, moment: Moment) -> int:
        """Of a dense optimizer: the last step then."""
        return self._last_steps[moment.number]
