"""Which moments of a table one of its owners keeps, and for whom: values only, whoever holds it keeps the rows.

A *moment* is the table as it was at one version. A *pin* is one reader's (or a snapshot's) hold on one. It is taken in
two rounds, which stop nobody: *armed*, each owner keeps its present moment and every one that follows, and says the
version it is at; *settled* at the highest of these, which every owner still has or comes to, it keeps that one alone.
So a pin is one cut through all shards, though each was asked at another time.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mempool.errors import AlreadyExists, InvalidRequest, Overloaded, VersionGone

MAX_PINS = 256
"""Of one table."""
MAX_ARMED_MOMENTS = 256
"""That pins may follow until they are settled: a message's way takes as many steps at most."""
_MAX_TOLD = 1024
_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Moment:
    """The table at one version.

    Attributes:
        number: Ascends.
        mark: What else was written by then: of one version there may be several moments.
    """

    number: int
    version: int
    mark: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Attributes:
    token: The reader's, a random one.
    serial: Of all pins of the shard, in the order they were taken.
    first: The moment from which on it was armed.
    moment: Where it is settled; None: it is armed.
    name: Of a snapshot; "": a reader's.
    ends_s: When its lease is over.
    beside: Of keys: the version of their table that they belong to, where it was pinned with them.
    """

    token: str
    serial: int
    first: Moment
    moment: Moment | None
    name: str
    ends_s: float
    beside: int | None = None


class Pins:
    """The pins of one table on one shard.

    Args:
        table: Its name, for messages.
        shard: Likewise.
    """

    def __init__(self, table: str, shard: int) -> None:
        self._table = table
        self._shard = shard
        self._pins: dict[str, Pin] = {}
        self._moments: list[Moment] = []
        self._numbers = 0
        self._told: OrderedDict[str, str] = OrderedDict()

    def __iter__(self) -> Iterator[Pin]:
        return iter(tuple(self._pins.values()))

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def moments(self) -> tuple[Moment, ...]:
        """Those that are to be kept, ascending."""
        return tuple(self._moments)

    @property
    def any_armed(self) -> bool:
        """Whether some pin follows the steps."""
        return any(pin.moment is None for pin in self._pins.values())

    def arm(self, token: str, *, serial: int, version: int, mark: tuple[int, ...], name: str, ends_s: float) -> Moment:
        """Keep the present moment and those that follow, until it is settled. Again: as it was.

        Raises:
            AlreadyExists: There is a snapshot of that name.
            Overloaded: There are too many pins.
            VersionGone: The pin is over: this is a copy that comes late.
        """
        known = self._pins.get(token)
        if known is not None:
            if known.moment is None:
                self._pins[token] = replace(known, ends_s=ends_s)
            return known.first
        if (why := self._told.get(token)) is not None:
            raise self._gone("what is to be read", why)
        self._require_room(name)
        newest = self._moments[-1] if self._moments else None
        if newest is None or (newest.version, newest.mark) != (version, mark):
            newest = self._open(version, mark)
        self._add(Pin(token=token, serial=serial, first=newest, moment=None, name=name, ends_s=ends_s))
        return newest

    def attach(
        self, token: str, *, serial: int, version: int, name: str, ends_s: float, beside: int | None = None
    ) -> Moment:
        """Pin what is kept already: of a snapshot's name, beside a version of the table whose keys it has, or of a
        version.

        Raises:
            VersionGone: It is not kept.
            Overloaded: There are too many pins.
        """
        if token in self._pins:
            return self.moment(token)
        self._require_room("")
        if name:
            found = [pin for pin in self._pins.values() if pin.name == name]
            held, beside = (found[0].moment, found[0].beside) if found else (None, None)
        elif beside is not None:
            with_it = (pin.moment for pin in self._pins.values() if pin.beside == beside and pin.moment is not None)
            held = max(with_it, key=lambda each: each.number, default=None)
        else:
            held = next((each for each in reversed(self._moments) if each.version == version), None)
        if held is None:
            what = f"snapshot {name!r}" if name else f"version {version}" if beside is None else "the version"
            of = "" if beside is None or name else f" that goes with version {beside} of the table whose keys it has"
            raise self._gone(what + of, self._told.get(_named(name)) or "nobody keeps it")
        self._add(Pin(token=token, serial=serial, first=held, moment=held, name="", ends_s=ends_s, beside=beside))
        return held

    def settle(self, token: str, version: int, *, ends_s: float, beside: int | None = None) -> Moment:
        """From now on it is of that version alone, which is not above the present one. Again: as it was.

        beside: The version of the table whose keys these are that was pinned with it.

        Raises:
            VersionGone: The pin is not here any more.
            InvalidRequest: It was armed after that version, or is settled at another one.
        """
        pin = self._find(token)
        held = pin.moment
        if held is None:
            first = (each for each in self._moments if each.number >= pin.first.number and each.version == version)
            held = next(first, None)
        if held is None or held.version != version:
            raise InvalidRequest(
                f"a pin of table {self._table!r} cannot be settled at version {version} on shard {self._shard}: it was "
                f"taken at {pin.first.version}. Nothing was changed."
            )
        self._pins[token] = replace(pin, moment=held, ends_s=max(pin.ends_s, ends_s), beside=beside)
        self._forget_moments()
        return held

    def renew(self, token: str, *, ends_s: float, keep: bool = False) -> Moment:
        """Its reader lives. keep: it is a snapshot's, and settled at every owner: it has no lease from here on. Raises
        VersionGone where it is not here any more."""
        pin = self._find(token)
        kept = keep and pin.moment is not None and bool(pin.name)
        self._pins[token] = replace(pin, ends_s=_NEVER if kept else max(pin.ends_s, ends_s))
        return pin.moment or pin.first

    def moment(self, token: str) -> Moment:
        """What it reads.

        Raises:
            VersionGone: The pin is not here any more.
            InvalidRequest: It is not settled.
        """
        pin = self._find(token)
        if pin.moment is None:
            raise InvalidRequest(
                f"a pin of table {self._table!r} is read that was not settled at a version. Nothing was changed."
            )
        return pin.moment

    def stepped(self, version: int, mark: tuple[int, ...]) -> None:
        """The table has come to that version."""
        if not self.any_armed:
            return
        armed = [pin for pin in self._pins.values() if pin.moment is None]
        for pin in armed:
            if self._moments[-1].number - pin.first.number >= MAX_ARMED_MOMENTS:
                self.end(pin.token, f"it was not settled within {MAX_ARMED_MOMENTS} steps")
        if self.any_armed:
            self._open(version, mark)

    def release(self, token: str = "", *, name: str = "") -> bool:
        """A reader is done, or a snapshot is dropped. Returns whether there was one."""
        found = [pin for pin in self._pins.values() if (pin.name == name if name else pin.token == token)]
        for pin in found:
            self._remove(pin, "it was released")
        return bool(found)

    def end(self, token: str, why: str) -> None:
        """It is kept no more; who reads is told why."""
        if (pin := self._pins.get(token)) is not None:
            self._remove(pin, why)

    def end_all(self, why: str) -> None:
        """The same of all."""
        for pin in self:
            self._remove(pin, why)

    def expire(self, now_s: float) -> None:
        """End those whose readers are silent."""
        for pin in self:
            if pin.ends_s <= now_s:
                self._remove(pin, "its reader was silent for longer than its lease")

    @property
    def oldest(self) -> Pin | None:
        """The pin that was taken first."""
        return min(self._pins.values(), key=lambda pin: pin.serial, default=None)

    def _add(self, pin: Pin) -> None:
        self._told.pop(pin.token, None)
        if pin.name:
            self._told.pop(_named(pin.name), None)
        self._pins[pin.token] = pin
        self._forget_moments()

    def _open(self, version: int, mark: tuple[int, ...]) -> Moment:
        self._numbers += 1
        moment = Moment(self._numbers, version, mark)
        self._moments.append(moment)
        return moment

    def _remove(self, pin: Pin, why: str) -> None:
        del self._pins[pin.token]
        for told in (pin.token, *([_named(pin.name)] if pin.name else [])):
            self._told[told] = why
        while len(self._told) > _MAX_TOLD:
            self._told.popitem(last=False)
        self._forget_moments()

    def _forget_moments(self) -> None:
        settled = {pin.moment.number for pin in self._pins.values() if pin.moment is not None}
        armed = min((pin.first.number for pin in self._pins.values() if pin.moment is None), default=None)
        self._moments = [
            each for each in self._moments if each.number in settled or (armed is not None and each.number >= armed)
        ]

    def _find(self, token: str) -> Pin:
        pin = self._pins.get(token)
        if pin is None:
            why = (
                self._told.get(token)
                or "it was not taken here: its pages have moved since, or the shard was started anew"
            )
            raise self._gone("the version that is read", why)
        return pin

    def _gone(self, what: str, why: str) -> VersionGone:
        return VersionGone(
            f"{what} of table {self._table!r} is not there any more on shard {self._shard}: {why}. Read the newest "
            "one (table.at()), or restore a checkpoint",
            shard=self._shard,
        )

    def _require_room(self, name: str) -> None:
        if name and any(pin.name == name for pin in self._pins.values()):
            raise AlreadyExists(
                f"table {self._table!r} has a snapshot {name!r} already; drop it first (pool.drop_snapshot({name!r})), "
                "or take another name. Nothing was changed.",
                shard=self._shard,
            )
        if len(self._pins) >= MAX_PINS:
            raise Overloaded(
                f"table {self._table!r} has {len(self._pins)} pins on shard {self._shard}, as many as it may have: "
                "close some (TableAt.close, pool.drop_snapshot). Nothing was changed.",
                shard=self._shard,
                retry_after_s=1.0,
            )


def _named(name: str) -> str:
    """Where it is noted what became of a snapshot: no token looks like it."""
    return f"snapshot {name}"
