"""One round of a move by events alone: calls that are lost, late or refused, leases that end, controllers that die."""

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.agreement import rounds
from mempool.agreement.rounds import (
    Action,
    Answered,
    Call,
    Decided,
    Ended,
    Failed,
    Freeze,
    Pull,
    Renew,
    Round,
    Tell,
    Thaw,
    Ticked,
)
from mempool.agreement.rounds_here import fate_of_lapsed
from mempool.errors import DeadlineExceeded, Internal, MempoolError, ShardUnavailable, StalePlacement

LEASE_S = 9.0


def made(*, others: tuple[int, ...] = (1, 2), bystanders: tuple[int, ...] = (), pulls: int = 2) -> Round:
    return Round(gate=0, others=others, bystanders=bystanders, pulls=pulls, lease_s=LEASE_S)


def answered(round_: Round, *calls: Call, now: float = 0.0) -> list[Action]:
    return [action for call in calls for action in round_.handle(Answered(call), now)]


def test_a_round_goes_gate_first_and_ends_when_all_know() -> None:
    round_ = made(bystanders=(7,))
    assert round_.begin(0.0) == [Freeze(0)]
    assert round_.waits_for == (0,)
    assert answered(round_, Freeze(0), now=0.5) == [Freeze(1), Freeze(2)]
    assert answered(round_, Freeze(2), now=0.5) == []
    assert answered(round_, Freeze(1), now=3.0 / 4) == [Pull(0), Pull(1)]
    assert answered(round_, Pull(1), now=0.75) == []
    assert answered(round_, Pull(0), now=0.875) == [Tell(0, token=True)], "the gate alone: it decides"
    assert (round_.held_s, round_.at_rest_s, round_.pulled_s) == (0.5, 0.75, 0.875)
    assert not round_.decided
    told = answered(round_, Tell(0, token=True))
    assert told == [Decided(), Tell(1, token=True), Tell(2, token=True), Tell(7, token=False)]
    assert answered(round_, Tell(7, token=False), Tell(1, token=True)) == []
    assert answered(round_, Tell(2, token=True)) == [Ended("moved")]
    assert round_.next_s is None


def test_a_freeze_is_renewed_at_a_third_of_its_lease_also_while_it_waits() -> None:
    round_ = made(others=())
    round_.begin(0.0)
    assert round_.next_s == rounds._LONG_S
    assert round_.handle(Ticked(), 2.9) == []
    assert round_.waits_long(2.9)
    assert round_.handle(Ticked(), 3.0) == [Renew(0, 1)]
    assert round_.handle(Ticked(), 3.1) == []
    assert round_.handle(Ticked(), 6.0) == [Renew(0, 2)], "though the first is not answered: it waits for the same step"
    assert answered(round_, Renew(0, 1), now=6.1) == [Pull(0), Pull(1)]
    assert not round_.waits_long(99.0)
    assert round_.handle(Ticked(), 9.0) == [Renew(0, 3, begun=True)]


def test_a_freeze_that_waited_for_a_lease_is_not_taken_for_lost_when_it_is_answered() -> None:
    """A dead trainer's step ends with a lease as long as the freeze's."""
    round_ = made(others=(1,))
    round_.begin(0.0)
    for number in (1, 2, 3):
        assert round_.handle(Ticked(), 3.0 * number) == [Renew(0, number)]
    assert answered(round_, Freeze(0), now=10.5) == [Freeze(1)]
    assert answered(round_, Renew(0, 1), Renew(0, 2), Renew(0, 3), Freeze(1), now=10.5) == [Pull(0), Pull(1)]


def test_a_shard_that_does_not_renew_for_a_lease_undoes_the_round() -> None:
    round_ = made(others=(1,))
    round_.begin(0.0)
    answered(round_, Freeze(0), Freeze(1))
    renewed = [Renew(0, 1, begun=True), Renew(1, 1, begun=True)]
    assert round_.handle(Ticked(), 3.0) == renewed
    assert answered(round_, renewed[1], now=3.1) == []
    assert round_.handle(Failed(renewed[0], ShardUnavailable("lost")), 3.1) == []
    assert Thaw(0) not in round_.handle(Ticked(), 8.9)
    assert round_.handle(Ticked(), 9.0) == [Thaw(0), Thaw(1)]
    assert answered(round_, Thaw(1)) == []
    (ended,) = round_.handle(Failed(Thaw(0), ShardUnavailable("gone")), 9.5)
    assert isinstance(ended, Ended)
    assert ended.outcome == "undone"
    assert "shard 0 has not answered for 9 s" in str(ended.error)
    assert "lost" in str(ended.error)


