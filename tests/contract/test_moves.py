"""Pages changing their owner: whole, with state and ledger, without held updates, and nobody notices."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mempool.errors import ContextMissing, DeadlineExceeded, Internal, InvalidRequest, StalePlacement
from mempool.types import (
    AttachTable,
    ExportPages,
    FlatKeySpec,
    Ledger,
    LedgerEntry,
    OptimizerSpec,
    ProductKeySpec,
    PullPages,
    WriteRowsRequest,
)

from .bags import make_bags, relative_error
from .driver import Driver, make_schema, same
from .layouts import LAYOUTS

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
    assert driver.freeze(1) == 1
    driver.thaw(1)
    entry = LedgerEntry(step=1, version=1)
    assert driver.ledger(1) == Ledger(version=1, updates_applied=2, entries={("trainer", 0): entry})
    assert driver.prepare(1, [0, 1])[1].applied
    before = driver.contents()
    assert driver.commit(1, [0, 1])[1].version == 1
    assert same(driver.contents(), before)
    assert driver.status(0).pages == 0


def test_a_ledger_of_very_many_groups_with_long_names_moves_once(driver: Driver) -> None:
    """More than any message's header may hold, whatever the number of batches that the pages come in."""
    entries = {(f"{number:0256d}", 0): LedgerEntry(step=number + 1, version=5) for number in range(16_384)}
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
    assert driver.freeze(0) == 0
    assert driver.status(0).frozen
    rows = WriteRowsRequest(
        envelope=driver.envelope(0), array="values", ids=torch.tensor([0]), blocks=(0, 1, 2), rows=torch.ones(1, 10)
    )
    waiting = [
        driver.submit(driver.host(0).prepare(driver.prepare_request(0, 1, [0], wait=True))),
        driver.submit(driver.host(0).commit(driver.commit_request(0, 1, [0], one_phase=True))),
        driver.submit(driver.host(0).write_rows(rows)),
    ]
    assert driver.prepare(1, [0])[0].held_off
    sums = driver.gather(bags)  # comes after the three in the shard's queue
    driver.update(1, 1, GRADS)
    assert not any(future.done() for future in waiting)
    driver.thaw(0)
    results = [future.result(timeout=20) for future in waiting]
    (prepared,), (committed,) = results[0].parts, results[1].parts  # type: ignore[union-attr]
    assert (prepared.missing, prepared.held_off) == ((), False)
    assert committed.version == 1
    assert not driver.status(0).frozen
    assert relative_error(driver.gather(bags), sums) > 1e-3


