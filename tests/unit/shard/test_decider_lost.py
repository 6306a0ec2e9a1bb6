"""A step's decider is started anew, and its trainer is gone: what a gate has heard of it is not half applied."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from mempool.shard import Engine
from mempool.shard.resolving import Question
from mempool.types import (
    AttachTable,
    CommitPart,
    CommitRequest,
    DecidedStep,
    PreparedPart,
    PreparePart,
    PrepareRequest,
    ResolveReply,
    ResolveRequest,
    ShardInfo,
    StepId,
)
from mempool.wire.channels.loop import run
from tests.contract.driver import Driver, Hosted, make_schema

from .test_moved_decisions import decide_together
from .test_no_half_steps import BOUND_S, Clock, push, until

LATER_S = 11.0


@pytest.fixture
def pool() -> Iterator[tuple[Clock, Callable[[int, int], Hosted]]]:
    """A clock, and what starts a shard under an incarnation: it takes the place of the one before it."""
    clock, engines = Clock(), {}

    def start(shard: int, incarnation: int) -> Hosted:
        if shard in engines:
            run(engines[shard].close(), timeout_s=BOUND_S)
        info = ShardInfo(shard=shard, address="", incarnation=incarnation)
        engines[shard] = Engine(info, peers=lambda source: engines[source.shard], clock=clock)
        return Hosted(host=engines[shard], info=info)

    yield clock, start
    for engine in engines.values():
        run(engine.close(), timeout_s=BOUND_S)


@pytest.mark.parametrize("told", [True, False])
def test_a_part_is_dropped_only_where_its_gate_has_not_heard_of_a_decision(
    pool: tuple[Clock, Callable[[int, int], Hosted]], told: bool
) -> None:
    clock, start = pool
    hosted = [start(shard, 1) for shard in range(3)]
    first = Driver(hosted, table_id=1).create(make_schema(), [[0, 0, 0]] * 7)
    second = Driver(hosted, table_id=2).create(make_schema(name="other"), [[1, 2, 1]] * 7)
    decide_together(first, second, first.step_id(1, "a"))
    if told:
        second.call(second.host(1).commit(second.commit_request(1, 1, [0], decided=True, group="a")))
    anew = start(0, 2)
    infos = (anew.info, hosted[1].info, hosted[2].info)
    lost, empty = (replace(table.placed, shards=infos) for table in (first, second))
    first.call(anew.host.attach_table(AttachTable(view=lost, mode="lost")))
    first.call(anew.host.attach_table(AttachTable(view=empty, mode="empty")))
    clock.ahead_s = LATER_S
    until(lambda: not any(second.status(shard).updates_held for shard in (1, 2)))
    assert [second.status(shard).version for shard in (1, 2)] == [int(told)] * 2


def prepare(driver: Driver, shard: int, step_id: StepId, *, decider: int, attempt: int) -> PreparedPart:
    """At that owner, as part of a step that this table decides."""
    part = PreparePart(envelope=driver.envelope(shard), step_id=step_id, sequences=(0,))
    request = PrepareRequest(
        parts=(part,), want_norm=False, decider_table=decider, decider_step=step_id.step, attempt=attempt
    )
    return driver.call(driver.host(shard).prepare(request)).parts[0]


def decide(tables: list[Driver], step_id: StepId) -> int:
    """The version that the first one's gate gives the step."""
    first = tables[0]
    parts = tuple(
        CommitPart(
            envelope=table.envelope(first.gate),
            step_id=step_id,
            lr=0.1,
            grad_scale=1.0,
            sequences=(0,) if table.gate == first.gate else (),
        )
        for table in tables
    )
    return first.call(first.host(first.gate).commit(CommitRequest(parts=parts))).parts[0].version


@pytest.mark.parametrize("third_at", [1, 2])
def test_a_step_goes_on_under_its_number_where_some_gates_have_heard_of_a_decision(
    pool: tuple[Clock, Callable[[int, int], Hosted]], third_at: int
) -> None:
    """A reader has made table 3's gate ask; then the decider is lost. Its trainer asks both gates what they have."""
    _, start = pool
    hosted = [start(shard, 1) for shard in range(3)]
    places = ((1, 0), (2, 1), (3, third_at))
    tables = [
        Driver(hosted, table_id=table_id).create(make_schema(name=f"t-{table_id}"), [[shard] * 3] * 7)
        for table_id, shard in places
    ]
    one, two, three = tables
    step = one.step_id(1, "a")
    for table in tables:
        push(table, step, prepare=False)
        prepare(table, table.gate, step, decider=1, attempt=1)
    decide(tables, step)
    three.read()
    anew = start(0, 2)
    infos = (anew.info, hosted[1].info, hosted[2].info)
    for table in tables:
        view = replace(table.placed, shards=infos)
        table.hosted[0] = anew
        table.call(anew.host.attach_table(AttachTable(view=view, mode="lost" if table is one else "empty")))
    left = []
    for number, table in enumerate((two, three)):
        reply = prepare(table, table.gate, step, decider=2, attempt=2 + number)
        if reply.missing:  # the new decider was asked, and has dropped it
            push(table, step, prepare=False)
            reply = prepare(table, table.gate, step, decider=2, attempt=4)
        assert not reply.missing
        left += [] if reply.applied else [table]
    assert three not in left
    if left:
        assert decide(left, step) == 1
    two.read()  # what is decided is applied before anything else
    assert [table.status(table.gate).updates_applied for table in (two, three)] == [1, 1]


@pytest.mark.parametrize("state", ["decided", "dropped"])
def test_a_decider_that_a_step_is_prepared_for_no_more_is_not_believed(
    pool: tuple[Clock, Callable[[int, int], Hosted]], state: str
) -> None:
    """Its answer comes late: the trainer has asked this gate, and goes on with another decider."""
    _, start = pool
    hosted = [start(shard, 1) for shard in range(2)]
    one = Driver(hosted, table_id=1).create(make_schema(), [[0, 0, 0]] * 7)
    two = Driver(hosted, table_id=2).create(make_schema(name="two"), [[1, 1, 1]] * 7)
    step = one.step_id(1, "a")
    push(two, step, prepare=False)
    prepare(two, 1, step, decider=1, attempt=1)
    prepare(two, 1, step, decider=2, attempt=2)
    engine = hosted[1].host
    assert isinstance(engine, Engine)
    decided = DecidedStep(table_id=2, version=0, step_id=step, lr=0.1, grad_scale=1.0)
    reply = ResolveReply(version=0, state=state, steps=(decided,) if state == "decided" else ())  # type: ignore[arg-type]
    for last in (None, (1, 1)):
        request = ResolveRequest(table_id=1 if last is None else 2, step_id=step)
        engine._tenancy.decisions.told(Question(hosted[0].info, request, (2,), 0.0, last=last), reply)
    assert two.status(1).version == 0
    assert two.status(1).updates_held == 1
    assert decide([two], step) == 1