def test_a_shard_that_was_started_anew_is_not_frozen_as_if_nothing_had_been() -> None:
    """It has let others write since, and knows no more that the round was over there, perhaps."""
    round_ = made(others=(1,))
    round_.begin(0.0)
    answered(round_, Freeze(0), Freeze(1))
    renewed = [Renew(0, 1, begun=True), Renew(1, 1, begun=True)]
    assert round_.handle(Ticked(), 3.0) == renewed
    assert round_.handle(Failed(renewed[1], StalePlacement("it does not hold")), 3.1) == [Thaw(0), Thaw(1)]


@pytest.mark.parametrize("call", [Freeze(1), Pull(1)])
def test_what_fails_before_the_decision_undoes_the_round(call: Call) -> None:
    round_ = made()
    round_.begin(0.0)
    answered(round_, Freeze(0), Freeze(2))
    if isinstance(call, Pull):
        answered(round_, Freeze(1), Pull(0))
    error = ShardUnavailable("cut")
    assert round_.handle(Failed(call, error), 1.0) == [Thaw(0), Thaw(1), Thaw(2)]
    assert answered(round_, Pull(0), Pull(1), Freeze(1), Thaw(0), Thaw(1)) == [], "late answers begin nothing"
    assert answered(round_, Thaw(2)) == [Ended("undone", error)]


def test_what_undid_a_round_is_told_whatever_its_cut_off_renewals_say() -> None:
    round_ = made(others=(1,))
    round_.begin(0.0)
    round_.handle(Ticked(), 3.4)
    late = DeadlineExceeded("did not come to rest")
    round_.handle(Failed(Freeze(0), late), 7.0)
    round_.handle(Failed(Renew(0, 1), asyncio.CancelledError()), 7.0)
    answered(round_, Thaw(0), now=7.0)
    assert answered(round_, Thaw(1), now=7.0) == [Ended("undone", late)]


def decided(round_: Round) -> None:
    round_.begin(0.0)
    answered(round_, Freeze(0), Freeze(1), Freeze(2), Pull(0), Pull(1), Tell(0, token=True))
    assert round_.decided


def test_after_the_decision_it_only_goes_forward() -> None:
    round_ = made(bystanders=(5,))
    decided(round_)
    error = ShardUnavailable("cut")
    for number in range(rounds._TELL_TRIES - 1):
        now = 0.6 * number
        assert round_.handle(Failed(Tell(1, token=True), error), now) == []
        assert round_.next_s is not None
        assert Tell(1, token=True) in round_.handle(Ticked(), now + rounds._TELL_PAUSE_S)
    assert round_.handle(Failed(Tell(5, token=False), error), 2.0) == [], "a bystander is told when it is settled"
    assert round_.handle(Failed(Tell(1, token=True), error), 2.0) == []
    assert answered(round_, Tell(2, token=True), now=2.0) == [Ended("moved", untold=((1, error), (5, error)))]


def test_a_gate_that_refuses_the_view_has_decided_nothing() -> None:
    round_ = made(pulls=0)
    round_.begin(0.0)
    answered(round_, Freeze(0), Freeze(1))
    assert answered(round_, Freeze(2)) == [Tell(0, token=True)]
    refused = StalePlacement("the round is over")
    assert round_.handle(Failed(Tell(0, token=True), refused), 1.0) == [Thaw(0), Thaw(1), Thaw(2)]
    assert answered(round_, Thaw(0), Thaw(1), Thaw(2)) == [Ended("undone", refused)]


