"""What comes late, or from another time: refused in words that say which of two parties is late; nothing is changed."""

from dataclasses import replace

import pytest
import torch

from mempool.errors import DataLoss, StalePlacement, StepConflict
from mempool.types import ReadRowsRequest

from .driver import Driver, make_bags, make_schema, same

GRADS = torch.linspace(-1, 1, 40).view(4, 10)


def test_a_generation_that_is_over(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    driver.train(3, {0: (make_bags(1), GRADS)})
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS, step_id=driver.step_id(1, generation=2))
    driver.prepare(1, [0], generation=2)
    driver.commit(1, [0], generation=2)
    before = driver.contents()
    for late in (
        lambda: driver.prepare(4, [], generation=1),
        lambda: driver.decide(4, [], generation=1),
        lambda: driver.update(4, 0, GRADS, step_id=driver.step_id(4, generation=1)),
        lambda: driver.call(
            driver.host(1).commit(driver.commit_request(1, 4, [], decided=True, version=3, generation=1))
        ),
    ):
        with pytest.raises(StepConflict, match="generation 1, and generation 2 has begun: this trainer was replaced"):
            late()
    assert same(driver.contents(), before)


def test_a_round_of_another_controller_and_one_that_is_over(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    driver.train(1, {0: (make_bags(1), GRADS)})
    target = driver.make_view(driver.schema, [[1, 1, 1]] * 7, epoch=2)
    ((dest, pull),) = driver.pulls(target)
    for shard in driver.owners:
        driver.freeze(shard, token="first")
    before = driver.contents()

    def refused(token: str, words: str) -> None:
        for shard in driver.owners:
            with pytest.raises(StalePlacement, match=words):
                driver.freeze(shard, token=token)
            with pytest.raises(StalePlacement, match=words):
                driver.call(driver.host(shard).set_view(target, token=token))
        with pytest.raises(StalePlacement, match=words):
            driver.call(driver.host(dest).pull_pages(replace(pull, token=token)))
        driver.thaw(dest, token=token)  # no error, and no effect on the round that holds it
        assert same(driver.contents(), before)
        assert driver.status(dest).epoch == 1

    refused("second", "round 'first' of a move holds the table, and round 'second' asks: one of the two controllers is")
    assert [driver.status(shard).round for shard in driver.owners] == ["first", "first"]
    for shard in driver.owners:
        driver.thaw(shard, token="first")
    refused("first", "round 'first' of a move is over on this shard: its controller was not heard of within")
    assert [driver.status(shard).frozen for shard in driver.owners] == [False, False]


def test_a_version_that_was_never_given(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    driver.train(1, {0: (make_bags(1), GRADS)})
    before = driver.contents()
    for shard in driver.owners:
        envelope = driver.envelope(shard, table_version=9)
        request = ReadRowsRequest(envelope=envelope, array="values", ids=torch.arange(3))
        with pytest.raises(
            DataLoss, match=r"at version 1, and this client has seen version 9 .* or that version was never"
        ):
            driver.call(driver.host(shard).read_rows(request))
    driver.gather(make_bags(1))
    driver.update(2, 0, GRADS)
    driver.prepare(2, [0])
    held = driver.contents()
    taken = driver.commit_request(1, 2, [0], decided=True, version=1)
    with pytest.raises(StepConflict, match=r"said to make version 1 .* which another step has made"):
        driver.call(driver.host(1).commit(taken))
    numbered_elsewhere = driver.commit_request(1, 2, [0], decided=True)
    with pytest.raises(StalePlacement, match=r"shard 1 gives no versions to steps of table .* shard 0 does"):
        driver.call(driver.host(1).commit(numbered_elsewhere))
    assert same(driver.contents(), held)
    driver.commit(2, [0])
    assert before.keys() == held.keys()
