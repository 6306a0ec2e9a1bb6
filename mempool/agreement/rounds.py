"""One round of a move, as a machine: what was answered goes in, the calls to make next come out.

Freeze at the gate, then at all others; the pulls; SetView at the gate, which decides; then at all others. Before the
decision every failure undoes the round; after it there is only forward. Which pages, and how to call, is the mover's.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from mempool.errors import MempoolError, ShardUnavailable, StalePlacement

LEASE_S = 10.0
"""Of a freeze: how long a controller that dies holds off writers."""
_RENEWALS = 3
"""A freeze is renewed so often in a lease."""
_TELL_TRIES = 4
_TELL_PAUSE_S = 0.5
_LONG_S = 0.5
"""A freeze that takes longer waits for a step, and that is worth telling."""


@dataclass(frozen=True, slots=True)
class Freeze:
    """Freeze the table at a shard, with the round's token and lease."""

    shard: int


@dataclass(frozen=True, slots=True)
class Renew:
    """The same again, for the ``number``-th time: the freeze's lease begins anew. ``begun``: where it was answered; a
    shard that was started anew since has let others write, and is not to be frozen as if it had not."""

    shard: int
    number: int
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Pull:
    """Carry out the ``number``-th pull of the round."""

    number: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a shard the view of the next epoch; ``token``: as of this round, which it has a part in."""

    shard: int
    token: bool


@dataclass(frozen=True, slots=True)
class Thaw:
    """Undo the round at a shard."""

    shard: int


@dataclass(frozen=True, slots=True)
class Decided:
    """The next epoch is the pool's, whatever fails from here on."""


Outcome = Literal["moved", "undone", "unknown"]


@dataclass(frozen=True, slots=True)
class Ended:
    """The round is over.

    Attributes:
        outcome: "moved": it was decided; "undone": nothing has changed; "unknown": the gate did not say which.
        error: What undid it, or kept the gate's word from us.
        untold: Shards that were told of the new epoch in vain, with the last reason.
    """

    outcome: Outcome
    error: BaseException | None = None
    untold: tuple[tuple[int, BaseException], ...] = ()


Call = Freeze | Renew | Pull | Tell | Thaw
Action = Call | Decided | Ended


@dataclass(frozen=True, slots=True)
class Answered:
    """A call was answered."""

    call: Call


