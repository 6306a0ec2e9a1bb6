"""A shard that has lost its pages of one table: steps that had a part in it do not hold up other tables."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mempool.errors import DataLoss
from mempool.types import AttachTable, DiscardPart, DiscardRequest
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, Hosted, make_schema

from .test_decider_lost import Clock, pool  # noqa: F401
from .test_no_half_steps import push


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
