"""Pages changing their owner: whole, with state and ledger, without held updates, and nobody notices."""

import itertools

import numpy as np
import pytest
import torch

from mempool.errors import ContextMissing, DeadlineExceeded, Internal, InvalidRequest, StalePlacement
from mempool.types import (
    AttachTable,
    ExportPages,
    FlatKeySpec,
    Ledger,
    OptimizerSpec,
    ProductKeySpec,
    PullPages,
    WriteRowsRequest,
)

from .driver import LAYOUTS, Driver, make_bags, make_schema, relative_error, same

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
OPTIMIZERS = {
    "sgd": OptimizerSpec(algorithm="sgd", lr=0.1),
    "adam": OptimizerSpec(algorithm="adam", lr=0.1, eps=1e-8),
    "rowwise_adagrad": OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1),
}
ARRAYS = {
    "sgd": ("values", "keys"),
    "adam": ("values", "values.exp_avg", "values.exp_avg_sq", "keys"),
    "rowwise_adagrad": ("values", "values.row_sum", "keys"),
}


def _pages(driver: Driver) -> int:
    return sum(driver.status(shard).pages for shard in range(len(driver.hosted)))


@pytest.mark.parametrize(
    ("before", "after", "algorithm"),
    [(*pair, algorithm) for pair, algorithm in zip(itertools.permutations(LAYOUTS, 2), itertools.cycle(OPTIMIZERS))],
)
def test_everything_moves_and_training_goes_on(driver: Driver, before: str, after: str, algorithm: str) -> None:
    schema = make_schema(optimizer=OPTIMIZERS[algorithm], keys=FlatKeySpec(key_dim=5))
    driver.create(schema, before)
    driver.train(1, {0: (make_bags(1), GRADS)})
    arrays = {array: driver.read(array) for array in ARRAYS[algorithm]}
    moved = driver.move(after)
    assert moved == int((np.array(LAYOUTS[before]) != np.array(LAYOUTS[after])).sum())
    assert same({array: driver.read(array) for array in ARRAYS[algorithm]}, arrays)
    assert _pages(driver) == 21
    driver.train(2, {1: (make_bags(2), GRADS)})
    moved_values = driver.read()
    driver.drop()
    driver.create(schema, before)
    driver.train(1, {0: (make_bags(1), GRADS)})
    driver.train(2, {1: (make_bags(2), GRADS)})
    # Row splits change the order of no sum over a slot's pairs, so training is equal to the bit.
    assert torch.equal(driver.read(), moved_values)


def test_there_and_back(driver: Driver) -> None:
    driver.create(make_schema(keys=FlatKeySpec(key_dim=5)), "one")
    driver.train(1, {0: (make_bags(1), GRADS)})
    contents = driver.contents()
    for layout in ("columns", "mixed", "rows", "grid", "one"):
        driver.move(layout)
    assert same(driver.contents(), contents)


def test_head_keys_move(driver: Driver) -> None:
    schema = make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=3, key_dim=4))
    driver.create(schema, "one", [0, 0, 0])
    keys = driver.read("keys", torch.arange(3))
    for key_owners in ([1, 0, 2], [1, 1, 1], [0, 0, 0]):
        driver.move("one", key_owners)
        assert torch.equal(driver.read("keys", torch.arange(3)), keys)
        heads = {
            head: shard for shard, (heads, _, _) in driver.score(torch.randn(2, 3, 4), 2).items() for head in heads
        }
        assert heads == dict(enumerate(key_owners))


