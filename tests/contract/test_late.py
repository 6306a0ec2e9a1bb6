"""What comes late, or from another time: refused in words that say which of two parties is late; nothing is changed."""

from dataclasses import replace

import pytest
import torch

from mempool.errors import DataLoss, InvalidRequest, NotFound, StalePlacement, StepConflict
from mempool.types import ReadRowsRequest, StepCountRequest, WriteId, WriteRowsRequest

from .bags import make_bags
from .driver import Driver, make_schema, same

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


def test_a_commit_of_a_version_that_was_never_given(driver: Driver) -> None:
    """At the gate, and at another owner, which asks it; nothing waits for what is before it."""
    driver.create(make_schema(), "columns")
    driver.train(1, {0: (make_bags(1), GRADS)})
    driver.gather(make_bags(1))
    driver.update(2, 0, GRADS)
    driver.prepare(2, [0])
    held = driver.contents()
    for shard in driver.owners:
        for version in (3, 2**40):
            ahead = driver.submit(
                driver.host(shard).commit(driver.commit_request(shard, 2, [0], decided=True, version=version))
            )
            words = rf"said to make version {version} .* its gate, shard 0, has given 1 versions so far"
            with pytest.raises(StepConflict, match=words):
                ahead.result(timeout=5)
    assert same(driver.contents(), held)
    assert {reply.version for reply in driver.commit(2, [0]).values()} == {2}
    assert [driver.freeze(shard) for shard in driver.owners] == [2, 2]
    for shard in driver.owners:
        driver.thaw(shard)


