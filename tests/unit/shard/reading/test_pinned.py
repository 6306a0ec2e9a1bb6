"""Reads at a pin are bitwise of its version, whatever is trained, written, read and released meanwhile."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.errors import InvalidRequest, RequestTooLarge, VersionGone
from mempool.shard.reading import pinned
from mempool.types import (
    FlatKeySpec,
    OptimizerSpec,
    PinRequest,
    ProductKeySpec,
    ReadRowsRequest,
)
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema
from tests.contract.pins import SLOTS, pin, pin_all, same, seeded, seen
from tests.unit.shard.conftest import MakeDriver

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
KINDS: dict[str, dict[str, Any]] = {
    "adagrad": {},
    "flat keys": {"keys": FlatKeySpec(key_dim=5)},
    "product keys": {"num_slots": 49, "stride": 7, "keys": ProductKeySpec(heads=3, key_dim=4)},
    "bytes": {"dtype": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "dense": {"optimizer": OptimizerSpec(algorithm="adamw", lr=0.1, weight_decay=0.1, dense=True)},
}


def write(driver: Driver, seed: int) -> None:
    """Some values, and some keys where there are any, at all owners."""
    schema = driver.schema
    ids = torch.randint(0, schema.num_slots, (9,), generator=seeded(seed)).unique()
    driver.write("values", ids, torch.randn(len(ids), schema.value_dim, generator=seeded(seed)))
    if schema.keys is not None:
        heads = torch.tensor([seed % 3])
        driver.write("keys", heads, torch.randn(1, driver.row_width("keys"), generator=seeded(seed)))


def _made(make_driver: MakeDriver, kind: str, layout: str = "mixed", **options: Any) -> Driver:
    schema = make_schema(**KINDS[kind])
    return make_driver(3, **options).create(schema, layout, [1, 0, 2] if schema.num_key_pages else ())


def train(driver: Driver, step: int) -> None:
    bags = make_bags(step)
    driver.train(step, {step: (type(bags)(bags.ids % driver.schema.num_slots, bags.weights, bags.offsets), GRADS)})


def kept_bytes(driver: Driver) -> int:
    return sum(driver.call(hosted.host.status()).version_bytes for hosted in driver.hosted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pin_reads_its_version_to_the_bit(make_driver: MakeDriver, kind: str) -> None:
    driver = _made(make_driver, kind)
    train(driver, 1)
    first = pin_all(driver, "first"), seen(driver)
    train(driver, 2)
    write(driver, 5)
    second = pin_all(driver, "second"), seen(driver)
    for step in range(3, 6):
        train(driver, step)
        write(driver, step)
        if step == 4:
            seen(driver)  # a dense optimizer's rows are brought up to date by who reads them
        assert same(seen(driver, "first"), first[1])
        assert same(seen(driver, "second"), second[1])
    assert (first[0], second[0]) == (1, 2)
    assert not same(seen(driver), second[1])
    for shard in driver.owners:
        pin(driver, shard, "release", "second")
    assert same(seen(driver, "first"), first[1]), "the earlier one takes over what it needs"
    assert kept_bytes(driver) > 0
    for shard in driver.owners:
        pin(driver, shard, "release", "first")
    assert kept_bytes(driver) == 0
    with pytest.raises(VersionGone, match="released"):
        seen(driver, "first")


@pytest.mark.parametrize("kind", KINDS)
def test_pinned_or_not_it_is_trained_alike(make_driver: MakeDriver, kind: str) -> None:
    """To the bit, also where readers of a version read rows that a dense optimizer has left behind."""
    contents = []
    for pinned_too in (False, True):
        driver = _made(make_driver, kind)
        for step in range(1, 5):
            train(driver, step)
            if pinned_too and step == 1:
                pin_all(driver)
            if pinned_too:
                seen(driver, "reader")
        contents.append(seen(driver))
    assert same(*contents)


_ACTIONS = st.lists(
    st.tuples(st.sampled_from(["step", "write", "pin", "release", "check", "arm", "move"]), st.integers(0, 3)),
    max_size=18,
)


@given(actions=_ACTIONS, kind=st.sampled_from(["adagrad", "flat keys", "dense"]))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_order_of_commits_pins_and_moves(
    make_driver: MakeDriver, actions: list[tuple[str, int]], kind: str
) -> None:
    driver = _made(make_driver, kind, "columns")
    wanted: dict[str, dict[str, Tensor]] = {}
    tokens: dict[int, str] = {}
    step = 0
    for number, (action, which) in enumerate(actions):
        token = tokens.get(which, "")
        if action == "step":
            step += 1
            train(driver, step)
        elif action == "write":
            write(driver, number)
        elif action == "pin" and token not in wanted:
            token = tokens[which] = f"reader {which} of {number}"
            pin_all(driver, token)
            wanted[token] = seen(driver)
        elif action == "arm":
            pin(driver, driver.owners[which % len(driver.owners)], "arm", f"armed {number}")
        elif action == "release" and wanted.pop(token, None) is not None:
            for shard in driver.owners:
                pin(driver, shard, "release", token)
        elif action == "move":
            driver.move(["columns", "rows", "one", "grid"][which])
            for gone in wanted:
                with pytest.raises(VersionGone, match="moved"):
                    seen(driver, gone)
            wanted = {}
        elif action == "check":
            for held, found in wanted.items():
                assert same(seen(driver, held), found)
    for held, found in wanted.items():
        assert same(seen(driver, held), found)


def test_shards_are_pinned_at_one_version_though_a_step_came_between(make_driver: MakeDriver) -> None:
    driver = make_driver(3).create(make_schema(), "columns")
    train(driver, 1)
    before = seen(driver)
    bags = make_bags(2)
    driver.gather(bags)
    driver.update(2, 2, GRADS)
    driver.prepare(2, [2])
    late = next(shard for shard in driver.owners if shard != driver.gate)
    # A shard that has heard of nothing answers readers only once it knows that the step is not decided.
    assert pin(driver, late, "arm") == 1
    decided = driver.decide(2, [2])
    others = [shard for shard in driver.owners if shard != late]
    assert {pin(driver, shard, "arm") for shard in others} == {2}
    del before
    for shard in driver.owners:
        if shard != driver.gate:
            driver.call(
                driver.host(shard).commit(driver.commit_request(shard, 2, [2], decided=True, version=decided.version))
            )
    wanted = seen(driver)
    train(driver, 3)
    assert {pin(driver, shard, "settle", version=2) for shard in driver.owners} == {2}
    assert same(seen(driver, "reader"), wanted)


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(make_driver: MakeDriver) -> None:
    most = 4 * 10 * 40 + 2 * 4 * 56  # 40 rows, and where the copies of two moments lie
    driver = make_driver(1, version_memory_bytes=most).create(make_schema(), "one")
    train(driver, 1)
    pin_all(driver, "old")
    write(driver, 1)
    pin_all(driver, "new")
    wanted = seen(driver)
    tokens = ["old", "new"]
    for seed in range(2, 30):
        write(driver, seed)
        assert kept_bytes(driver) <= most
        here = {pin.token for pin in driver.hosted[0].host._tenancy.tables[1].storage.moments.pins}  # type: ignore[attr-defined]
        for token in tokens[: len(tokens) - len(here)]:
            with pytest.raises(VersionGone, match=r"oldest goes first.*shard\.version_memory") as gone:
                seen(driver, token)
            assert gone.value.shard == 0
        tokens = tokens[len(tokens) - len(here) :]
        assert here == set(tokens), "the oldest goes first"
        if "new" in here:
            assert same(seen(driver, "new"), wanted)
    assert not tokens
    assert kept_bytes(driver) == 0


def test_copies_of_product_keys_are_bounded_too(make_driver: MakeDriver) -> None:
    keys = 3 * 2 * 7 * 2 * 4  # heads, halves, keys of one, float32 numbers of one
    driver = make_driver(1, version_memory_bytes=2 * keys).create(
        make_schema(**KINDS["product keys"]), "one", [0, 0, 0]
    )
    for number in range(5):
        pin_all(driver, f"pin {number}")
        row = torch.randn(1, driver.row_width("keys"), generator=seeded(number))
        driver.write("keys", torch.tensor([number % 3]), row)
        assert kept_bytes(driver) <= 2 * keys
    with pytest.raises(VersionGone, match="oldest goes first"):
        seen(driver, "pin 2")
    seen(driver, "pin 3")


def test_pages_come_before_what_is_kept(make_driver: MakeDriver) -> None:
    """Kept rows are a part of what pages may have: pages that come take what they need of it."""
    schema = make_schema()
    one = make_driver(1).create(schema, "one")
    num_bytes = one.call(one.host(0).status()).num_bytes
    driver = make_driver(1, memory_bytes=2 * num_bytes, version_memory_bytes=num_bytes).create(schema, "one")
    pin_all(driver)
    for seed in range(20):
        write(driver, seed)
    assert kept_bytes(driver) > 0
    other = Driver(driver.hosted, table_id=2).create(make_schema(name="other"), "one")
    assert other.call(other.host(0).status()).num_bytes == 2 * num_bytes
    assert kept_bytes(driver) == 0
    with pytest.raises(VersionGone, match="may take"):
        seen(driver, "reader")


def test_a_pin_ends_with_its_reader(make_driver: MakeDriver) -> None:
    now = [0.0]
    driver = make_driver(1, clock=lambda: now[0], held_lease_s=1.0).create(make_schema(), "one")
    pin_all(driver)
    now[0] = 40.0
    pin(driver, 0, "renew")
    now[0] = 99.0
    seen(driver, "reader")
    now[0] = 101.0
    driver.call(driver.host(0).pin(PinRequest(envelope=driver.envelope(0), do="release", pin="nobody's")))
    with pytest.raises(VersionGone, match="silent"):
        seen(driver, "reader")


def test_bad_pins_change_nothing(make_driver: MakeDriver) -> None:
    driver = make_driver(1).create(make_schema(), "one")
    for bad in ({"token": ""}, {"lease_s": -1.0}, {"lease_s": float("nan")}, {"lease_s": 1e9}, {"token": "x" * 999}):
        with pytest.raises(InvalidRequest, match=r"Nothing was changed"):
            pin(driver, 0, "arm", **bad)
    assert driver.status(0).pins == ()
    with pytest.raises(VersionGone, match="version 7"):
        pin(driver, 0, "attach", version=7)
    with pytest.raises(VersionGone, match="not taken here"):
        seen(driver, "somebody's")
    pin_all(driver)
    state = ReadRowsRequest(envelope=driver.envelope(0), array="values.sum", ids=SLOTS, pin="reader")
    with pytest.raises(InvalidRequest, match="values and keys are kept"):
        driver.call(driver.host(0).read_rows(state))


def test_long_reads_are_laid_piece_by_piece(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_PIECE_BYTES", 100)
    for kind in KINDS:
        driver = _made(make_driver, kind)
        pin_all(driver)
        wanted = seen(driver)
        train(driver, 1)
        write(driver, 1)
        assert same(seen(driver, "reader"), wanted)
    monkeypatch.setattr(pinned, "_LARGEST_BAG_BYTES", 100)
    with pytest.raises(RequestTooLarge, match="Cut it"):
        seen(driver, "reader")
