"""A shard that has lost its pages of one table: steps that had a part in it do not hold up other tables."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mempool.errors import DataLoss, StepConflict
from mempool.types import AttachTable, DiscardPart, DiscardRequest
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, Hosted, make_schema

from .conftest import MakeDriver
from .test_decider_lost import Clock, pool  # noqa: F401
from .test_moved_decisions import decide_together, prepare_together
from .test_no_half_steps import push, versions


def test_a_step_can_be_given_up_where_its_table_is_lost(
    pool: tuple[Clock, Callable[[int, int], Hosted]],  # noqa: F811
) -> None:
    _, start = pool
    hosted = [start(shard, 1) for shard in range(2)]
    lost = Driver(hosted, table_id=1).create(make_schema(), [[0, 1, 1]] * 7)
    whole = Driver(hosted, table_id=2).create(make_schema(name="other"), [[0, 0, 0]] * 7)
    step_id = lost.step_id(1)
    push(lost, step_id)
    lost.hosted[1] = whole.hosted[1] = anew = start(1, 2)
    view = replace(lost.placed, shards=(hosted[0].info, anew.info))
    lost.call(anew.host.attach_table(AttachTable(view=view, mode="lost")))
    with pytest.raises(DataLoss):
        lost.call(lost.host(1).prepare(lost.prepare_request(1, 1, [0])))
    for shard in (0, 1):
        part = DiscardPart(envelope=lost.envelope(shard), step_id=step_id)
        discarded = lost.call(lost.host(shard).discard(DiscardRequest(parts=(part,)))).discarded
        assert discarded == (1 if shard == 0 else 0)
    whole.train(1, {0: (make_bags(1), torch.ones(4, 10))})
    assert whole.status(0).version == 1


@pytest.mark.parametrize("decided", [True, False])
def test_a_trainer_that_goes_on_without_the_deciders_table_hears_first_what_that_has_decided(
    make_driver: MakeDriver, decided: bool
) -> None:
    """Its Commit was not answered, and that table was dropped: its updates are not applied under two numbers."""
    first = make_driver(3).create(make_schema(), [[0, 0, 0]] * 7)
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"), [[1, 2, 1]] * 7)
    step_id = first.step_id(1, "a")
    if decided:
        decide_together(first, second, step_id)
    else:
        prepare_together(first, second, step_id)
    for hosted in first.hosted:
        first.call(hosted.host.drop_table(1))
    commit = second.host(1).commit(second.commit_request(1, 1, [0], group="a"))
    if decided:
        assert second.call(commit).parts[0].version == 1
        second.call(second.host(2).commit(second.commit_request(2, 1, [0], group="a", decided=True, version=1)))
        assert versions(second) == [1, 1]
        return
    with pytest.raises(StepConflict, match="With that the step is over here, too"):
        second.call(commit)
    push(second, second.step_id(2, "a"))
    assert second.call(second.host(1).commit(second.commit_request(1, 2, [0], group="a"))).parts[0].version == 1
    second.call(second.host(2).commit(second.commit_request(2, 2, [0], group="a", decided=True, version=1)))
    assert versions(second) == [1, 1]
    assert [second.status(shard).updates_applied for shard in (1, 2)] == [1, 1]
