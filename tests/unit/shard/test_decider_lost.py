"""A step's decider is started anew, and its trainer is gone: what a gate has heard of it is not half applied."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from mempool.shard import Engine
from mempool.types import AttachTable, ShardInfo
from mempool.wire.channels.loop import run
from tests.contract.driver import Driver, Hosted, make_schema

from .test_moved_decisions import decide_together
from .test_no_half_steps import BOUND_S, Clock, until

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
