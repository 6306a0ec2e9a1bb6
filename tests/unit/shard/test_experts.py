"""Experts on their shard: what is refused, what is answered and held of what is asked, and the bits of it."""

from collections.abc import Generator
from dataclasses import replace
from types import GeneratorType
from typing import Any

import pytest
import torch

from mempool.errors import DataLoss, InvalidRequest, NotFound
from mempool.shard import Engine
from mempool.shard.work import pace
from mempool.types import GatherRequest, UpdateReply
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver

LENGTHS = (3, 0, 5, 1)
INPUT_DIM = 3
SCHEMA = make_schema(layout="rows")
BOTH = torch.randn(len(LENGTHS), 10, generator=torch.Generator().manual_seed(4))


def asked(driver: Driver, **changes: Any) -> GatherRequest:
    bags = make_bags(1, lengths=LENGTHS)
    request = GatherRequest(
        envelope=driver.envelope(0),
        lookup_id=1,
        ids=bags.ids,
        weights=bags.weights,
        offsets=bags.offsets,
        remember=True,
        act="gelu",
        inputs=BOTH[:, :INPUT_DIM].contiguous(),
    )
    return replace(request, **changes)


def update_of(driver: Driver, sequence: int = 1, **changes: Any) -> Any:
    of_experts = {"act": "gelu", "input_dim": INPUT_DIM} | changes
    return driver.update_request(0, 1, sequence, BOTH, bags=make_bags(1, lengths=LENGTHS), **of_experts)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8])
def test_inputs_of_other_dtypes_are_refused(make_driver: MakeDriver, dtype: torch.dtype) -> None:
    driver = make_driver().create(SCHEMA)
    with pytest.raises(InvalidRequest, match=r"inputs of experts must be \[4, I\] float32 or bfloat16.*torch\."):
        driver.call(driver.host(0).gather(asked(driver, inputs=torch.ones(4, INPUT_DIM, dtype=dtype))))
    assert driver.call(driver.host(0).status()).context_bytes == 0


def test_what_is_of_experts_is_refused_without_an_act(make_driver: MakeDriver) -> None:
    driver = make_driver().create(SCHEMA)
    with pytest.raises(InvalidRequest, match="inputs are of experts, and no act was given"):
        driver.call(driver.host(0).gather(asked(driver, act="")))
    with pytest.raises(InvalidRequest, match="input_dim = 3 is of experts, and no act was given"):
        driver.call(driver.host(0).update(update_of(driver, act="")))
    assert driver.status(0).updates_held == 0


