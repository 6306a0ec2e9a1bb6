"""The moment of a checkpoint, by events alone: no mark before all stand still, no freeze that outlives the end."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.controller.saving.cut import (
    LEASE_S,
    Action,
    Answered,
    Call,
    Cut,
    Ended,
    Event,
    Failed,
    Freeze,
    Mark,
    Owner,
    Thaw,
    Ticked,
)
from mempool.errors import Internal, ShardUnavailable, StalePlacement

PLACED = st.dictionaries(
    st.integers(1, 4), st.frozensets(st.integers(0, 3), min_size=1).map(sorted), min_size=1, max_size=3
)


@dataclass
class World:
    """Shards that carry calls out; what they must never see is asserted."""

    owners: dict[int, list[int]]
    versions: dict[int, int]
    frozen: set[Owner] = field(default_factory=set)
    marked: set[Owner] = field(default_factory=set)
    over: set[Owner] = field(default_factory=set)

    def all(self) -> set[Owner]:
        return {Owner(table, shard) for table, shards in self.owners.items() for shard in shards}

    def see(self, call: Call) -> None:
        owner = call.owner
        if isinstance(call, Freeze) and owner.shard != min(self.owners[owner.table_id]):
            assert Owner(owner.table_id, min(self.owners[owner.table_id])) in self.frozen, "gates first"
        if isinstance(call, Mark):
            assert self.frozen == self.all(), "all stand still before any is marked"
            assert call.version == self.versions[owner.table_id]

    def do(self, call: Call) -> Event:
        if isinstance(call, Freeze):
            if call.owner in self.over:  # as a shard refuses what is late
                return Failed(call, StalePlacement("over"))
            self.frozen.add(call.owner)
            return Answered(call, self.versions[call.owner.table_id])
        if isinstance(call, Mark):
            self.marked.add(call.owner)
        else:
            self.frozen.discard(call.owner)
            self.over.add(call.owner)
        return Answered(call)


@settings(max_examples=300)
@given(PLACED, st.data())
def test_whatever_comes_in_whatever_order(owners: dict[int, list[int]], data: st.DataObject) -> None:
    world = World(owners, {table: 10 * table for table in owners})
    cut, now_s, failed, ticks = Cut(owners), 0.0, 0, 0
    ended: Ended | None = None
    open_calls: list[Call] = []

    def take(actions: list[Action]) -> None:
        nonlocal ended
        for action in actions:
            assert ended is None, "nothing after the end"
            if isinstance(action, Ended):
                ended = action
            else:
                world.see(action)
                open_calls.append(action)

    take(cut.begin(now_s))
    for _ in range(400):
        if ended is not None:
            break
        if ticks < 5 and cut.next_s < float("inf") and data.draw(st.integers(0, 9)) == 0:
            now_s, ticks = cut.next_s, ticks + 1
            take(cut.handle(Ticked(), now_s))
            continue
        assert open_calls, "it waits for something"
        call = open_calls.pop(data.draw(st.integers(0, len(open_calls) - 1)))
        if not isinstance(call, Thaw) and failed < 2 and data.draw(st.integers(0, 19)) == 0:
            failed += 1
            if data.draw(st.booleans()):
                world.do(call)  # it took effect, and nobody heard
            take(cut.handle(Failed(call, ShardUnavailable("gone")), now_s))
        else:
            take(cut.handle(world.do(call), now_s))
    assert ended is not None
    if ended.error is None:
        assert world.marked == world.all()
        assert ended.versions == world.versions
    else:
        assert failed
    for call in open_calls:
        assert cut.handle(world.do(call), now_s) == [], "what is late changes nothing"
    assert not world.frozen


def test_owners_that_stand_at_different_versions_make_no_moment() -> None:
    cut = Cut({1: (0, 1)})
    (gate,) = cut.begin(0.0)
    assert isinstance(gate, Freeze)
    (other,) = cut.handle(Answered(gate, 7), 0.1)
    assert isinstance(other, Freeze)
    thaws = cut.handle(Answered(other, 6), 0.2)
    assert [type(call) for call in thaws] == [Thaw, Thaw]
    for call in thaws[:-1]:
        assert isinstance(call, Thaw)
        assert cut.handle(Failed(call, ShardUnavailable("gone")), 0.3) == []
    assert isinstance(thaws[-1], Thaw)
    (ended,) = cut.handle(Answered(thaws[-1]), 0.4)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, Internal)
    assert ended.held_s == 0.4


def test_a_gate_whose_freeze_ended_meanwhile_is_no_bug() -> None:
    cut = Cut({1: (0, 1)})
    (gate,) = cut.begin(0.0)
    assert isinstance(gate, Freeze)
    (other,) = cut.handle(Answered(gate, 5), 2 * LEASE_S)  # long under way: steps go on at the gate
    assert isinstance(other, Freeze)
    first, second = cut.handle(Answered(other, 7), 2 * LEASE_S)
    assert isinstance(first, Thaw)
    assert isinstance(second, Thaw)
    assert cut.handle(Answered(first), 2 * LEASE_S) == []
    (ended,) = cut.handle(Answered(second), 2 * LEASE_S)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, ShardUnavailable)
    assert "frozen at version 5, and is at 7 on shard 1" in str(ended.error)


def test_freezes_are_renewed_until_all_are_marked() -> None:
    cut = Cut({1: (0,), 2: (1,)})
    first, second = cut.begin(0.0)
    assert isinstance(first, Freeze)
    assert isinstance(second, Freeze)
    assert cut.handle(Answered(first, 1), 0.1) == []
    assert cut.handle(Ticked(), 0.2) == [], "not due"
    renewed, waiting = cut.handle(Ticked(), LEASE_S / 3)
    assert renewed == Freeze(first.owner, 1, begun=True)
    assert waiting == Freeze(second.owner, 1), "it may wait for a step for longer than its lease"
    marks = cut.handle(Answered(second, 2), 4.0)
    assert marks == [Mark(first.owner, 1), Mark(second.owner, 2)]
    assert isinstance(renewed, Freeze)
    assert cut.handle(Answered(renewed, 1), 4.1) == []
    thaws = cut.handle(Failed(Mark(first.owner, 1), ShardUnavailable("gone")), 4.2)
    assert thaws == [Thaw(first.owner), Thaw(second.owner)]
    assert cut.next_s == float("inf")
