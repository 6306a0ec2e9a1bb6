"""The moment of a checkpoint or a fork, as a machine: what was answered goes in, the calls to make next come out.

Freeze every table, at its gate first; once all stand still, mark all; once all are marked, thaw all. Each mark is taken
only where that freeze still holds, so that all are of the moment at which the last freeze began: one version of each
table over all shards, and no step of several tables is half in it. A failure thaws all and there is no moment.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mempool.errors import Internal, MempoolError, ShardUnavailable

LEASE_S = 10.0
"""Of a freeze: how long a controller that dies holds off writers."""
_RENEWALS = 3


@dataclass(frozen=True, slots=True)
class Owner:
    """A shard that owns pages of a table."""

    table_id: int
    shard: int


@dataclass(frozen=True, slots=True)
class Freeze:
    """Freeze the table at a shard, with the checkpoint's token and lease; again, for the ``number``-th time, and where
    it was answered (``begun``) only if it holds still."""

    owner: Owner
    number: int = 0
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """Mark the table at a shard, where it is frozen at this version."""

    owner: Owner
    version: int


@dataclass(frozen=True, slots=True)
class Thaw:
    """End the freeze at a shard."""

    owner: Owner


@dataclass(frozen=True, slots=True)
class Ended:
    """There is nothing more to call.

    Attributes:
        error: Why there is no moment; None: it is taken.
        versions: Table id -> its version.
        held_s: How long writers were held off.
    """

    error: BaseException | None
    versions: Mapping[int, int]
    held_s: float


Call = Freeze | Mark | Thaw
Action = Call | Ended


@dataclass(frozen=True, slots=True)
class Answered:
    """A call was answered. version: Of Freeze."""

    call: Call
    version: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """A call failed. It may have taken effect."""

    call: Call
    error: BaseException


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed; ``Cut.next_s`` says when that is of interest."""


Event = Answered | Failed | Ticked
Phase = Literal["gates", "others", "marks", "thawing", "ended"]


@dataclass
class Cut:
    """One moment.

    Args:
        owners: Table id -> the shards that own pages of it; the lowest is its gate.

    Attributes:
        phase: What is under way.
        next_s: When ``Ticked`` is due; inf: never.
    """

    owners: Mapping[int, Iterable[int]]
    phase: Phase = "gates"
    next_s: float = float("inf")
    _open: set[Call] = field(default_factory=set)
    _frozen: dict[Owner, int] = field(default_factory=dict)
    _versions: dict[int, int] = field(default_factory=dict)
    _touched: list[Owner] = field(default_factory=list)
    _renewals: int = 0
    _began_s: float = 0.0
    _error: BaseException | None = None

    def begin(self, now_s: float) -> list[Action]:
        """The first calls."""
        self._began_s = now_s
        self.next_s = now_s + LEASE_S / _RENEWALS
        gates = [Owner(table_id, min(shards)) for table_id, shards in self.owners.items()]
        return self._go(now_s, [Freeze(owner) for owner in gates])

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What to do next."""
        if self.phase == "ended":
            return []
        if isinstance(event, Ticked):
            return self._renew(now_s)
        self._open.discard(event.call)
        if isinstance(event, Failed):
            return self._failed(event, now_s)
        if isinstance(event.call, Freeze) and self.phase in ("gates", "others", "marks"):
            known = self._versions.setdefault(event.call.owner.table_id, event.version)
            if known != event.version:
                return self._give_up(_apart(event.call.owner, known, event.version), now_s)
            self._frozen[event.call.owner] = event.version
        return self._go_on(now_s)

    def abandon(self, now_s: float) -> list[Action]:
        """Nobody waits for it any more: what lets tables go on, where they may stand still."""
        return self._thaw(now_s) if self.phase in ("gates", "others", "marks") else []

    def _renew(self, now_s: float) -> list[Action]:
        if self.phase not in ("gates", "others", "marks") or now_s < self.next_s:
            return []
        self._renewals += 1
        self.next_s = now_s + LEASE_S / _RENEWALS
        calls = [
            Freeze(owner, self._renewals, owner in self._frozen) for owner in self._touched
        ]  # also where one waits for a step
        self._open.update(calls)
        return list(calls)

    def _failed(self, event: Failed, now_s: float) -> list[Action]:
        if self.phase == "thawing":  # that freeze ends by its lease
            return self._go_on(now_s)
        return self._give_up(event.error, now_s)

    def _give_up(self, error: BaseException, now_s: float) -> list[Action]:
        self._error = error
        return self._thaw(now_s)

    def _go_on(self, now_s: float) -> list[Action]:
        """The next phase, where this one has nothing left to hear of. Renewals hold up nothing."""
        if any(not isinstance(call, Freeze) or call.number == 0 for call in self._open):
            return []
        if self.phase == "gates":
            self.phase = "others"
            others = [
                Owner(table_id, shard)
                for table_id, shards in self.owners.items()
                for shard in sorted(shards)
                if shard != min(shards)
            ]
            if others:
                return self._go(now_s, [Freeze(owner) for owner in others])
        if self.phase == "others":
            self.phase = "marks"
            return self._go(now_s, [Mark(owner, version) for owner, version in self._frozen.items()])
        if self.phase == "marks":
            return self._thaw(now_s)
        self.phase, self.next_s = "ended", float("inf")
        return [Ended(self._error, dict(self._versions), now_s - self._began_s)]

    def _thaw(self, now_s: float) -> list[Action]:
        self.phase, self.next_s = "thawing", float("inf")
        self._open.clear()  # what was called before and is late changes nothing: the token is over
        return self._go(now_s, [Thaw(owner) for owner in self._touched])

    def _go(self, now_s: float, calls: list[Call]) -> list[Action]:
        self._touched += [call.owner for call in calls if isinstance(call, Freeze)]
        self._open.update(calls)
        return list(calls) if calls else self._go_on(now_s)


def _apart(owner: Owner, known: int, found: int) -> MempoolError:
    if found > known:  # at the gate the freeze has ended, or its shard was started anew
        return ShardUnavailable(
            f"table {owner.table_id} was frozen at version {known}, and is at {found} on shard {owner.shard}: training "
            f"went on, as this controller was not heard of at its gate for {LEASE_S:g} s, or a shard was started anew. "
            "Nothing was taken of that moment, and nothing was changed; ask for it again",
            shard=owner.shard,
        )
    return Internal(
        f"table {owner.table_id} stands still at version {found} on shard {owner.shard}, and at {known} on its gate: "
        "nothing was taken of that moment. Nothing was changed; ask for it again",
        shard=owner.shard,
    )