def test_a_repeat_is_answered_as_what_is_held_or_refused(make_driver: MakeDriver) -> None:
    driver = make_driver().create(SCHEMA)
    first = driver.call(driver.host(0).update(update_of(driver)))
    assert torch.equal(driver.call(driver.host(0).update(update_of(driver))).weight_grad, first.weight_grad)
    for changes, message in (
        ({"act": "", "input_dim": 0}, "is held, of experts, and no act was given"),
        ({"input_dim": 4}, "of experts of 3 inputs, not 4"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            driver.call(driver.host(0).update(update_of(driver, **changes)))
    bags = make_bags(1, lengths=LENGTHS)
    driver.call(driver.host(0).update(driver.update_request(0, 1, 2, BOTH, bags=bags)))
    with pytest.raises(InvalidRequest, match="is held, and is none of experts"):
        driver.call(driver.host(0).update(update_of(driver, 2)))


def test_pages_are_as_warm_by_experts_as_by_values(make_driver: MakeDriver) -> None:
    counted = []
    for of_experts in (True, False):
        driver = make_driver().create(SCHEMA)
        engine: Any = driver.host(0)
        heat = engine._tenancy.tables[driver.table_id].storage.heat
        heat.due = 1  # the first call is looked at
        bags = make_bags(1, lengths=LENGTHS)
        update = update_of(driver) if of_experts else driver.update_request(0, 1, 1, BOTH, bags=bags)
        driver.call(engine.update(update))
        counted.append(heat.now().tolist())
    assert counted[0] == counted[1]
    assert sum(counted[0]) > 0


def test_experts_that_are_asked_for_at_once_are_no_values(make_driver: MakeDriver) -> None:
    driver = make_driver().create(SCHEMA)
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    plain = asked(driver, private=True)
    usual = replace(plain, ids=plain.ids.to(torch.uint32))
    found = engine.at_once.begin_gather(usual, alone=True)()
    expected = driver.call(engine.gather(plain)).values
    assert expected.shape == (4, 7)
    assert found is not None
    assert torch.equal(found.values, expected)


@pytest.mark.parametrize("owners", ["columns", "mixed"])
def test_slots_that_are_cut_are_no_experts_whatever_the_layout_says(make_driver: MakeDriver, owners: str) -> None:
    """As those of a table are that became, by a fork, what one of another layout is."""
    driver = make_driver(3).create(SCHEMA, owners)
    shard = next(shard for shard in driver.owners if driver.blocks(shard))
    with pytest.raises(InvalidRequest, match=f"slots of table 'facts' are cut on shard {shard}"):
        driver.call(driver.host(shard).gather(asked(driver, envelope=driver.envelope(shard))))
    request = replace(
        update_of(driver),
        envelope=driver.envelope(shard),
        blocks=driver.blocks(shard),
        grads=BOTH[:, driver.columns(driver.blocks(shard))].contiguous(),
    )
    with pytest.raises(InvalidRequest, match=f"slots of table 'facts' are cut on shard {shard}"):
        driver.call(driver.host(shard).update(request))
    assert driver.status(shard).updates_held == 0


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that each bag is one."""
    monkeypatch.setattr(pace, "PIECE_BYTES", 40)
    monkeypatch.setattr(pace, "WHOLE_BYTES", 40)


def end_of(pieces: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def held_of(driver: Driver, sequence: int) -> Any:
    engine: Any = driver.host(0)
    return engine._tenancy.tables[driver.table_id].updates.get(driver.step_id(1), sequence)


def test_pieces_have_the_bits_of_the_whole_and_are_held_once(
    make_driver: MakeDriver, request: pytest.FixtureRequest
) -> None:
    driver = make_driver().create(SCHEMA)
    inner: Any = driver.host(0)._answers  # type: ignore[attr-defined]
    sums, answer = inner.gather(asked(driver)), inner.update(update_of(driver, 1))
    request.getfixturevalue("in_pieces")
    gather, first, second = inner.gather(asked(driver)), *(inner.update(update_of(driver, 2)) for _ in range(2))
    assert all(isinstance(pieces, GeneratorType) for pieces in (gather, first, second))
    assert torch.equal(end_of(gather).values, sums.values)
    for pieces in (first, second):
        assert torch.equal(end_of(pieces).weight_grad, answer.weight_grad)
    assert driver.status(0).updates_held == 2
    whole, cut = held_of(driver, 1), held_of(driver, 2)
    assert whole.num_bytes == cut.num_bytes
    assert torch.equal(whole.grads, cut.grads)
    for name in ("ids", "weights", "offsets"):
        assert torch.equal(getattr(whole.bags, name), getattr(cut.bags, name))


@pytest.mark.usefixtures("in_pieces")
def test_a_table_that_goes_away_ends_the_pieces(make_driver: MakeDriver) -> None:
    driver = make_driver().create(SCHEMA)
    inner: Any = driver.host(0)._answers  # type: ignore[attr-defined]
    several = inner.gather(asked(driver)), inner.update(update_of(driver))
    for pieces in several:
        next(pieces)
    driver.drop()
    for pieces in several:
        with pytest.raises(NotFound):
            end_of(pieces)


def test_gradients_are_answered_where_they_are_wanted_and_held_where_they_are_to_be(make_driver: MakeDriver) -> None:
    driver = make_driver(max_message_bytes=4096).create(SCHEMA)

    def answered(sequence: int, **changes: Any) -> UpdateReply:
        return driver.call(driver.host(0).update(update_of(driver, sequence, **changes)))

    wanted = answered(1)
    assert wanted.weight_grad is not None
    assert wanted.weight_grad.shape == (9 + 4 * INPUT_DIM,)
    for sequence in (2, 2, 1):  # new, and again
        assert answered(sequence, want_weight_grad=False).weight_grad is None
    again = answered(2).weight_grad
    assert again is not None
    assert torch.equal(again, wanted.weight_grad)
    assert driver.status(0).updates_held == 2
    only_asked = answered(3, hold=False).weight_grad
    assert only_asked is not None
    assert torch.equal(only_asked, wanted.weight_grad)
    assert driver.status(0).updates_held == 2


def test_an_update_that_is_held_waits_for_nothing_where_no_gradient_is_wanted(make_driver: MakeDriver) -> None:
    driver = make_driver().create(SCHEMA)
    inner: Any = driver.host(0)._answers  # type: ignore[attr-defined]
    ahead = driver.envelope(0, table_version=5)
    assert not isinstance(inner.update(update_of(driver)), GeneratorType)
    held = inner.update(replace(update_of(driver), envelope=ahead, want_weight_grad=False))
    assert isinstance(held, UpdateReply)
    with pytest.raises(DataLoss):  # what is held of a new one is made of rows, and of that version there are none
        inner.update(replace(update_of(driver, 2), envelope=ahead, want_weight_grad=False))