def test_a_gate_that_says_nothing_leaves_it_open_and_nobody_thawed() -> None:
    round_ = made(pulls=0, others=(1,))
    round_.begin(0.0)
    answered(round_, Freeze(0), Freeze(1))
    error = ShardUnavailable("away")
    actions: list[Action] = []
    for number in range(rounds._TELL_TRIES):
        actions += round_.handle(Failed(Tell(0, token=True), error), float(number))
        actions += round_.handle(Ticked(), number + rounds._TELL_PAUSE_S)
    assert not any(isinstance(action, Thaw) for action in actions)
    assert actions[-1] == Ended("unknown", error)


def test_whoever_stops_undoes_it_only_before_the_decision_may_have_fallen() -> None:
    error = RuntimeError("closing")
    round_ = made()
    round_.begin(0.0)
    assert round_.abandon(error) == [Thaw(0), Thaw(1), Thaw(2)]
    late = made(pulls=0, others=())
    late.begin(0.0)
    assert answered(late, Freeze(0)) == [Tell(0, token=True)]
    assert late.abandon(error) == [Ended("unknown", error)]
    forward = made()
    decided(forward)
    assert forward.abandon(error) == [Ended("moved")]


# A pool of models: shards that do what docs/agreement.md says, of which calls and answers may be lost or late.


@dataclass
class Shard:
    """Shard 0 is the gate. Pull n goes from shard n to shard n + 1; a write is one that the shard acknowledges."""

    number: int
    epoch: int = 0
    held: bool = False
    over: bool = False
    ends_s: float = 0.0
    staged: int | None = None
    """The number of writes that its source had taken when it was pulled."""
    writes: int = 0
    adopted: int | None = None


@dataclass
class World:
    """All shards, and the clock."""

    shards: list[Shard]
    pulls: int
    now: float = 0.0
    late: list[Call] = field(default_factory=list)

    def carry(self, call: Call) -> None:
        """What a shard does. Raises what it answers."""
        if isinstance(call, Pull):
            self._pull(call.number)
            return
        shard = self.shards[call.shard]
        if isinstance(call, Thaw):
            shard.over = True
            if shard.held:
                shard.held, shard.staged = False, None
        elif isinstance(call, Tell):
            self._adopt(shard, token=call.token)
        elif shard.over or shard.epoch:
            raise StalePlacement("this round is over")
        else:
            shard.held, shard.ends_s = True, self.now + LEASE_S

    def _pull(self, number: int) -> None:
        source, dest = self.shards[number], self.shards[number + 1]
        if not dest.held or not source.held:
            raise StalePlacement("no such round")
        dest.staged = source.writes

    def _adopt(self, shard: Shard, *, token: bool) -> None:
        if shard.epoch:
            return
        if token and not shard.held:
            raise StalePlacement("no such round")
        if 0 < shard.number <= self.pulls:
            if shard.staged is None:
                raise Internal("the view gives it pages that it does not have")
            shard.adopted = shard.staged
        shard.epoch, shard.held, shard.over, shard.staged = 1, False, True, None

    def look(self, shard: Shard, *, heard: bool) -> None:
        """A shard looks at the lease of its freeze; ``heard``: the gate answers."""
        if not shard.held or self.now < shard.ends_s:
            return
        gate = self.shards[0]
        if shard is gate:
            shard.held, shard.over, shard.staged = False, True, None
            return
        gate_epoch = gate.epoch if heard else None
        fate = fate_of_lapsed("r", epoch=shard.epoch, gate_epoch=gate_epoch, gate_token="r" if gate.held else None)
        if fate == "thaw":
            shard.held, shard.over, shard.staged = False, True, None
        elif fate == "adopt":
            self._adopt(shard, token=False)

    def write(self, shard: Shard) -> None:
        if not shard.held and shard.epoch == 0:
            shard.writes += 1