def test_waiting_writers_meet_the_new_epoch(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    before = driver.read()
    driver.freeze(0)
    waiting = driver.submit(driver.host(0).commit(driver.commit_request(0, 1, [0], one_phase=True)))
    driver.move("columns", token="round")
    with pytest.raises(StalePlacement):
        waiting.result(timeout=20)
    assert torch.equal(driver.read(), before)


@pytest.mark.parametrize("decision", ["commit", "discard"])
def test_a_freeze_waits_for_prepared_steps(driver: Driver, decision: str) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    freezing = driver.submit(driver.host(0).freeze(driver.table_id, 20.0, token="round", lease_s=60.0))
    assert any(driver.status(0).frozen for _ in range(10_000))
    again = driver.prepare(1, [0])[0]
    assert (again.missing, again.held_off) == ((), False)  # a repeat of what is prepared goes through
    assert not freezing.done()
    if decision == "commit":
        assert driver.commit(1, [0])[0].version == 1
    else:
        driver.discard(1)
    assert freezing.result(timeout=20) == (decision == "commit")
    driver.thaw(0)


def test_a_freeze_that_waits_too_long_gives_up(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    with pytest.raises(DeadlineExceeded, match="step 1 of rank 0 of group 'trainer'"):
        driver.freeze(0, 0.05)
    assert not driver.status(0).frozen
    assert driver.commit(1, [0])[0].version == 1


def test_a_step_that_a_freeze_cuts_through_is_prepared_anew(driver: Driver) -> None:
    """One owner is frozen before a step's Prepare and another after it: the client ends what is prepared, and waits."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.freeze(0)
    assert {shard: reply.held_off for shard, reply in driver.prepare(1, [0]).items()} == {0: True, 1: False}
    waiting = driver.submit(driver.host(0).prepare(driver.prepare_request(0, 1, [0], wait=True)))
    with pytest.raises(DeadlineExceeded, match="prepared and not decided"):
        driver.freeze(1, 0.05)
    driver.discard(1, keep_updates=True)
    assert driver.freeze(1, token="another") == 0
    assert [driver.status(shard).updates_held for shard in (0, 1)] == [1, 1]
    assert not waiting.done()
    driver.thaw(0)
    driver.thaw(1, token="another")
    assert waiting.result(timeout=20).parts[0].missing == ()
    driver.prepare(1, [0])
    driver.commit(1, [0])
    driver.move("rows")
    assert {driver.status(shard).version for shard in (0, 1)} == {1}


def test_a_thaw_drops_what_was_staged(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.train(1, {0: (make_bags(1), GRADS)})
    before, values = driver.contents(), driver.read()
    driver.freeze(0)
    target = driver.make_view(driver.schema, LAYOUTS["columns"], epoch=2)
    for dest, request in driver.pulls(target):
        driver.call(driver.host(dest).pull_pages(request))
    assert driver.status(1).num_bytes > 0
    for shard in (0, 1):
        for _ in range(2):
            driver.thaw(shard, token="")
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
    driver.freeze(0)
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


def test_a_freeze_that_does_not_hold_is_not_renewed(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    with pytest.raises(StalePlacement, match="round 'round' of a move does not hold the table"):
        driver.freeze(0, renew=True)
    driver.freeze(0)
    driver.freeze(0, renew=True)
    with pytest.raises(StalePlacement, match="round 'round' of a move holds the table, and round 'other' asks"):
        driver.freeze(0, token="other", renew=True)
    driver.thaw(0, token="round")
    with pytest.raises(StalePlacement, match="round 'round' of a move is over"):
        driver.freeze(0, renew=True)
    assert not driver.status(0).frozen


def test_what_comes_late_of_a_round_that_is_over_is_refused(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.train(1, {0: (make_bags(1), GRADS)})
    before = driver.contents()
    target = driver.make_view(driver.schema, LAYOUTS["columns"], epoch=2)
    driver.freeze(0, token="first")
    ((dest, pull),) = driver.pulls(target)
    pull = replace(pull, token="first")
    driver.call(driver.host(dest).pull_pages(pull))
    for shard in (0, 1):
        driver.thaw(shard, token="first")
    export = ExportPages(table_id=driver.table_id, row_pages=pull.row_pages, blocks=pull.blocks, token="first")
    for late in (
        driver.host(0).freeze(driver.table_id, 5.0, token="first", lease_s=60.0),
        driver.host(0).export_pages(export),
        driver.host(0).set_view(target, token="first"),
        driver.host(dest).pull_pages(pull),
        driver.host(dest).set_view(target, token="first"),
    ):
        with pytest.raises(StalePlacement, match="round 'first' of a move is over"):
            driver.call(late)  # type: ignore[arg-type]
    driver.freeze(0, token="second")
    driver.thaw(0, token="first")
    assert driver.status(0).frozen
    for other in (
        driver.host(0).freeze(driver.table_id, 5.0, token="third", lease_s=60.0),
        driver.host(0).set_view(target, token="third"),
        driver.host(0).export_pages(replace(export, token="third")),
    ):
        with pytest.raises(StalePlacement, match="round 'second' of a move holds the table, and round 'third' asks"):
            driver.call(other)  # type: ignore[arg-type]
    driver.thaw(0, token="second")
    assert driver.status(1).num_bytes == 0
    assert same(driver.contents(), before)
    driver.move("columns")


def test_an_attach_that_comes_late_does_not_bring_back_an_earlier_epoch(driver: Driver) -> None:
    """At a shard without pages, where it would take the table's place, and make pages that others have."""
    driver.create(make_schema(), "columns")
    first = driver.placed
    driver.move([[1, 1, 1]] * 7)
    for mode in ("initialise", "empty"):
        late = AttachTable(view=first, mode=mode, pending=True)  # type: ignore[arg-type]
        with pytest.raises(StalePlacement, match="is here at epoch 2, and is to be attached at epoch 1"):
            driver.call(driver.host(0).attach_table(late))
    assert (driver.status(0).epoch, driver.status(0).pages) == (2, 0)
    driver.move("columns")
    assert driver.status(0).pages