@dataclass(frozen=True, slots=True)
class Failed:
    """A call failed. It may have taken effect."""

    call: Call
    error: BaseException


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed; ``Round.next_s`` says when that is of interest."""


Event = Answered | Failed | Ticked
Phase = Literal["gate", "others", "pulls", "deciding", "telling", "undoing", "ended"]


@dataclass(slots=True, kw_only=True)
class _Frozen:
    """A shard whose freeze was asked for: when last, and when the last one that was answered was asked for."""

    asked_s: float
    sent: dict[Freeze | Renew, float] = field(default_factory=dict)
    alive_s: float
    answered: bool = False
    renewals: int = 0


class Round:
    """One round.

    Args:
        gate: The lowest owner of any page of the table, before the round.
        others: All others that own pages before or after it.
        bystanders: The pool's other shards: they are told the view at its end.
        pulls: How many pulls there are.
        lease_s: Of its freezes.

    Attributes:
        phase: How far it is.
        decided: Whether the gate has taken the new view.
        held_s: When the gate stood still, and writers were held off.
        at_rest_s: When the table stood still everywhere, and the pulls began; pulled_s: when they were done.
    """

    def __init__(
        self,
        *,
        gate: int,
        others: Collection[int],
        bystanders: Collection[int] = (),
        pulls: int,
        lease_s: float = LEASE_S,
    ) -> None:
        self.phase: Phase = "gate"
        self.decided = False
        self._gate = gate
        self._others = tuple(sorted(set(others) - {gate}))
        self._bystanders = tuple(sorted(set(bystanders) - {gate, *others}))
        self._lease_s = lease_s
        self.held_s = self.at_rest_s = self.pulled_s = self._began_s = 0.0
        self._long = False
        self._frozen: dict[int, _Frozen] = {}
        self._pulls = set(range(pulls))
        self._open: set[int] = set()
        self._tries: dict[int, int] = {}
        self._again: dict[int, tuple[float, BaseException]] = {}
        self._untold: dict[int, BaseException] = {}
        self._error: BaseException | None = None

    @property
    def waits_for(self) -> tuple[int, ...]:
        """The shards whose freeze has not been answered."""
        if self.phase not in ("gate", "others"):
            return ()
        return tuple(shard for shard, frozen in self._frozen.items() if not frozen.answered)

    @property
    def next_s(self) -> float | None:
        """When it is to be ticked at the latest; None: never."""
        if self.phase in ("undoing", "ended"):
            return None
        times = [again_s for again_s, _ in self._again.values()]
        times += [self._renew_s(frozen) for frozen in self._frozen.values()]
        if self.waits_for and not self._long:
            times.append(self._began_s + _LONG_S)
        return min(times, default=None)

    def waits_long(self, now: float) -> bool:
        """Whether its freeze takes so long that it must be a step it waits for."""
        return bool(self.waits_for) and now >= self._began_s + _LONG_S

    def begin(self, now: float) -> list[Action]:
        """The first calls."""
        self._began_s = now
        return list(self._freeze([self._gate], now))

    def handle(self, event: Event, now: float) -> list[Action]:
        """What is to be done after this. What is answered or fails after the end changes nothing."""
        self._long = self._long or self.waits_long(now)  # ticked once for that, not again and again
        actions: list[Action] = []
        if self.phase != "ended":
            if isinstance(event, Answered):
                actions += self._answered(event.call, now)
            elif isinstance(event, Failed):
                actions += self._failed(event.call, event.error, now)
            if self.phase not in ("undoing", "ended"):
                actions += self._timed(now)
        return actions

    def abandon(self, error: BaseException) -> list[Action]:
        """Whoever carries it out has to stop: undone, unless it is decided or may be."""
        if self.phase in ("ended", "undoing"):
            return []
        if self.phase in ("gate", "others", "pulls"):
            return self._undo(error)
        self._error = error
        return self._end("moved" if self.decided else "unknown")

    # What was answered

    def _answered(self, call: Call, now: float) -> list[Action]:
        if isinstance(call, Freeze | Renew):
            return self._is_frozen(call, now)
        if isinstance(call, Pull) and self.phase == "pulls":
            self._pulls.discard(call.number)
            return self._decide_if_all_came(now)
        if isinstance(call, Tell):
            return self._is_told(call.shard)
        if isinstance(call, Thaw):
            return self._is_thawed(call.shard)
        return []

    def _is_frozen(self, call: Freeze | Renew, now: float) -> list[Action]:
        frozen = self._frozen.get(call.shard)
        if frozen is None or self.phase in ("undoing", "ended"):
            return []
        frozen.alive_s = max(frozen.alive_s, frozen.sent.pop(call, frozen.alive_s))
        if not frozen.answered:  # the renewals of a freeze that waited for a step are answered right after it
            frozen.alive_s = max(frozen.alive_s, now - self._lease_s / _RENEWALS)
        frozen.answered = True
        if self.phase == "gate":
            self.phase, self.held_s = "others", now
            actions: list[Action] = list(self._freeze(self._others, now))
            return actions or self._pull(now)
        if self.phase == "others" and all(each.answered for each in self._frozen.values()):
            return self._pull(now)
        return []

    def _pull(self, now: float) -> list[Action]:
        self.phase, self.at_rest_s = "pulls", now
        return [Pull(number) for number in sorted(self._pulls)] or self._decide_if_all_came(now)

    def _decide_if_all_came(self, now: float) -> list[Action]:
        if self._pulls:
            return []
        self.phase, self.pulled_s = "deciding", now
        return [Tell(self._gate, token=True)]

    def _is_told(self, shard: int) -> list[Action]:
        self._frozen.pop(shard, None)
        self._again.pop(shard, None)
        self._open.discard(shard)
        if self.phase == "deciding" and shard == self._gate:
            self.phase, self.decided = "telling", True
            self._open = {*self._others, *self._bystanders}
            return [Decided(), *(self._tell(each) for each in sorted(self._open)), *self._end_if_all_know()]
        return self._end_if_all_know()

    def _tell(self, shard: int) -> Tell:
        return Tell(shard, token=shard not in self._bystanders)

    def _is_thawed(self, shard: int) -> list[Action]:
        self._open.discard(shard)
        return [] if self._open or self.phase != "undoing" else self._end("undone")

    def _end_if_all_know(self) -> list[Action]:
        return [] if self._open or self.phase != "telling" else self._end("moved")

    # What failed

    def _failed(self, call: Call, error: BaseException, now: float) -> list[Action]:
        if isinstance(call, Thaw):  # its freeze ends by itself
            return self._is_thawed(call.shard)
        if isinstance(call, Renew) and not isinstance(error, StalePlacement):
            if call.shard in self._frozen and self.phase != "undoing":  # what undid it is what is told
                self._frozen[call.shard].sent.pop(call, None)
                self._error = error
            return []  # the next one may arrive
        if isinstance(call, Freeze | Renew | Pull):
            return self._undo(error) if self.phase in ("gate", "others", "pulls") else []
        return self._not_told(call.shard, error, now)

    def _not_told(self, shard: int, error: BaseException, now: float) -> list[Action]:
        if self.phase == "deciding" and isinstance(error, StalePlacement):
            return self._undo(error)  # the gate's freeze had ended: nothing was decided, and will not be
        if self.phase not in ("deciding", "telling"):
            return []
        tries = self._tries[shard] = self._tries.get(shard, 0) + 1
        if tries < _TELL_TRIES and shard not in self._bystanders:  # those are told when they are settled
            self._again[shard] = (now + _TELL_PAUSE_S, error)
            return []
        if self.phase == "deciding":
            self._error = error
            return self._end("unknown")
        self._untold[shard] = error
        return self._is_told(shard)

    def _undo(self, error: BaseException) -> list[Action]:
        self.phase, self._error = "undoing", error
        self._open = {self._gate, *self._others}
        self._again.clear()
        return [Thaw(self._gate), *(Thaw(shard) for shard in self._others)]

    def _end(self, outcome: Outcome) -> list[Action]:
        self.phase = "ended"
        self._frozen.clear()
        self._again.clear()
        error = self._error if outcome != "moved" else None
        return [Ended(outcome, error, tuple(sorted(self._untold.items(), key=lambda item: item[0])))]

    # What is due

    def _timed(self, now: float) -> list[Action]:
        if self.phase in ("gate", "others", "pulls"):
            for shard, frozen in self._frozen.items():
                if now - frozen.alive_s >= self._lease_s and frozen.answered:
                    return self._undo(self._lost(shard))
        actions: list[Action] = []
        for shard, (again_s, _) in list(self._again.items()):
            if now >= again_s:
                del self._again[shard]
                actions.append(self._tell(shard))
        for shard, frozen in self._frozen.items():
            if now >= self._renew_s(frozen):
                frozen.renewals += 1
                actions.append(self._ask(Renew(shard, frozen.renewals, frozen.answered), frozen, now))
        return actions

    def _renew_s(self, frozen: _Frozen) -> float:
        """When to renew a freeze: one sum, for ``next_s`` and for what is due; a last bit would keep two apart."""
        return frozen.asked_s + self._lease_s / _RENEWALS

    def _lost(self, shard: int) -> MempoolError:
        why = "" if self._error is None else f" ({self._error})"
        return ShardUnavailable(
            f"shard {shard} has not answered for {self._lease_s:g} s that its table is still frozen{why}", shard=shard
        )

    def _freeze(self, shards: Iterable[int], now: float) -> Iterable[Action]:
        for shard in shards:
            self._frozen[shard] = _Frozen(asked_s=now, alive_s=now)
            yield self._ask(Freeze(shard), self._frozen[shard], now)

    def _ask(self, call: Freeze | Renew, frozen: _Frozen, now: float) -> Freeze | Renew:
        frozen.asked_s = frozen.sent[call] = now
        return call