def test_the_ledger_moves_with_the_pages(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.train(1, {0: (make_bags(1), GRADS), 1: (make_bags(2), GRADS)})
    driver.move([[1, 1, 1]] * 7)
    assert driver.owners == (1,)
    assert driver.call(driver.host(1).freeze(driver.table_id, 5.0)) == 1
    driver.call(driver.host(1).thaw(driver.table_id))
    assert driver.ledger(1) == Ledger(version=1, updates_applied=2, entries={("trainer", 0): 1})
    assert driver.prepare(1, [0, 1])[1].applied
    before = driver.contents()
    assert driver.commit(1, [0, 1])[1].applied
    assert same(driver.contents(), before)
    assert driver.status(0).pages == 0


def test_a_ledger_of_very_many_groups_with_long_names_moves_once(driver: Driver) -> None:
    """More than any message's header may hold, whatever the number of batches that the pages come in."""
    entries = {(f"{number:0256d}", 0): number + 1 for number in range(16_384)}
    ledger = Ledger(version=5, updates_applied=16_384, entries=entries, step_offset=2)
    driver.view = driver.make_view(make_schema(), LAYOUTS["one"], epoch=1)
    driver.call(driver.host(0).attach_table(AttachTable(view=driver.view, mode="initialise", ledger=ledger)))
    for shard in range(1, len(driver.hosted)):
        driver.call(driver.host(shard).attach_table(AttachTable(view=driver.view, mode="empty")))
    before = driver.read()
    driver.move("rows")
    assert driver.ledger(1) == ledger
    assert driver.status(1).version == 5
    driver.move("grid")
    assert [driver.ledger(shard) for shard in (0, 2)] == [ledger, ledger]
    assert torch.equal(driver.read(), before)


def test_held_updates_stay_behind_and_are_sent_again(driver: Driver) -> None:
    bags = make_bags(1)
    driver.create(make_schema(), "one")
    driver.train(1, {0: (bags, GRADS)})
    expected = driver.read()
    driver.drop()
    driver.create(make_schema(), "one")
    driver.gather(bags)
    driver.update(1, 0, GRADS)
    driver.move("columns")
    assert {driver.status(shard).updates_held for shard in (0, 1)} == {0}
    assert {shard: reply.missing for shard, reply in driver.prepare(1, [0]).items()} == {0: (0,), 1: (0,)}
    driver.update(1, 0, GRADS, bags=bags)
    driver.prepare(1, [0])
    driver.commit(1, [0])
    assert torch.equal(driver.read(), expected)


def test_requests_of_the_old_epoch_are_fenced_off(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    old = {
        "update": driver.update_request(0, 1, 0, GRADS),
        "prepare": driver.prepare_request(0, 1, []),
        "commit": driver.commit_request(0, 1, [], one_phase=True),
    }
    driver.move("columns")
    before = driver.contents()
    for method, request in old.items():
        with pytest.raises(StalePlacement, match="epoch"):
            driver.call(getattr(driver.host(0), method)(request))
    assert same(driver.contents(), before)


def test_contexts_end_with_the_epoch(driver: Driver) -> None:
    """Pairs are routed by placement: ids remembered under an older one would not fit."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.move([[0, 0, 1]] * 7)
    with pytest.raises(ContextMissing):
        driver.update(1, 0, GRADS)


def test_a_freeze_holds_off_writers_and_lets_readers_pass(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    bags = make_bags(1)
    driver.gather(bags)
    driver.update(1, 0, GRADS)
    assert driver.call(driver.host(0).freeze(driver.table_id, 5.0)) == 0
    assert driver.status(0).frozen
    rows = WriteRowsRequest(
        envelope=driver.envelope(0), array="values", ids=torch.tensor([0]), blocks=(0, 1, 2), rows=torch.ones(1, 10)
    )
    waiting = [
        driver.submit(driver.host(0).prepare(driver.prepare_request(0, 1, [0]))),
        driver.submit(driver.host(0).commit(driver.commit_request(0, 1, [0], one_phase=True))),
        driver.submit(driver.host(0).write_rows(rows)),
    ]
    sums = driver.gather(bags)  # comes after the three in the shard's queue
    driver.update(1, 1, GRADS)
    assert not any(future.done() for future in waiting)
    driver.call(driver.host(0).thaw(driver.table_id))
    results = [future.result(timeout=20) for future in waiting]
    assert results[0].missing == ()
    assert results[1].applied
    assert not driver.status(0).frozen
    assert relative_error(driver.gather(bags), sums) > 1e-3


def test_waiting_writers_meet_the_new_epoch(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    before = driver.read()
    driver.call(driver.host(0).freeze(driver.table_id, 5.0))
    waiting = driver.submit(driver.host(0).commit(driver.commit_request(0, 1, [0], one_phase=True)))
    driver.move("columns")
    with pytest.raises(StalePlacement):
        waiting.result(timeout=20)
    assert torch.equal(driver.read(), before)


@pytest.mark.parametrize("decision", ["commit", "discard"])
def test_a_freeze_waits_for_prepared_steps(driver: Driver, decision: str) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    freezing = driver.submit(driver.host(0).freeze(driver.table_id, 20.0))
    assert any(driver.status(0).frozen for _ in range(10_000))
    assert driver.prepare(1, [0])[0].missing == ()  # a repeat of what is prepared goes through
    assert not freezing.done()
    if decision == "commit":
        assert driver.commit(1, [0])[0].applied
    else:
        driver.discard(1)
    assert freezing.result(timeout=20) == (decision == "commit")
    driver.call(driver.host(0).thaw(driver.table_id))


def test_a_freeze_that_waits_too_long_gives_up(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    with pytest.raises(DeadlineExceeded, match="step 1 of rank 0 of group 'trainer'"):
        driver.call(driver.host(0).freeze(driver.table_id, 0.05))
    assert not driver.status(0).frozen
    assert driver.commit(1, [0])[0].applied


def test_a_freeze_that_cuts_through_a_step_lets_go_of_it(driver: Driver) -> None:
    """One owner is frozen before a step's Prepare and another after it: neither can go on. The freeze gives up."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.call(driver.host(0).freeze(driver.table_id, 5.0))
    waiting = driver.submit(driver.host(0).prepare(driver.prepare_request(0, 1, [0])))
    assert driver.call(driver.host(1).prepare(driver.prepare_request(1, 1, [0]))).missing == ()
    with pytest.raises(DeadlineExceeded, match="prepared and not decided"):
        driver.call(driver.host(1).freeze(driver.table_id, 0.05))
    assert not waiting.done()
    driver.call(driver.host(0).thaw(driver.table_id))
    assert waiting.result(timeout=20).missing == ()
    driver.commit(1, [0])
    driver.move("rows")
    assert {driver.status(shard).version for shard in (0, 1)} == {1}


def test_a_thaw_drops_what_was_staged(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.train(1, {0: (make_bags(1), GRADS)})
    before, values = driver.contents(), driver.read()
    driver.call(driver.host(0).freeze(driver.table_id, 5.0))
    target = driver.make_view(driver.schema, LAYOUTS["columns"], epoch=2)
    for dest, request in driver.pulls(target):
        driver.call(driver.host(dest).pull_pages(request))
    assert driver.status(1).num_bytes > 0
    for shard in (0, 1):
        for _ in range(2):
            driver.call(driver.host(shard).thaw(driver.table_id))
    assert driver.status(1).num_bytes == 0
    assert same(driver.contents(), before)
    with pytest.raises(Internal, match="pull them first"):
        driver.call(driver.host(1).set_view(target))
    assert same(driver.contents(), before)
    driver.move("columns")
    assert torch.equal(driver.read(), values)


def test_a_pull_can_be_repeated(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    values = driver.read()
    target = driver.make_view(driver.schema, LAYOUTS["mixed"], epoch=2)
    driver.call(driver.host(0).freeze(driver.table_id, 5.0))
    for _ in range(2):
        for dest, request in driver.pulls(target):
            report = driver.call(driver.host(dest).pull_pages(request))
            assert report.pages == len(request.row_pages) * len(request.blocks)
    for _ in range(2):
        for hosted in driver.hosted:
            driver.call(hosted.host.set_view(target))
    driver.view = target
    assert torch.equal(driver.read(), values)
    assert _pages(driver) == 21


def test_what_cannot_be_pulled_is_refused(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    before = driver.contents()
    table_id, page = driver.table_id, np.array([0])
    source = driver.hosted[0].info
    for match, request in {
        "already": PullPages(table_id=table_id, source=source, row_pages=page, blocks=(1,)),
        "no row page 7": PullPages(table_id=table_id, source=source, row_pages=np.array([7]), blocks=(0,)),
        "no block 3": PullPages(table_id=table_id, source=source, row_pages=page, blocks=(0, 3)),
        "no key page 0": PullPages(table_id=table_id, source=source, row_pages=page, blocks=(0,), key_pages=(0,)),
        "does not own": PullPages(table_id=table_id, source=driver.hosted[2].info, row_pages=page, blocks=(0,)),
    }.items():
        with pytest.raises(InvalidRequest, match=match):
            driver.call(driver.host(1).pull_pages(request))
    with pytest.raises(InvalidRequest, match="does not own"):
        driver.call(driver.host(1).export_pages(ExportPages(table_id=table_id, row_pages=page, blocks=(0,))))
    assert same(driver.contents(), before)


def test_views_of_other_epochs(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.move("columns")
    before = driver.contents()
    driver.call(driver.host(0).set_view(driver.make_view(driver.schema, LAYOUTS["one"], epoch=1)))
    driver.call(driver.host(0).set_view(driver.placed))
    assert same(driver.contents(), before)
    for hosted in driver.hosted:
        views = driver.call(hosted.host.views())
        mine = next(view for view in views if view.schema.table_id == driver.table_id)
        assert mine.placement.epoch == 2
        assert np.array_equal(mine.placement.owners, driver.placed.placement.owners)
        assert mine.schema == driver.schema


def test_attaching_again_changes_nothing(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    driver.train(1, {0: (make_bags(1), GRADS)})
    before = driver.contents()
    for shard in (0, 1):
        driver.call(driver.host(shard).attach_table(AttachTable(view=driver.placed, mode="initialise")))
    assert same(driver.contents(), before)