def test_its_decider_does_not_believe_that_a_step_is_decided(driver: Driver) -> None:
    """It would be applied there alone, were it not prepared elsewhere."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.call(driver.host(0).prepare(driver.prepare_request(0, 1, [0])))
    held = driver.contents()
    told = driver.commit_request(0, 1, [0], decided=True)
    with pytest.raises(StepConflict, match="its decider, shard 0, has not decided it"):
        driver.call(driver.host(0).commit(told))
    assert same(driver.contents(), held)
    driver.prepare(1, [0])
    assert {reply.version for reply in driver.commit(1, [0]).values()} == {1}


def test_a_step_that_its_decider_does_not_know_stands_in_nobodys_way(driver: Driver) -> None:
    """Its trainer lives, and goes on with the next."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(2, 0, GRADS)
    driver.call(driver.host(1).prepare(driver.prepare_request(1, 1, [])))
    going_on = driver.submit(driver.host(1).prepare(driver.prepare_request(1, 2, [0])))
    assert going_on.result(timeout=5).parts[0].missing == ()
    with pytest.raises(StepConflict, match="step 1 is older and cannot be decided any more"):
        driver.call(driver.host(1).prepare(driver.prepare_request(1, 1, [])))
    for late in (lambda: driver.prepare(1, []), lambda: driver.decide(1, [])):
        with pytest.raises(StepConflict, match="step 1 of rank 0 of group 'trainer' was dropped"):
            late()
    driver.prepare(2, [0])
    assert {reply.version for reply in driver.commit(2, [0]).values()} == {1}


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("generation", [0, 1])
def test_a_later_step_ends_one_that_another_shard_decides(driver: Driver, decided: bool, generation: int) -> None:
    """Whole or not at all: where it was decided it is applied first."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    if decided:
        driver.decide(1, [0])
    going_on = driver.submit(driver.host(1).prepare(driver.prepare_request(1, 2, [], generation=generation)))
    assert going_on.result(timeout=5).parts[0].missing == ()
    assert driver.status(1).version == int(decided)
    if not decided:
        with pytest.raises(StepConflict, match="step 1 of rank 0 of group 'trainer' was dropped"):
            driver.decide(1, [0])
    driver.prepare(2, [], generation=generation)
    assert {reply.version for reply in driver.commit(2, [], generation=generation).values()} == {1 + decided}
    assert [driver.status(shard).version for shard in driver.owners] == [1 + decided] * 2
    assert [driver.status(shard).updates_applied for shard in driver.owners] == [int(decided)] * 2


def test_a_step_names_who_decides_it(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    request = driver.prepare_request(1, 5, [])
    before = driver.contents()
    for number in (0, 4, 2**53 - 1):
        with pytest.raises(InvalidRequest, match=rf"decider_step = {number} of table .* as that table counts it: 5"):
            driver.call(driver.host(1).prepare(replace(request, decider_step=number)))
    with pytest.raises(NotFound, match="has no table 987654"):
        driver.call(driver.host(1).prepare(replace(request, decider_table=987654)))
    with pytest.raises(InvalidRequest, match="step = 0: steps are counted from 1"):
        driver.call(driver.host(1).prepare(driver.prepare_request(1, 0, [])))
    assert same(driver.contents(), before)
    assert [driver.freeze(shard) for shard in driver.owners] == [0, 0]
    for shard in driver.owners:
        driver.thaw(shard)


def _written(driver: Driver, shard: int, value: float, write_id: WriteId) -> WriteRowsRequest:
    """Rows 3 and 40 as that value, as far as a shard has them."""
    blocks = driver.blocks(shard)
    width = len(driver.columns(blocks))
    return WriteRowsRequest(
        envelope=driver.envelope(shard),
        array="values",
        ids=torch.tensor([3, 40]),
        blocks=blocks,
        rows=torch.full((2, width), value),
        write_id=write_id,
    )


def _write(driver: Driver, value: float, write_id: WriteId) -> None:
    for shard in driver.owners:
        driver.call(driver.host(shard).write_rows(_written(driver, shard, value, write_id)))


def _rows(driver: Driver) -> set[float]:
    return set(driver.read("values", torch.tensor([3, 40])).flatten().tolist())


@pytest.mark.parametrize("layout", ["columns", "mixed"])
def test_a_write_that_a_newer_one_followed(driver: Driver, layout: str) -> None:
    """A copy that arrives when its client has long been answered, of what another copy did, or of what none did."""
    driver.create(make_schema(), layout)
    first, given_up = WriteId(writer=7, number=1), WriteId(writer=7, number=2)
    newer = WriteId(writer=7, number=4, open=(3,))
    _write(driver, 1.0, first)
    _write(driver, 4.0, newer)
    before = driver.contents()
    for late in (first, given_up):
        with pytest.raises(InvalidRequest, match="of writer 7 is late: its client has said with write 4 that"):
            _write(driver, 1.0, late)
    assert same(driver.contents(), before)
    _write(driver, 3.0, WriteId(writer=7, number=3))  # began before that one, and is under way
    assert _rows(driver) == {3.0}
    for copy in (newer, WriteId(writer=7, number=3)):
        _write(driver, 9.0, copy)  # answered as it was, and not done again
        assert _rows(driver) == {3.0}
    _write(driver, 8.0, WriteId(writer=8, number=1))
    assert _rows(driver) == {8.0}


def test_a_write_goes_on_where_its_pages_have_moved_to(driver: Driver) -> None:
    """Of one number, it is of other rows at each shard there; a copy by the old view is refused for that."""
    driver.create(make_schema(), "rows")
    write_id = WriteId(writer=7, number=1)
    shard = driver.owners[1]
    late = _written(driver, shard, 1.0, write_id)
    driver.call(driver.host(shard).write_rows(late))  # the other half is not written any more before they move
    driver.move("one")
    _write(driver, 1.0, write_id)
    assert _rows(driver) == {1.0}
    with pytest.raises((StalePlacement, InvalidRequest)):
        driver.call(driver.host(shard).write_rows(late))


def test_a_step_count_that_a_newer_one_followed(driver: Driver) -> None:
    driver.create(make_schema(), "one")

    def count(number: int, to: int) -> int:
        request = StepCountRequest(
            envelope=driver.envelope(0), set=to, at_version=0, write_id=WriteId(writer=7, number=number)
        )
        return driver.call(driver.host(0).step_count(request)).count

    assert count(1, 10) == 10
    assert count(2, 20) == 20
    with pytest.raises(InvalidRequest, match="write 1 of writer 7 is late"):
        count(1, 10)
    assert count(2, 30) == 20  # answered, and not done again
    assert driver.call(driver.host(0).step_count(StepCountRequest(envelope=driver.envelope(0)))).count == 20


def test_writes_that_no_client_numbers_so(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    before = driver.contents()
    bad = WriteId(writer=7, number=5, open=(5,))
    with pytest.raises(InvalidRequest, match=r"open writes \(5\) before write 5 must ascend"):
        _write(driver, 1.0, bad)
    request = StepCountRequest(envelope=driver.envelope(0), set=3, at_version=0, write_id=bad)
    with pytest.raises(InvalidRequest, match=r"open writes \(5\) before write 5 must ascend"):
        driver.call(driver.host(0).step_count(request))
    assert same(driver.contents(), before)
    assert driver.call(driver.host(0).step_count(StepCountRequest(envelope=driver.envelope(0)))).count == 0