def play(chance: random.Random, *, dies: bool) -> tuple[World, Ended | None]:
    """One round under faults, until it has ended, or its controller has died; late calls arrive all the same."""
    size = chance.randint(2, 4)
    world = World([Shard(number) for number in range(size)], pulls=chance.randint(1, size - 1))
    round_ = Round(gate=0, others=range(1, size), pulls=world.pulls, lease_s=LEASE_S)
    actions, ended = round_.begin(0.0), None
    out: list[Call] = []
    trouble, gate_is_away = chance.choice([0.02, 0.1, 0.3]), chance.random() < 0.2
    for _ in range(120):
        out += [action for action in actions if not isinstance(action, Decided | Ended)]
        ended = next((action for action in actions if isinstance(action, Ended)), None)
        if ended is not None or (dies and chance.random() < 0.05):
            break
        actions = []
        world.now += chance.choice([0.0, 0.01, 0.1, 0.3]) + (chance.random() < trouble) * chance.uniform(0, 2 * LEASE_S)
        bystander = chance.choice(world.shards)
        world.write(bystander)
        world.look(chance.choice(world.shards), heard=chance.random() > trouble)
        if out and chance.random() < 0.9:
            call = out.pop(chance.randrange(len(out)))
            actions = round_.handle(
                _became(world, call, chance, 0.9 if gate_is_away and call == Tell(0, token=True) else trouble),
                world.now,
            )
        else:
            actions = round_.handle(Ticked(), world.now)
    world.late += out
    chance.shuffle(world.late)
    return world, ended


def _became(world: World, call: Call, chance: random.Random, trouble: float) -> Answered | Failed:
    lost = chance.random() < trouble
    if lost and chance.random() < 0.5:
        world.late.append(call)  # it arrives when nobody waits any more
        return Failed(call, ShardUnavailable("lost"))
    try:
        world.carry(call)
    except MempoolError as error:
        return Failed(call, error)
    return Failed(call, ShardUnavailable("the answer was lost")) if lost else Answered(call)


def settle_down(world: World, chance: random.Random) -> None:
    """Nobody looks after the round: late calls arrive, leases end, shards ask."""
    for number in range(60):
        world.now += LEASE_S / 10
        if world.late and chance.random() < 0.5:
            with suppress(StalePlacement):
                world.carry(world.late.pop())
        for shard in chance.sample(world.shards, len(world.shards)):
            world.look(shard, heard=number > 20 or chance.random() < 0.5)
            world.write(shard)


@given(chance=st.randoms(use_true_random=False), dies=st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_write_is_lost_and_nobody_stays_frozen_whatever_happens(chance: random.Random, dies: bool) -> None:
    world, ended = play(chance, dies=dies)
    gate = world.shards[0]
    if ended is not None and ended.outcome == "moved":
        assert gate.epoch == 1
    if ended is not None and ended.outcome == "undone":
        assert gate.epoch == 0
    settle_down(world, chance)
    assert {shard.held for shard in world.shards} == {False}
    told = {shard.number for shard in world.shards if shard.epoch == gate.epoch}
    assert told == {shard.number for shard in world.shards}, "all follow the gate, without any controller"
    if gate.epoch == 1:
        for number in range(world.pulls):
            source, dest = world.shards[number], world.shards[number + 1]
            assert dest.adopted == source.writes, "a write was acknowledged that the new owner does not have"


def test_a_shard_whose_lease_ended_waits_for_a_gate_that_still_holds() -> None:
    """The round may be decided yet: a write that is taken meanwhile would be lost."""
    world = World([Shard(0), Shard(1)], pulls=1)
    source, dest = world.shards
    for call in (Freeze(0), Freeze(1), Pull(0)):
        world.carry(call)
    source.ends_s = LEASE_S + 5  # the gate's was renewed, the other renewal was lost
    world.now = LEASE_S + 1
    world.look(dest, heard=True)
    assert dest.held
    world.carry(Tell(0, token=True))
    world.write(dest)
    assert dest.writes == 0
    world.look(dest, heard=False)
    assert dest.held
    world.look(dest, heard=True)
    assert (dest.epoch, dest.held, dest.adopted) == (1, False, 0)


def test_the_play_meets_every_end() -> None:
    """Else the test above would prove little."""
    ends = set()
    for seed in range(150):
        world, ended = play(random.Random(seed), dies=seed % 2 == 0)
        ends.add((None if ended is None else ended.outcome, world.shards[0].epoch))
    assert ends >= {("moved", 1), ("undone", 0), ("unknown", 0), ("unknown", 1), (None, 0), (None, 1)}
