"""Counts of use, and slots that begin anew: exactly once under repeats, at the moment of a step or not at all."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mempool.errors import InvalidRequest, StepConflict
from mempool.types import FlatKeySpec, OptimizerSpec, ReadRowsRequest, WriteId, WriteRowsRequest
from mempool.types.usage import Tally, UsageRequest, usage_of

from .bags import Bags, make_bags
from .driver import Driver, make_schema, same
from .layouts import LAYOUTS

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
ADAM = OptimizerSpec(algorithm="adam", lr=0.1)
IDS = torch.arange(50)


def counts(driver: Driver, array: str = "values.uses") -> Tensor:
    """[slots] int64, of the owners of block 0."""
    found = torch.zeros(50, dtype=torch.int64)
    for shard in driver.owners:
        request = ReadRowsRequest(envelope=driver.envelope(shard), array=array, ids=IDS)
        reply = driver.call(driver.host(shard).read_rows(request))
        assert (reply.rows.dtype, reply.blocks) == (torch.int64, (0,))
        found += reply.rows[:, 0]
    return found


def pairs_of(*bags: Bags) -> Tensor:
    return sum((torch.bincount(each.ids, minlength=50) for each in bags), torch.zeros(50, dtype=torch.int64))


def pages(driver: Driver) -> dict[str, Any]:
    """What all pages hold."""
    return {name: rows for name, rows in driver.contents().items() if "of pages" in name}


def tally(driver: Driver, older_than: int = 0) -> Tally:
    found = Tally.none()
    for shard in driver.owners:
        request = UsageRequest(envelope=driver.envelope(shard), older_than=older_than)
        reply = driver.call(driver.host(shard).usage(request))
        found += Tally(outdated=reply.outdated, most=reply.most, log_sum=reply.log_sum, histogram=reply.histogram)
    return found


def fresh(driver: Driver, shard: int, ids: Tensor, number: int, array: str = "values", **changes: Any) -> None:
    blocks = driver.blocks(shard)
    rows = torch.full((ids.shape[0], len(driver.columns(blocks))), float(number))
    request = WriteRowsRequest(
        envelope=driver.envelope(shard),
        array=array,
        ids=ids,
        blocks=blocks,
        rows=rows,
        write_id=WriteId(writer=7, number=number),
        fresh=True,
    )
    driver.call(driver.host(shard).write_rows(replace(request, **changes)))


@pytest.mark.parametrize("layout", ["one", "columns", "rows", "mixed"])
@pytest.mark.parametrize("want_norm", [True, False])
def test_a_pair_counts_once_with_its_step(driver: Driver, layout: str, want_norm: bool) -> None:
    driver.create(make_schema(usage=True, optimizer=ADAM, keys=FlatKeySpec(key_dim=3)), layout)
    first, second, dropped = (make_bags(seed) for seed in (1, 2, 3))
    for _ in range(2):
        for sequence, bags in ((5, first), (6, second)):
            driver.gather(bags)
            driver.update(1, sequence, GRADS, bags=bags)
        assert counts(driver).sum() == 0
    for _ in range(2):
        driver.prepare(1, [5, 6], want_norm=want_norm)
    for _ in range(2):
        driver.commit(1, [5, 6])
    driver.update(1, 5, GRADS, bags=first)  # of a step that is applied
    expected = pairs_of(first, second)
    assert torch.equal(counts(driver), expected)
    assert torch.equal(counts(driver, "values.last_use"), (expected > 0).to(torch.int64))

    driver.update(2, 7, GRADS, bags=dropped, hold=False)  # of a frozen table
    driver.update(2, 8, GRADS, bags=dropped)
    driver.prepare(2, [8])
    driver.discard(2)
    assert torch.equal(counts(driver), expected)

    driver.train(3, {9: (second, GRADS)}, want_norm=want_norm)
    expected += pairs_of(second)
    assert torch.equal(counts(driver), expected)
    last_use = torch.where(pairs_of(second) > 0, 2, (expected > 0).to(torch.int64))
    assert torch.equal(counts(driver, "values.last_use"), last_use)
    found = usage_of(tally(driver, older_than=1))
    whole = usage_of(Tally.of(expected.numpy(), last_use.numpy(), before=2))
    assert replace(found, kl_uniform=None) == replace(whole, kl_uniform=None)
    assert found.kl_uniform == pytest.approx(whole.kl_uniform)
    assert found.num_slots == 50


def test_counts_move_with_their_pages(driver: Driver) -> None:
    driver.create(make_schema(usage=True), "rows")
    bags = make_bags(1)
    driver.train(1, {1: (bags, GRADS)})
    for layout in ("columns", "one", "mixed"):
        driver.move(LAYOUTS[layout])
        assert torch.equal(counts(driver), pairs_of(bags)), layout
        assert tally(driver).uses == int(pairs_of(bags).sum())


@pytest.mark.parametrize("layout", ["one", "columns"])
def test_fresh_slots_have_no_past(driver: Driver, layout: str) -> None:
    driver.create(make_schema(usage=True, optimizer=ADAM), layout)
    bags = make_bags(1)
    driver.train(1, {1: (bags, GRADS)})
    slots, before = bags.ids.unique()[:4], pages(driver)
    others = ~torch.isin(IDS, slots)
    uses, state = counts(driver), {name: driver.read(f"values.{name}") for name in ("exp_avg", "exp_avg_sq")}
    driver.update(2, 2, GRADS, bags=bags)
    for prepares in (False, True):  # undecided: neither is changed
        if prepares:
            driver.prepare(2, [2])
        for shard in driver.owners:
            with pytest.raises(StepConflict, match=r"step 2 of rank 0 of group 'trainer' is undecided"):
                fresh(driver, shard, slots, 1)
            with pytest.raises(StepConflict, match="is undecided"):
                fresh(driver, shard, slots[:0], 1)  # whoever only asks
    driver.discard(2)
    assert same(pages(driver), before)

    for shard in driver.owners:
        fresh(driver, shard, slots, 2)
    assert torch.equal(driver.read("values", slots), torch.full((4, 10), 2.0))
    assert not counts(driver)[slots].any()
    assert not counts(driver, "values.last_use")[slots].any()
    assert torch.equal(counts(driver)[others], uses[others])
    for name, rows in state.items():
        now = driver.read(f"values.{name}")
        assert not now[slots].any()
        assert torch.equal(now[others], rows[others])

    driver.train(3, {3: (bags, GRADS)})
    trained = pages(driver)
    driver.update(4, 4, GRADS, bags=bags)
    for shard in driver.owners:  # a repeat of what is done is answered, whoever trains by now, and not done again
        fresh(driver, shard, slots, 2)
    driver.discard(4)
    assert same(pages(driver), trained)


def test_what_cannot_be_asked_changes_nothing(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    with pytest.raises(InvalidRequest, match="does not count how often its slots are used; make it with usage=True"):
        driver.call(driver.host(0).usage(UsageRequest(envelope=driver.envelope(0))))
    driver.drop()
    driver.create(make_schema(usage=True), "one")
    before = driver.contents()
    with pytest.raises(InvalidRequest, match="older_than = 9007199254740992 must not be"):
        driver.call(driver.host(0).usage(UsageRequest(envelope=driver.envelope(0), older_than=2**53)))
    with pytest.raises(InvalidRequest, match=r"rows of 'values.sum' cannot be fresh"):
        fresh(driver, 0, IDS[:2], 1, array="values.sum")
    for array in ("values.uses", "values.last_use"):
        with pytest.raises(InvalidRequest, match="is only read"):
            fresh(driver, 0, IDS[:2], 1, array=array, rows=torch.zeros(2, 1), blocks=(0,), fresh=False)
    assert same(driver.contents(), before)
